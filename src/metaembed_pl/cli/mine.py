"""`python -m metaembed_pl mine`: hard negatives for shards, found by a trained model.

    python -m metaembed_pl mine --model runs/emoji/model --shards data/emoji/train/emoji_t2i \
        --out data/emoji_mined --num-negatives 4 --ratio 0.95

Writes new shards with scores to OUT/NAME, and OUT/report: counts of found and skipped candidates
(mined.json) and examples (mined.png). Several processes share the work:

    torchrun --nproc-per-node 8 -m metaembed_pl mine ...
"""

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaembed_pl.cli.model import (
    add_model_arguments,
    add_pace_arguments,
    check_at_least,
    load_model,
    pace_of,
    refuse_ignored,
    report_truncation,
)
from metaembed_pl.errors import UserError
from metaembed_pl.progress import with_progress

if TYPE_CHECKING:
    from metaembed_pl.cli.mine_report import MiningReport
    from metaembed_pl.data.collate import Instructions
    from metaembed_pl.data.shards import ShardedPairs
    from metaembed_pl.item import Item, Pair
    from metaembed_pl.model.embedder import MetaEmbedder
    from metaembed_pl.model.encoding import Pace
    from metaembed_pl.retrieval.mining import Corpus, Mined, Miner, Rules
    from metaembed_pl.retrieval.store import Store

NUM_EXAMPLES = 12
DIGITS = 6
"""Of a saved score."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the verb."""
    add = parser.add_argument
    add_model_arguments(parser)
    add("--shards", nargs="+", required=True, metavar="FOLDER", help="pairs to mine for")
    add(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="folder for OUT/NAME and OUT/report",
    )
    add(
        "--corpus",
        nargs="+",
        default=[],
        metavar="PATH",
        help="more candidates, besides the positives of the same shards: folders of shards or of "
        "images, or JSON Lines of items",
    )
    add(
        "--num-negatives",
        nargs="+",
        default=["4"],
        metavar="N",
        help="hard negatives per query; NAME=N for the shards of that name (default: 4)",
    )
    add(
        "--skip-top",
        type=int,
        default=0,
        metavar="N",
        help="skip the N best-scoring candidates (default: 0)",
    )
    add(
        "--margin",
        type=float,
        metavar="M",
        help="skip candidates scoring above (positive score - M), in cosine units (default: no "
        "such limit)",
    )
    add(
        "--ratio",
        type=float,
        default=0.95,
        metavar="R",
        help="skip candidates scoring above R times the positive's score; inf: no limit "
        "(default: 0.95)",
    )
    add("--depth", type=int, default=100, metavar="N", help="candidates to rank (default: 100)")
    add("--budget", metavar="RQxRC[xD]", help="rank at this budget (default: all vectors)")
    add("--cascade", metavar="STAGES", help="rank in stages, such as 16x1:2000,4x8:100")
    add(
        "--target-recall",
        type=float,
        metavar="R",
        help="rank with an index that finds this share of the exact ranking's first --depth "
        "candidates; for corpora of 100,000 candidates and more",
    )
    add("--keep", action="store_true", help="keep existing hard negatives, before the new ones")
    add(
        "--instruction",
        metavar="TEXT",
        help="instruction that the model was trained with, for queries",
    )
    add("--candidate-instruction", metavar="TEXT", help="the same for candidates")
    add("--store", type=Path, metavar="FOLDER", help="keep the embedded corpora here, for reuse")
    add_pace_arguments(parser)
    add("--overwrite", action="store_true", help="replace existing mined shards")


def run(args: argparse.Namespace) -> None:
    """Mine each folder of shards, and report."""
    from metaembed_pl.data.collate import Instructions
    from metaembed_pl.data.shards import ShardedPairs

    # Cheap checks come first: encoding takes hours.
    sources = [ShardedPairs(folder) for folder in args.shards]
    rules = _rules(args, [source.name for source in sources])
    instructions = Instructions(args.instruction, args.candidate_instruction)
    check_at_least(args, 1, "depth")
    pace_of(args)
    if sum(given is not None for given in (args.budget, args.cascade, args.target_recall)) > 1:
        raise UserError("give only one of --budget, --cascade and --target-recall")
    if args.cascade:
        refuse_ignored(args, "is set by the last stage of --cascade: leave it out", depth=100)
    if args.target_recall is not None:
        if not 0 < args.target_recall <= 1:
            raise UserError(
                f"--target-recall must be above 0 and at most 1, got {args.target_recall}"
            )
        from metaembed_pl.retrieval.index import faiss_module

        faiss_module()
    extra = [_read_corpus(path) for path in args.corpus]
    for folder in (args.out / source.name for source in sources):
        if folder.exists() and not args.overwrite:
            raise UserError(f"{folder} exists already: choose another --out, or --overwrite")
    with redirect_stdout(sys.stderr):
        reports = _mine_all(args, sources, rules, extra, instructions)
    for report in reports:
        print(report.line())
    if reports:
        print(f"report: {args.out / 'report'}")


def _rules(args: argparse.Namespace, names: list[str]) -> "dict[str, Rules]":
    from metaembed_pl.retrieval.mining import Rules

    if len(set(names)) < len(names):
        raise UserError(f"the names of the shards must differ, got {', '.join(names)}")
    counts = dict.fromkeys(names, 4)
    for given in args.num_negatives:
        name, _, number = given.rpartition("=")
        if not number.isdecimal() or (name and name not in counts):
            raise UserError(
                f"--num-negatives takes a number, or NAME=N with one of {', '.join(names)}; got "
                f"{given!r}"
            )
        counts |= dict.fromkeys([name] if name else names, int(number))
    limits = args.skip_top, args.margin, args.ratio
    return {name: Rules(count, *limits) for name, count in counts.items()}


def _read_corpus(path: str) -> "Sequence[Item] | ShardedPairs":
    from metaembed_pl.data.remote import is_remote
    from metaembed_pl.data.shards import ShardedPairs
    from metaembed_pl.item import read_items

    if is_remote(path) or any(Path(path).glob("*.tar")):
        return ShardedPairs(path)
    return read_items(Path(path))


def _mine_all(
    args: argparse.Namespace,
    sources: "list[ShardedPairs]",
    rules: "dict[str, Rules]",
    extra: "list[Sequence[Item] | ShardedPairs]",
    instructions: "Instructions",
) -> "list[MiningReport]":
    """Reports of all sources, on rank 0."""
    from metaembed_pl.budget import check_budget
    from metaembed_pl.cli.mine_report import MiningReport, save_report
    from metaembed_pl.ranks import connected_ranks
    from metaembed_pl.retrieval.cascade import parse_cascade
    from metaembed_pl.retrieval.mining import Corpus, Miner

    # The same folder for all processes, and for a resumed run.
    out = args.out.resolve()
    stores = args.store or out.with_name(f".{out.name}.stores")
    with connected_ranks() as (rank, _):
        model = load_model(args)
        if args.cascade:
            parse_cascade(args.cascade, model.groups, model.widths)
        else:
            check_budget(args.budget or model.groups[-1], model.groups, model.widths)
        reports = []
        for pairs in sources:
            corpus = Corpus([pairs, *extra], instructions)
            store = _embedded(model, stores / pairs.name, corpus, pace_of(args))
            miner = Miner(
                model,
                store,
                corpus,
                pairs,
                rules[pairs.name],
                budget=args.budget,
                cascade=args.cascade,
                depth=args.depth,
                instructions=instructions,
            )
            if args.target_recall is not None:
                _rank_cheaply(miner, args)
            results = _results(miner, pairs, args.batch_size)
            if rank == 0:
                report = MiningReport(pairs, corpus, -(-NUM_EXAMPLES // len(sources)))
                _write(args, pairs, corpus, rules[pairs.name], report, results)
                reports.append(report)
            else:
                assert not list(results), "only rank 0 gets results"
        report_truncation(model)
        if rank == 0:
            save_report(args.out / "report", reports)
            if args.store is None:
                shutil.rmtree(stores)
        return reports


def _embedded(model: "MetaEmbedder", folder: Path, corpus: "Corpus", pace: "Pace") -> "Store":
    """The store of a corpus; all processes embed the missing items."""
    from metaembed_pl.ranks import wait_for_ranks
    from metaembed_pl.retrieval.embedding import embed
    from metaembed_pl.retrieval.store import Store

    folder.parent.mkdir(parents=True, exist_ok=True)
    store = Store.open_for(model, folder)  # waits for all ranks
    steps = embed(store, model, corpus.entries(), pace, skip_bad=True, previews=False)
    does = f"embedding {folder.name}"
    for status in with_progress(
        steps, does, len(corpus), lambda status: status.seen, things="candidates"
    ):
        skipped = status.skipped
        if status.changed:
            raise UserError(
                f"{folder} holds vectors of other candidates or instructions, such as of "
                f"{status.changed[0]!r}: remove it, or give another --store"
            )
    if skipped:
        print(f"{len(skipped)} candidates cannot be read, the first: {skipped[0]}", file=sys.stderr)
    wait_for_ranks()
    return Store.open(folder)


def _results(
    miner: "Miner", pairs: "ShardedPairs", batch_size: int
) -> "Iterator[tuple[int, Mined | str]]":
    """The results of all pairs in order, on rank 0; each process mines its share."""
    from metaembed_pl.ranks import gather_objects, rank_and_world

    rank, world = rank_and_world()
    starts = range(0, len(pairs), world * batch_size)

    def seen(start: int) -> int:
        return min(start + world * batch_size, len(pairs))

    does = f"mining {pairs.name}"
    for start in with_progress(starts, does, len(pairs), seen, things="queries"):
        first = min(start + rank * batch_size, len(pairs))
        numbers = range(first, min(first + batch_size, len(pairs)))
        found = list(zip(numbers, miner.mine(numbers), strict=True))
        for part in gather_objects(found):
            yield from part


def _rank_cheaply(miner: "Miner", args: argparse.Namespace) -> None:
    """Index the corpus, and choose the cheapest search that reaches the target recall."""
    import torch.distributed as dist

    from metaembed_pl.cli.index import indexed
    from metaembed_pl.ranks import rank_and_world
    from metaembed_pl.retrieval.calibration import NUM_QUERIES, plan_name
    from metaembed_pl.retrieval.mining import stages_for
    from metaembed_pl.samples import evenly_spread

    rank, world = rank_and_world()
    chosen: list[Any] = [None]
    if rank == 0:
        indexed(miner.store)
        queries = miner.queries(evenly_spread(len(miner.pairs), NUM_QUERIES))
        stages, recall = stages_for(miner.store, queries, args.depth, args.target_recall)
        print(
            f"{miner.pairs.name}: ranked by {plan_name(stages)}, which finds {recall:.3f} of the "
            f"first {args.depth} of the exact ranking, by {len(queries)} of its queries",
            file=sys.stderr,
        )
        chosen = [stages]
    if world > 1:
        dist.broadcast_object_list(chosen)
    miner.rank_by(chosen[0])


def _write(
    args: argparse.Namespace,
    pairs: "ShardedPairs",
    corpus: "Corpus",
    rules: "Rules",
    report: "MiningReport",
    results: "Iterator[tuple[int, Mined | str]]",
) -> None:
    from metaembed_pl.data.shards import ShardWriter

    manifest = pairs.manifest
    described = {key: manifest.get(key, "") for key in ("licence", "attribution", "source", "note")}
    mined = asdict(rules) | {"model": str(args.model), "corpus": args.corpus, "keep": args.keep}
    settings = {**manifest.get("settings", {}), "mined": mined}
    folder = args.out / pairs.name
    with ShardWriter(
        folder, pairs.name, settings=settings, overwrite=args.overwrite, **described
    ) as writer:
        for i, result in results:
            report.note(i, result)
            if not isinstance(result, str):
                writer.write(_with_negatives(pairs[i], result, corpus, args.keep))


def _with_negatives(pair: "Pair", mined: "Mined", corpus: "Corpus", keep: bool) -> "Pair":
    # Rounded, so that the last bits, which depend on the machine, do not change the shards.
    negatives = tuple(replace(corpus[row], score=round(s, DIGITS)) for row, s in mined.negatives)
    old = pair.negatives if keep else ()
    positive = replace(pair.positive, score=round(mined.own, DIGITS))
    return replace(pair, positive=positive, negatives=(*old, *negatives))
