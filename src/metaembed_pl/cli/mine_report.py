"""The report of `mine`: numbers for each source, and pictures of examples."""

import json
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metaembed_pl.data.collate import decoded
from metaembed_pl.data.shards import ShardedPairs
from metaembed_pl.display import plain
from metaembed_pl.evaluation.canvas import report_style, save_picture
from metaembed_pl.evaluation.pairs_picture import draw_pairs
from metaembed_pl.evaluation.sheet import Shown
from metaembed_pl.files import write_text
from metaembed_pl.item import Item
from metaembed_pl.retrieval.mining import Corpus, Mined, RankedCandidate
from metaembed_pl.samples import quantiles

SHOWN_NEGATIVES = 4

Example = tuple[Item, list[Shown]]


class MiningReport:
    """The results for the pairs of a source, with some evenly spread examples."""

    def __init__(self, pairs: ShardedPairs, corpus: Corpus, num_examples: int) -> None:
        self.pairs, self.corpus = pairs, corpus
        self._examples: dict[int, Mined | None] = {
            k * len(pairs) // num_examples: None for k in range(num_examples)
        }
        self._numbers: Counter[int] = Counter()
        self._passed: Counter[str] = Counter()
        self._positives, self._negatives = array("d"), array("d")
        self._bad: list[str] = []

    def note(self, i: int, result: Mined | str) -> None:
        """Add the result for pair `i`, or the reason why it cannot be used."""
        if isinstance(result, str):
            self._bad.append("/".join(self.pairs.locate(i)) + f": {result}")
            return
        self._numbers[len(result.negatives)] += 1
        self._passed += result.counts
        self._positives.append(result.own)
        self._negatives.extend(found.score for found in result.negatives)
        if i in self._examples:
            self._examples[i] = result

    def summary(self) -> dict[str, Any]:
        """The results as JSON."""
        return {
            "num_pairs": self._numbers.total(),
            "num_bad": len(self._bad),
            "bad": self._bad[:3],
            "num_candidates": len(self.corpus),
            "num_negatives": {str(n): self._numbers[n] for n in sorted(self._numbers)},
            "passed_over": dict(self._passed.most_common()),
            "positive_scores": quantiles(self._positives),
            "negative_scores": quantiles(self._negatives),
        }

    def line(self) -> str:
        """The results as a line of text."""
        passed = ", ".join(f"{count:,} {why}" for why, count in self._passed.most_common())
        num_pairs = self._numbers.total()
        mean = len(self._negatives) / max(1, num_pairs)
        return plain(
            f"{self.pairs.name}: {mean:.2f} hard negatives per query, {num_pairs:,} pairs, "
            f"{len(self._bad):,} unusable; skipped: {passed or 'nothing'}"
        )

    def examples(self) -> list[Example]:
        """Queries, each with its positive, its negatives, and candidates that were left out."""
        return [self._example(i, mined) for i, mined in self._examples.items() if mined is not None]

    def _example(self, i: int, mined: Mined) -> Example:
        pair = decoded(self.pairs[i])

        def shown(found: Sequence[RankedCandidate], note: str) -> list[Shown]:
            return [Shown(self.corpus[row], False, f"{note}{score:.2f}") for row, score in found]

        positive = Shown(pair.positive, True, f"{mined.own:.2f}")
        return pair.query, [
            positive,
            *shown(mined.negatives[:SHOWN_NEGATIVES], ""),
            *shown(mined.left_out, "left out "),
        ]


def save_report(folder: Path, reports: Sequence[MiningReport]) -> None:
    """Writes `mined.json` and `mined.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    summaries = {report.pairs.name: report.summary() for report in reports}
    write_text(folder / "mined.json", json.dumps(summaries, indent=2) + "\n")
    examples = [example for report in reports for example in report.examples()]
    if examples:
        with report_style():
            explanation = "A green frame marks the positive; below are scores over r_q."
            sheet = draw_pairs("Mined hard negatives", explanation, examples)
            save_picture(sheet, folder / "mined.png")
