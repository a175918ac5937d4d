"""`python -m metaembed_pl evaluate`: a model on a benchmark at every budget, with a report.

    python -m metaembed_pl evaluate --model runs/emoji/model --benchmark pairs:data/emoji/test
    torchrun --nproc-per-node 8 -m metaembed_pl evaluate --model M --benchmark mmeb --out results/m
    python -m metaembed_pl evaluate compare results/a results/b --budgets 4x8,16x64

The table goes to standard output, everything else into the folder of --out: docs/evaluation.md.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaembed_pl.cli.model import (
    add_model_arguments,
    add_pace_arguments,
    load_model,
    pace_of,
    refuse_ignored,
    report_truncation,
)
from metaembed_pl.errors import UserError, first_line
from metaembed_pl.files import write_text
from metaembed_pl.progress import Progress

if TYPE_CHECKING:
    from metaembed_pl.evaluation.encoding import OnProgress
    from metaembed_pl.evaluation.outcome import Outcome

DATA = Path("data")
BENCHMARKS = (
    "mmeb, mmeb_v2, vidore_v1, vidore_v2, vidore_v3, vidore_v3.1, jina_vdr, beir:DIR, pairs:DIR, "
    "mteb:NAME"
)
OF_OUR_MODELS = ("revision", "dtype", "compile", "chunk_tokens", "workers")
OF_EVALUATING = (
    *("model", "device", "vectors", "benchmark", "budgets", "out", "bm25", "mlflow_uri"),
    *OF_OUR_MODELS,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the verb."""
    add = parser.add_argument
    others = "; or sentence-transformers:NAME or mteb:NAME, a model of another library"
    add_model_arguments(parser, required=False, others=others)
    add(
        "--vectors",
        metavar="RQxRC",
        help="maximum number of vectors per query and candidate, for models of other libraries "
        "(default: 64x1024)",
    )
    add("--benchmark", metavar="NAME", help=f"one of {BENCHMARKS}")
    add(
        "--budgets",
        metavar="RQxRC[xD],...",
        help="query x candidate vectors to use, x first dimensions of each (default: all trained "
        "budgets)",
    )
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder to write to (default: evaluations/BENCHMARK-MODEL)",
    )
    add(
        "--data",
        type=Path,
        default=DATA,
        metavar="DIR",
        help="folder of the benchmarks' files (default: data)",
    )
    add_pace_arguments(parser)
    add(
        "--store-dtype",
        choices=("bf16", "fp32", "fp16", "int8"),
        default="bf16",
        help="dtype of the stored vectors; fp32 doubles the disk space (default: bf16)",
    )
    add("--bm25", action="store_true", help="also evaluate BM25 on the candidates' texts")
    add("--mlflow-uri", metavar="URI", help="log metrics and pictures to this MLflow server")
    verbs = parser.add_subparsers(metavar="[compare A B]")
    compare = verbs.add_parser(
        "compare",
        help="compare two evaluations query by query: is the difference significant?",
        description="Compare two evaluations of the same benchmark, query by query.",
    )
    add = compare.add_argument
    add("first", type=Path, metavar="A", help="folder of an evaluation")
    add(
        "second",
        type=Path,
        metavar="B",
        help="folder of another, or the same one for another budget",
    )
    add(
        "--budgets",
        dest="sides",
        metavar="BUDGET[,BUDGET]",
        help="budgets of A and B (default: the largest of each)",
    )
    add("--metric", metavar="NAME", help="metric to compare (default: that of each task)")
    # The verb's own `run` is set for the parser above: it asks for this one.
    compare.set_defaults(compare=True)


def run(args: argparse.Namespace) -> None:
    """Evaluate, or compare two evaluations."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if getattr(args, "compare", False):
        changed = {"attention": "sdpa", "data": DATA, "batch_size": 32, "store_dtype": "bf16"}
        refuse_ignored(args, "is not for `evaluate compare`", *OF_EVALUATING, **changed)
        _compare(args)
        return
    # Results alone go to standard output, whatever libraries have to say meanwhile.
    with redirect_stdout(sys.stderr):
        outcome = _evaluate(args)
    if outcome is not None:
        from metaembed_pl.evaluation.tables import overview

        print(overview(outcome))


def _evaluate(args: argparse.Namespace) -> "Outcome | None":
    # What costs nothing to check comes first: loading a model takes seconds, encoding hours.
    for name in ("model", "benchmark"):
        if getattr(args, name) is None:
            raise UserError(f"evaluate needs --{name}; benchmarks are {BENCHMARKS}")
    pace = pace_of(args)
    if args.benchmark.startswith(("beir:", "pairs:")):
        refuse_ignored(args, f"is not for {args.benchmark}, which names its folder", data=DATA)
    from metaembed_pl.evaluation.registry import open_benchmark

    benchmark = open_benchmark(args.benchmark, args.data)
    from metaembed_pl.evaluation.run import EvaluationOptions, evaluate, parse_budgets
    from metaembed_pl.model.identity import identity_of
    from metaembed_pl.ranks import connected_ranks

    with connected_ranks() as (rank, _):
        if rank:
            logging.disable(logging.INFO)
        bm25 = _bm25_means(benchmark, args.data) if args.bm25 and not rank else {}
        model = _load(args)
        budgets = parse_budgets(args.budgets or "all", model.groups, model.widths)
        name = benchmark.name.replace(":", "-").replace("/", "-").strip("-.")
        out = args.out or Path("evaluations") / f"{name}-{identity_of(model)[:8]}"
        with _progress(rank) as on_progress:
            settings = EvaluationOptions(args.data, out, pace, args.store_dtype, on_progress)
            outcome = evaluate(model, benchmark, budgets, settings)
        report_truncation(model)
        if outcome is not None:
            if bm25:
                benchmark = _with_bm25(benchmark, bm25, out)
            _report(outcome, benchmark, model, args, out)
        return outcome


def _load(args: argparse.Namespace) -> Any:
    """Our model, or another in its place."""
    from metaembed_pl.budget import Budget
    from metaembed_pl.cli.model import find_device
    from metaembed_pl.evaluation.baselines import is_baseline, load_baseline

    vectors = Budget.parse(args.vectors) if args.vectors else None
    if is_baseline(args.model):
        refuse_ignored(args, f"is not for {args.model}", *OF_OUR_MODELS, attention="sdpa")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                f"{args.model} can only be evaluated in one process: start it without torchrun"
            )
        return load_baseline(args.model, find_device(args.device), vectors)
    refuse_ignored(
        args, "is for sentence-transformers:NAME and mteb:NAME: use --budgets", "vectors"
    )
    return load_model(args)


def _report(
    outcome: "Outcome", benchmark: Any, model: Any, args: argparse.Namespace, out: Path
) -> None:
    from metaembed_pl.evaluation.outcome import RESULTS
    from metaembed_pl.evaluation.report import write_report
    from metaembed_pl.model.embedder import MetaEmbedder

    pools = [task.open(args.data) for task in benchmark.tasks]
    ours = model if isinstance(model, MetaEmbedder) else None  # no maps of others' attention
    files = [*write_report(outcome, pools, out, benchmark.references, ours), out / RESULTS]
    logging.getLogger(__name__).info("report: %s", out / "report.html")
    if args.mlflow_uri:
        _log(outcome, files, args.mlflow_uri)


def _bm25_means(benchmark: Any, data: Path) -> dict[str, dict[str, float]]:
    """The metrics of BM25 by task: before the model, since sets without texts are refused."""
    from metaembed_pl.evaluation.bm25 import bm25_metrics

    means = {}
    for task in benchmark.tasks:
        values = bm25_metrics(task.open(data))
        means[task.name] = {name: sum(row) / len(row) for name, row in values.items()}
        score = means[task.name][task.metric]
        logging.getLogger(__name__).info("BM25: %s, %s %.3f", task.name, task.metric, score)
    return means


def _with_bm25(benchmark: Any, means: dict[str, dict[str, float]], out: Path) -> Any:
    """The benchmark with one more row to compare with, kept in `bm25.json`."""
    from dataclasses import replace

    from metaembed_pl.evaluation.bm25 import bm25_reference

    write_text(out / "bm25.json", json.dumps(means, indent=2) + "\n")
    scores = {task.name: means[task.name][task.metric] for task in benchmark.tasks}
    return replace(benchmark, references=(*benchmark.references, bm25_reference(scores)))


def _log(outcome: "Outcome", files: list[Path], uri: str) -> None:
    """One MLflow run: every mean, what they depend on, the report and its pictures."""
    from metaembed_pl.training.tracking import mlflow_missing, mlflow_name

    if mlflow_missing():
        raise UserError("--mlflow-uri needs MLflow: pip install metaembed-pl[mlflow]")
    import mlflow

    try:
        mlflow.set_tracking_uri(uri)
        mlflow.set_experiment("metaembed-evaluation")
        with mlflow.start_run(run_name=outcome.benchmark):
            mlflow.log_params({key: str(value)[:500] for key, value in outcome.about.items()})
            mlflow.log_metrics({mlflow_name(name): v for name, v in outcome.metrics().items()})
            for file in files:
                mlflow.log_artifact(str(file))
    except Exception as error:  # whatever a server or a network may do
        logging.getLogger(__name__).warning(
            "MLflow at %s cannot be reached (%s): the report is saved; run it again to log it",
            uri,
            first_line(error)[:200],
        )


@contextmanager
def _progress(rank: int) -> "Iterator[OnProgress]":
    """Shows progress, on the first rank."""
    if rank:
        yield lambda what, done, total: None
        return
    with Progress("", 0) as progress:

        def on_progress(what: str, done: int, total: int) -> None:
            progress.begin("ranking" if what == "budgets" else "encoding", total, what)
            progress.update(done)

        yield on_progress


def _compare(args: argparse.Namespace) -> None:
    from metaembed_pl.evaluation.outcome import Outcome, by_task
    from metaembed_pl.evaluation.statistics import compare
    from metaembed_pl.evaluation.tables import comparison

    sides = [Outcome.load(args.first), Outcome.load(args.second)]
    given = args.sides.split(",") if args.sides else [side.budgets[-1] for side in sides]
    if len(given) not in (1, 2):
        raise UserError(f"--budgets takes one budget or two, got {args.sides!r}")
    budgets = [given[0], given[-1]]
    for task, other in zip(*(side.tasks for side in sides), strict=False):
        if task.name == other.name and task.data != other.data:
            raise UserError(f"{task.name}: the two evaluations used different data")
    first, second = (
        by_task(side, budget, args.metric) for side, budget in zip(sides, budgets, strict=True)
    )
    found = compare(first, second)
    each = {name: compare({name: first[name]}, {name: second[name]}) for name in first}
    names = [f"{args.first} at {budgets[0]}", f"{args.second} at {budgets[1]}"]
    print(comparison(found, each, names))
