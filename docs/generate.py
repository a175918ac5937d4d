"""Pages of the site that are made from the code: commands, recipe keys, the Python reference.

A hook of mkdocs.yml; `make docs` runs it.
"""

import argparse
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docstring_parser import parse
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from metaembed_pl.cli import TRAINING_VERBS, VERBS
from metaembed_pl.cli.recipe_keys import PARTS, content_of, in_words, keys_of

ROOT = Path(__file__).parent.parent
PYTHON = {
    "Items and budgets": ["item.Item", "item.Pair", "item.read_pairs", "budget.Budget"],
    "Shards": ["data.shards.ShardWriter", "data.shards.ShardedPairs"],
    "Models": ["model.embedder.MetaEmbedder", "model.export_vllm.VllmPrompts"],
    "Stores and search": [
        "retrieval.store.Store",
        "retrieval.cascade.Hits",
        "retrieval.calibration.measure",
        "retrieval.calibration.choose",
        "retrieval.index_build.build",
        "retrieval.index_build.extend",
        "retrieval.projection.Projection",
        "retrieval.qdrant.store.QdrantStore",
    ],
    "Late interaction": ["late_interaction.maxsim", "late_interaction.nested_scores"],
    "Training": ["training.loss.MMRLoss", "training.metrics.RetrievalMetrics"],
    "Evaluation": [
        "ranking.rank",
        "ranking.metrics_of_ranks",
        "data.beir.RetrievalSetWriter",
        "data.beir.read_retrieval_set",
        "evaluation.mteb.MtebEncoder",
    ],
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {
        "quickstart.md": notebook(ROOT / "docs/quickstart.ipynb"),
        "reference/commands.md": commands(),
        "reference/recipe-keys.md": recipe_keys(),
        "reference/python.md": python(),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text().replace("](docs/", "]("),
    }
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def notebook(path: Path) -> str:
    """A notebook as a page: its cells with the outputs that are saved in it."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            image = output.get("data", {}).get("image/png")
            text = "".join(output.get("text", []))
            parts.append(
                f'<img alt="output" src="data:image/png;base64,{image.strip()}">'
                if image
                else f"```text\n{text}```"
            )
    parts.insert(1, f"[Download this page as a notebook]({path.name})")
    return "\n\n".join(parts) + "\n"


def commands() -> str:
    """Every verb with its flags, as `--help` prints them."""
    lines = [
        "# Commands",
        "",
        "`python -m metaembed_pl VERB`, or `metaembed-pl VERB`. Every verb takes `--help`, and "
        "`--debug` for the traceback of an error.",
    ]
    for name, does in TRAINING_VERBS.items():
        lines += ["", f"## {name}", "", f"{_sentence(does)} Its flags are the [recipe keys]"]
        flag = "trainer.max_steps=10" if name == "fit" else "ckpt_path last"
        lines[-1] += f"(recipe-keys.md): `metaembed-pl {name} --config R --{flag}`."
    for name, does in VERBS.items():
        lines += ["", f"## {name}", "", _sentence(does)]
        parser = argparse.ArgumentParser(prog=f"metaembed-pl {name}", add_help=False)
        importlib.import_module(f"metaembed_pl.cli.{name}").add_arguments(parser)
        lines += _of_parser(parser)
    return "\n".join(lines) + "\n"


def _of_parser(parser: argparse.ArgumentParser) -> Iterator[str]:
    rows, verbs = [], {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            verbs = action.choices
        elif not isinstance(action, argparse._HelpAction):
            name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
            value = f" {action.metavar or ''}".rstrip() if action.option_strings else ""
            if action.choices and not action.metavar:
                value = " {" + ",".join(map(str, action.choices)) + "}"
            said = (action.help or "") % {**vars(action), "prog": parser.prog}
            rows.append(f"| `{name}{value}` | {_cell(said)} |")
    if rows:
        yield from ("", "| argument | meaning |", "|---|---|", *rows)
    for name, verb in verbs.items():
        yield from ("", f"### {parser.prog.split()[-1]} {name}")
        yield from _of_parser(verb)


def recipe_keys() -> str:
    """Every key of a recipe with its type, default and meaning, from the classes it fills."""
    lines = [
        "# Recipe keys",
        "",
        "Each key of a recipe is also a flag: `--model.loss.temperature=0.05`. "
        "`trainer` holds the arguments of "
        "[Lightning's Trainer](https://lightning.ai/docs/pytorch/stable/common/trainer.html).",
    ]
    known: dict[Any, str] = {}
    for part, kind in PARTS.items():
        if part != "trainer":
            lines += _of_class(part, kind, known)
    return "\n".join(lines) + "\n"


def _of_class(path: str, kind: Any, known: dict[Any, str]) -> Iterator[str]:
    yield from ("", f"## {path}", "")
    if kind in known:
        yield f"The keys of `{known[kind]}`."
        return
    known[kind] = path
    yield from ("| key | type | default | meaning |", "|---|---|---|---|")
    meanings = _meanings(kind)
    inner = []
    for key, hint in keys_of(kind).items():
        default = inspect.signature(kind).parameters[key].default
        made_of, is_list = content_of(hint)
        if made_of is not None:
            inner.append((f"{path}.{key}[]" if is_list else f"{path}.{key}", made_of))
        shown = "required" if default is inspect.Parameter.empty else _as_yaml(default)
        said = in_words(hint) if made_of is None else ("list of keys" if is_list else "keys")
        meaning = meanings.get(key, "").replace("None", "null")
        yield f"| `{key}` | {said} | {shown} | {_cell(meaning)} |"
    for name, made_of in inner:
        yield from _of_class(name, made_of, known)


def _as_yaml(default: Any) -> str:
    return "" if "factory" in repr(default) else f"`{json.dumps(default)}`"


def _meanings(kind: Any) -> dict[str, str]:
    """The `Args` of a class and its bases; of a class that refers to another, that one's."""
    docs = (each.__dict__.get("__doc__") or "" for each in reversed(inspect.getmro(kind)))
    found = {p.arg_name: p.description or "" for doc in docs for p in parse(doc).params}
    if not found and (other := re.search(r"See `(\w+)`", kind.__doc__ or "")):
        home = inspect.getmodule(kind)
        return _meanings(getattr(home, other[1]))
    return found


def python() -> str:
    """The public Python API; mkdocstrings fills it in."""
    lines = ["# Python", "", "`from metaembed_pl import Budget, Item, MetaEmbedder, Pair, Store`"]
    for title, names in PYTHON.items():
        lines += ["", f"## {title}"]
        for name in names:
            lines += ["", f"::: metaembed_pl.{name}"]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    is_word = re.match(r"[a-z]+ ", text)  # not a value, such as cpu, or a name, such as runs/NAME
    return text[:1].upper() + text[1:] if is_word else text


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."
