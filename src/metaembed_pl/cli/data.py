"""`python -m metaembed_pl data show`: the contents of shards, before training.

    python -m metaembed_pl data show data/emoji/train data/emoji/test --sheet pairs.png

Counts, lengths, sizes, negatives, duplicate and broken pairs of each folder of shards, overlaps
between folders (such as train and test), and a contact sheet of pairs.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaembed_pl.cli.model import refuse_ignored
from metaembed_pl.display import plain, shortened
from metaembed_pl.errors import UserError
from metaembed_pl.progress import with_progress

if TYPE_CHECKING:
    from metaembed_pl.data.shards import ShardedPairs
    from metaembed_pl.data.survey import Survey
    from metaembed_pl.item import Pair


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb and its flags."""
    what = parser.add_subparsers(metavar="WHAT", required=True)
    does = "counts, distributions, duplicates, leaks, a contact sheet"
    show = what.add_parser("show", help=does, description=does)
    add = show.add_argument
    add("shards", nargs="+", metavar="SHARDS", help="folders of shards, or parent folders")
    add("--sheet", type=Path, metavar="FILE.png", help="draw a contact sheet of pairs")
    add("--num", type=int, default=12, metavar="N", help="pairs on the contact sheet (default: 12)")
    add("--decode", action="store_true", help="decode all images, to find broken and equal images")
    add(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="count the texts that this model would truncate",
    )
    add("--json", action="store_true", help="one JSON object instead of tables")


def run(args: argparse.Namespace) -> None:
    """Read the shards once and print their contents."""
    from metaembed_pl.data.shards import ShardedPairs
    from metaembed_pl.data.survey import Survey, shared

    if args.sheet is None:
        refuse_ignored(args, "needs --sheet FILE.png, which shows that many pairs", num=12)
    if args.num < 1:
        raise UserError(f"--num must be at least 1, got {args.num}")
    folders = [ShardedPairs(folder) for name in args.shards for folder in _folders(name)]
    processing = _processing(args.model)
    surveys = [
        Survey(pairs, args.decode, partial(_tracked, str(pairs.folder)), processing)
        for pairs in folders
    ]
    summaries, leaks = [survey.summary() for survey in surveys], shared(surveys)
    if args.json:
        print(json.dumps({"sources": summaries, "shared": leaks}, ensure_ascii=False))
    else:
        _print_sources(summaries)
        _print_shared(leaks, len(surveys))
    if args.sheet is not None:
        _draw(surveys, args.sheet, args.num)
        print(f"contact sheet: {args.sheet}", file=sys.stderr)


def _processing(model: Path | None) -> Any:
    if model is None:
        return None
    from metaembed_pl.model.model_folder import find_model_folder
    from metaembed_pl.model.processing import Processing

    return Processing.load(find_model_folder(model) / "processing")


def _folders(name: str) -> list[Any]:
    if "://" in name:
        return [name]
    found = sorted({path.parent for path in Path(name).rglob("*.tar")})
    return [folder for folder in found if not folder.name.endswith(".partial")] or [Path(name)]


def _tracked(name: str, numbers: Sequence[int]) -> Iterable[int]:
    return with_progress(numbers, name, len(numbers), things="pairs")


def _print_sources(summaries: list[dict[str, Any]]) -> None:
    for summary in summaries:
        licence = f", {summary['licence']}" if summary["licence"] else ""
        print(plain(f"{summary['folder']}: {summary['name']}{licence}"))
        counts = f"{summary['num_pairs']:,} in {summary['num_shards']:,} shards"
        print(f"  {'pairs':<12}{counts}, {summary['num_bad']:,} unusable")
        for fault in summary["bad"]:
            print(f"  {'':<12}{shortened(fault, 140)}")
        for side in ("queries", "candidates"):
            _print_side(side, summary[side])
        asked = ", ".join(f"{name} {n:,}" for name, n in (summary["questions"] or {}).items())
        print(f"  {'questions':<12}{asked or 'none'} (to each of {summary['num_candidates']:,})")
        differing = summary["differing_candidates"]
        if differing["count"]:
            pairs = "; ".join(" and ".join(two) for two in differing["pairs"])
            print(
                f"  {'':<12}{differing['count']:,} candidate ids stand for different candidates "
                f"(pairs {shortened(pairs, 100)}): give each candidate its own id"
            )
        negatives = ", ".join(f"{n}: {count:,}" for n, count in summary["num_negatives"].items())
        print(f"  {'negatives':<12}{negatives or 'none'} (number of them: pairs)")
        if summary["cut"] is not None:
            print(f"  {'cut':<12}{summary['cut']}")
        repeated = summary["repeated"]
        print(
            f"  {'repeated':<12}{repeated['queries']:,} queries, {repeated['pairs']:,} pairs, "
            f"{repeated['ids']:,} ids; {repeated['own_positive_as_negative']:,} pairs with their "
            "own positive among their negatives"
        )
        print()


def _print_side(side: str, summary: dict[str, Any]) -> None:
    items = ", ".join(f"{count:,} {shape}" for shape, count in summary["items"].items())
    print(f"  {side:<12}{items or 'none'}")
    formats = ", ".join(f"{n:,} {name}" for name, n in summary["picture_formats"].items())
    for name, values, after in (
        ("characters", summary["text_characters"], ""),
        ("width", summary["picture_width"], f" ({formats})"),
        ("height", summary["picture_height"], ""),
    ):
        if values:
            spread = ", ".join(f"{quantile} {value:,}" for quantile, value in values.items())
            print(f"  {'':<14}{name:<12}{spread}{after}")


def _print_shared(leaks: list[dict[str, Any]], num_folders: int) -> None:
    if num_folders < 2:
        return
    none = "no two folders share a text or a picture"
    print("shared by the queries and positives of two folders:" if leaks else none)
    for leak in leaks:
        print(
            f"  {leak['num_texts']:,} texts, {leak['num_pictures']:,} pictures, "
            f"{leak['num_pairs']:,} pairs: {' and '.join(leak['folders'])}"
        )
        for k, count in enumerate(leak["num_negatives_asked"]):
            if count:
                one, other = leak["folders"][k], leak["folders"][1 - k]
                print(f"    {count:,} hard negatives of {one} are asked for in {other}")
        for kind, ids in leak["examples"].items():
            print(f"    {kind}s of pairs such as {shortened(', '.join(ids), 100)}")


def _draw(surveys: "list[Survey]", path: Path, count: int) -> None:
    from metaembed_pl.evaluation.canvas import report_style, save_picture
    from metaembed_pl.evaluation.pairs_picture import draw_pairs
    from metaembed_pl.evaluation.sheet import Shown

    per_source = -(-count // len(surveys))
    rows = []
    for survey in surveys:
        for pair in _sample(survey.pairs, per_source):
            shown = [Shown(pair.positive, is_right=True, note=survey.pairs.name)]
            shown += [Shown(negative, is_right=False) for negative in pair.negatives[:6]]
            rows.append((pair.query, shown))
    if not rows:
        raise UserError("no pair could be drawn: none of their pictures decodes")
    with report_style():
        explanation = "Evenly spread over each folder; a green frame marks the positive."
        save_picture(draw_pairs("Pairs and their negatives", explanation, rows[:count]), path)


def _sample(pairs: "ShardedPairs", count: int) -> "Iterator[Pair]":
    """Pairs evenly spread over the shards; one that cannot be decoded is replaced by the next."""
    from metaembed_pl.data.collate import decoded

    for k in range(min(count, len(pairs))):
        first, end = k * len(pairs) // count, (k + 1) * len(pairs) // count
        for i in range(first, max(end, first + 1)):
            try:
                yield decoded(pairs[i])
                break
            except UserError:
                continue
