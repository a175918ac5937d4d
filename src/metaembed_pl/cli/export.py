"""`python -m metaembed_pl export`: convert a run to a folder or hub repository.

    python -m metaembed_pl export --run runs/custom --out custom            # the adapter, unchanged
    python -m metaembed_pl export --run runs/custom --out custom --merge    # complete weights
    python -m metaembed_pl export --run runs/custom --push-to ORG/NAME --merge

Formats: `metaembed` loads with `MetaEmbedder.from_pretrained`; `sentence-transformers` also with
its `MultiVectorEncoder`; `transformers` needs none of our code, and `vllm` adds the files that vLLM
needs (docs/export.md).
"""

import argparse
import re
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaembed_pl.cli.model import refuse_ignored
from metaembed_pl.cli.recipe_path import read_yaml
from metaembed_pl.data.remote import HUB_ID
from metaembed_pl.errors import UserError
from metaembed_pl.files import read_json_object

if TYPE_CHECKING:
    from metaembed_pl.model.embedder import MetaEmbedder

FORMATS = ("metaembed", "sentence-transformers", "transformers", "vllm")
PLAIN = ("transformers", "vllm")  # meta tokens are words of the vocabulary
COMPLETE = ("sentence-transformers", *PLAIN)  # formats without adapters
RUN = "runs/NAME, or a model folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the verb."""
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="FOLDER", dest="source", help=RUN)
    add(
        "--checkpoint",
        metavar="WHICH",
        help="best, last or a .ckpt file (default: the run's model/)",
    )
    add("--out", type=Path, metavar="FOLDER", help="where to write; must not exist")
    add("--merge", action="store_true", help="merge the adapter into the weights")
    add(
        "--width",
        type=int,
        metavar="W",
        help="keep the first W dimensions, of a model trained at that width",
    )
    add(
        "--format",
        choices=FORMATS,
        default="metaembed",
        help="the library that will load it (default: metaembed)",
    )
    add(
        "--push-to",
        metavar="ORG/NAME",
        help="upload it to the Hugging Face hub, as a private model",
    )
    add("--public", action="store_true", help="with --push-to: make the model public")
    add("--licence", metavar="ID", help="licence of the weights (default: the base model's)")
    add(
        "--language",
        action="append",
        default=[],
        metavar="CODE",
        help="language for the model card, such as en; repeatable",
    )
    add("--dry-run", action="store_true", help="with --push-to: show what would be sent")


def run(args: argparse.Namespace) -> None:
    """Write the folder, and upload it with --push-to."""
    from transformers.utils import logging

    from metaembed_pl.cli.hub import licence_of, push, would_send
    from metaembed_pl.files import new_folder

    _check(args)
    logging.disable_progress_bar()
    source = ExportSource(args.source)
    if args.checkpoint:
        source.metrics = {}  # the report is about the end of the run
    licence = args.licence
    if args.push_to:
        licence = licence or licence_of(source.base)
    with ExitStack() as stack:
        out = args.out or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model"
        with new_folder(out) as folder:
            settings = _write(args, source, folder, out)
            name = args.push_to or out.name
            cut_at = _max_text_tokens(folder)
            card = source.card(name, args.format, settings, licence, args.language, cut_at)
            (folder / "README.md").write_text(card, encoding="utf-8")
        if args.out:
            print(f"written to {args.out}")
        if args.dry_run:
            print(would_send(out, args.push_to, private=not args.public))
        elif args.push_to:
            print(f"uploaded to {push(out, args.push_to, private=not args.public)}")


def _check(args: argparse.Namespace) -> None:
    if args.out is None and args.push_to is None:
        raise UserError("nowhere to write to: give --out FOLDER, --push-to ORG/NAME or both")
    if args.out is not None and args.out.exists():
        raise UserError(f"{args.out} exists already: choose another --out")
    if args.push_to is not None and not HUB_ID.fullmatch(args.push_to):
        raise UserError(f"--push-to must be ORG/NAME, got {args.push_to!r}")
    if args.push_to is None:
        refuse_ignored(args, "only works with --push-to", "public", "dry_run")
    for code in args.language:
        if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|multilingual|code", code):
            raise UserError(f"--language takes a code such as en or zh, got {code!r}")


class ExportSource:
    """A run or a model folder: the place of the model, its recipe and metrics.

    Args:
        path: `runs/NAME` or a model folder.
    """

    def __init__(self, path: Path):
        self.run = path
        folders = [path, path / "model"]
        self.model = next((f for f in folders if (f / "metaembed.json").is_file()), None)
        config = path / "config.fit.yaml"
        if self.model is None and not config.is_file():
            raise UserError(
                f"{path} is neither a run nor a model folder: it has no metaembed.json, no model/ "
                "and no config.fit.yaml"
            )
        self.recipe = read_yaml(config) if config.is_file() else None
        metrics = path / "report" / "metrics.json"
        self.metrics = read_json_object(metrics) if metrics.is_file() else {}

    @property
    def base(self) -> str | None:
        """Hub id of the base model; None: a folder, random weights, or unknown."""
        model = (self.recipe or {}).get("model") or {}
        names = [model.get("start_from"), (model.get("backbone") or {}).get("path")]
        if self.model is not None:
            settings = read_json_object(self.model / "metaembed.json")
            names.append((settings.get("backbone") or {}).get("path"))
        hub = [
            name for name in names if name and HUB_ID.fullmatch(name) and not Path(name).exists()
        ]
        return hub[0] if hub else None

    def load(self, checkpoint: str | None) -> "MetaEmbedder":
        """The model, or that of a checkpoint."""
        from metaembed_pl.model.embedder import MetaEmbedder

        if checkpoint is not None:
            return _of_checkpoint(self.run, checkpoint, self.recipe)
        if self.model is None:
            raise UserError(
                f"{self.run} has no model/ yet: let the run end, or give --checkpoint last"
            )
        return MetaEmbedder.from_pretrained(self.model)

    @property
    def datasets(self) -> list[str]:
        """Hub ids of the training sets, from the manifests of their shards."""
        sources = ((self.recipe or {}).get("data") or {}).get("train") or []
        paths = [source.get("path") if isinstance(source, dict) else source for source in sources]
        manifests = [Path(str(path)) / "manifest.json" for path in paths]
        found = [read_json_object(file).get("source") for file in manifests if file.is_file()]
        return list(dict.fromkeys(s for s in found if s and HUB_ID.fullmatch(s)))

    def card(
        self,
        name: str,
        form: str,
        settings: dict[str, Any],
        licence: str | None,
        languages: list[str],
        max_text_tokens: int,
    ) -> str:
        """The README of what is exported."""
        from metaembed_pl.model.model_card import model_card

        parts = ("model", "data", "trainer")  # the rest is about this machine
        recipe = {key: value for key, value in (self.recipe or {}).items() if key in parts}
        facts = self.metrics, recipe, self.base, licence, self.datasets, languages
        return model_card(name, form, settings, *facts, max_text_tokens)


def _max_text_tokens(folder: Path) -> int:
    """The length at which an exported model truncates texts."""
    files = [folder / "processing" / "processing.json", folder / "retrieval.json"]
    return next(read_json_object(file) for file in files if file.is_file())["max_text_tokens"]


def _of_checkpoint(run: Path, name: str, recipe: dict[str, Any] | None) -> "MetaEmbedder":
    """The model of a checkpoint, built from the run's recipe."""
    import pickle

    import torch
    from jsonargparse import ArgumentParser

    from metaembed_pl.training.module import MetaEmbedModule
    from metaembed_pl.training.strategy import consolidated

    file = run / "checkpoints" / f"{name}.ckpt" if name in ("best", "last") else Path(name)
    if recipe is None:
        raise UserError(
            f"{run} has no config.fit.yaml: a checkpoint alone does not identify its model"
        )
    if not file.exists():
        known = sorted(one.stem for one in (run / "checkpoints").glob("*.ckpt"))
        raise UserError(f"there is no {file}; checkpoints of {run}: {', '.join(known) or 'none'}")
    try:
        if file.is_dir():
            saved = consolidated(file)
        else:
            saved = torch.load(file, map_location="cpu", weights_only=True)
        state = saved["state_dict"]
    except (OSError, pickle.UnpicklingError, KeyError, RuntimeError) as error:
        raise UserError(f"{file}: not a checkpoint that can be read: {error}") from error
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(MetaEmbedModule, "model")
    parsed = parser.parse_object({"model": recipe["model"]})
    module: MetaEmbedModule = parser.instantiate_classes(parsed)["model"]
    module.configure_model()
    try:
        module.on_load_checkpoint(saved)
    except UserError as error:
        raise UserError(f"{file}: not a checkpoint of the recipe in {run}: {error}") from error
    module.load_state_dict(state, strict=module.strict_loading)
    return module.embedder.eval()


def _write(
    args: argparse.Namespace, source: ExportSource, folder: Path, home: Path
) -> dict[str, Any]:
    """Writes the format, prints the result of its checks, and returns the model's settings."""
    from metaembed_pl.model import export
    from metaembed_pl.model.export_sentence_transformers import write_sentence_transformers
    from metaembed_pl.model.export_transformers import write_transformers
    from metaembed_pl.model.export_vllm import write_vllm
    from metaembed_pl.model.lora import has_adapter
    from metaembed_pl.model.model_folder import read_settings

    is_complete = source.model is not None and not (source.model / "adapter").is_dir()
    as_it_is = not args.merge and args.checkpoint is None and args.format not in PLAIN
    as_it_is = as_it_is and args.width is None
    if as_it_is and source.model is not None and (args.format == "metaembed" or is_complete):
        export.copy_model(source.model, folder)
        settings = read_settings(folder)
    else:
        model = source.load(args.checkpoint)
        if args.width is not None:
            model.narrow(args.width)
        settings = model.settings()
        if args.merge or (args.format in COMPLETE and has_adapter(model.backbone)):
            print(f"merged: {export.merge(model)}")
        if args.format in PLAIN:
            write = write_vllm if args.format == "vllm" else write_transformers
            print(f"read back by plain transformers: {write(model, folder)}")
        else:
            model.write_into(folder, home)
    if args.format == "sentence-transformers":
        write_sentence_transformers(folder)
    return settings
