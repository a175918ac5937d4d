"""Benchmarks by name: those of mmeb.py and vidore.py, and a user's own folders.

`beir:DIR` and `pairs:DIR` take a folder with one set or several; `mteb:NAME` a benchmark or task of
mteb.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path

from metaembed_pl.data.beir import is_retrieval_set
from metaembed_pl.errors import UserError
from metaembed_pl.evaluation.benchmarks import Benchmark, Task
from metaembed_pl.evaluation.mmeb import MMEB, MMEB_V2
from metaembed_pl.evaluation.vidore import VIDORE_V1, VIDORE_V2, VIDORE_V3

OF_MTEB = {"vidore_v3.1": "ViDoRe(v3.1)", "jina_vdr": "JinaVDR"}
"""Benchmarks that mteb loads, by their names on our command line."""
NAMED = {one.name: one for one in (MMEB, MMEB_V2, VIDORE_V1, VIDORE_V2, VIDORE_V3)}


def open_benchmark(name: str, data: Path) -> Benchmark:
    """A benchmark by its name, its files checked.

    Args:
        name: one of `NAMED` or `OF_MTEB`, `beir:DIR`, `pairs:DIR` or `mteb:NAME`.
        data: the folder of all data.

    Raises:
        UserError: there is no such benchmark, or its files are missing.
    """
    kind, colon, folder = name.partition(":")
    if colon and kind in ("beir", "pairs"):
        return _of_folder(name, kind, Path(folder))
    if name in OF_MTEB or (colon and kind == "mteb"):
        from metaembed_pl.evaluation.mteb_tasks import mteb_benchmark

        return mteb_benchmark(OF_MTEB.get(name, folder))
    if name not in NAMED:
        near = difflib.get_close_matches(name, NAMED, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(
            f"there is no benchmark {name!r}{hint}; known are {', '.join((*NAMED, *OF_MTEB))}, "
            "beir:DIR, pairs:DIR and mteb:NAME"
        )
    NAMED[name].check_files(data)
    return NAMED[name]


def _of_folder(name: str, kind: str, folder: Path) -> Benchmark:
    """A benchmark of a user's own sets."""
    metric = "ndcg@10" if kind == "beir" else "recall@1"
    found = [path for path in (folder, *_subfolders(folder)) if _is(kind, path)]
    if not found:
        expected = "corpus.jsonl" if kind == "beir" else "*.tar"
        raise UserError(f"{name}: expected {expected} in {folder} or in a folder right below it")
    tasks = tuple(Task(_name(path), str(path.resolve()), metric) for path in found)
    return Benchmark(name, _name(folder), tasks)


def _name(folder: Path) -> str:
    """The name of the folder itself: several links may lead to the same folder."""
    return folder.absolute().name if folder.name != ".." else folder.resolve().name


def _subfolders(folder: Path) -> Sequence[Path]:
    return sorted(path for path in folder.glob("*/") if path.is_dir())


def _is(kind: str, folder: Path) -> bool:
    return is_retrieval_set(folder) if kind == "beir" else any(folder.glob("*.tar"))
