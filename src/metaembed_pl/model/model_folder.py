"""The model folder on disk: what a MetaEmbedder saves and loads.

`metaembed.json` (settings), `meta_tokens.safetensors` (meta tokens and projection), `processing/`
(tokenizer, image processor, prompt), and the backbone: its complete weights in `backbone/`, or a
LoRA adapter in `adapter/` and the name of the base model. Both are present if the base model has no
name to load it by.
"""

import os
import re
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from metaembed_pl.data.remote import HUB_ID
from metaembed_pl.errors import UserError, about_key
from metaembed_pl.files import read_json_object
from metaembed_pl.model.backbone import BackboneConfig, build_backbone
from metaembed_pl.model.hub_faults import why_not
from metaembed_pl.model.lora import (
    adapter_tensors,
    base_weights,
    has_adapter,
    load_adapter,
    save_adapter,
)
from metaembed_pl.model.processing import Processing, Prompt
from metaembed_pl.model.sharded import unsharded
from metaembed_pl.model.weights import fingerprint

FORMAT = 1
SETTINGS = "metaembed.json"
HUB_CACHE = re.compile(r"models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})")
# What a model folder decides itself; the rest of BackboneConfig says how the backbone is run.
SOURCE = ("path", "revision", "scratch", "tokenizer", "min_pixels", "max_pixels", "max_text_tokens")


def find_model_folder(name: str | Path, revision: str | None = None) -> Path:
    """The path of a model folder, which is downloaded if `name` is a hub id."""
    folder = Path(name)
    if not folder.exists() and HUB_ID.fullmatch(str(name)):
        folder = _from_hub(str(name), revision)
    elif revision is not None and folder.exists():
        raise UserError(f"{name} is a folder: only a model on the hub has revisions")
    if not folder.exists():
        raise UserError(f"{name} does not exist: train or download it first")
    if not (folder / SETTINGS).is_file():
        raise UserError(
            f"{name} is not a model folder: it has no {SETTINGS}; "
            "expected what `fit` leaves in runs/NAME/model, or a hub id of such a folder"
        )
    return folder


def _from_hub(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"{repository}: no such folder here, and no such repository could be had from the hub: "
            f"{why_not(repository, error)}"
        ) from error


def read_settings(folder: Path) -> dict[str, Any]:
    """The content of `metaembed.json`."""
    file = folder / SETTINGS
    settings = read_json_object(file)
    if settings.get("format") != FORMAT:
        raise UserError(f"{file}: format {settings.get('format')!r}, this version reads {FORMAT}")
    return settings


def options_to_run(
    folder: Path, dtype: str | None = None, attention: Any = "sdpa", compile: bool = False
) -> BackboneConfig:
    """How the backbone of a model folder is run; `dtype` None: as its weights were saved."""
    saved: Any = dtype or read_settings(folder).get("dtype", "float32")
    return BackboneConfig(dtype=saved, attention=attention, compile=compile)


def settings_to_start_from(
    name: str, backbone: BackboneConfig, given: dict[str, Any]
) -> dict[str, Any]:
    """The settings of a model folder that training starts from.

    Args:
        name: a model folder or hub id.
        backbone: of the recipe: may only set how the backbone is run.
        given: `groups`, `layout`, `projection`, `prompt` and so on of the recipe; None: not given.

    Raises:
        UserError: the recipe differs from the folder.
    """
    with about_key("model.start_from"):
        folder = find_model_folder(name)
    plain = {field.name: field.default for field in fields(BackboneConfig)}
    for key in SOURCE:
        if getattr(backbone, key) != plain[key]:
            raise UserError(
                f"model.backbone.{key} is that of start_from {name}: leave it out; only how the "
                "backbone is run can be given (dtype, attention, gradient_checkpointing, ...)"
            )
    settings = read_settings(folder)
    plain_head = {"pooling": "meta_tokens", "bidirectional": False}
    processing = read_json_object(folder / "processing" / "processing.json")
    own = plain_head | settings | {"prompt": processing["prompt"]}
    for key, value in given.items():
        if value is not None and not _agrees(value, own.get(key)):
            raise UserError(
                f"model.{key} is {value}, but start_from {name} has {own.get(key)}: leave {key} "
                "out, or train from a backbone instead"
            )
    return settings


def _agrees(value: Any, own: Any) -> bool:
    if isinstance(value, Prompt):
        return all(own[name] == words for name, words in asdict(value).items() if words is not None)
    return value == own


def backbone_tensors(backbone: Any) -> dict[str, dict[str, Tensor]]:
    """The parts of a backbone in a model folder: its `weights`, its `adapter`, or both.

    If weights are sharded over ranks, every rank must call this.
    """
    if not has_adapter(backbone):
        return {"weights": unsharded(backbone.state_dict(keep_vars=True))}
    found = {"adapter": unsharded(adapter_tensors(backbone))}
    if backbone.peft_config["default"].base_model_name_or_path is None:
        found["weights"] = unsharded(base_weights(backbone))
    return found


def save_backbone(
    backbone: Any, tensors: dict[str, dict[str, Tensor]], folder: Path, home: Path
) -> dict[str, Any]:
    """Writes the weights, the adapter, or both into `folder`.

    Args:
        backbone: with or without an adapter.
        tensors: its `backbone_tensors`.
        folder: a temporary folder.
        home: where the folder will be: the path of a base model on disk is relative to it.

    Returns:
        The backbone's part of `metaembed.json`.
    """
    if "weights" in tensors:
        weights = {name: tensor.contiguous() for name, tensor in tensors["weights"].items()}
        backbone.save_pretrained(folder / "backbone", state_dict=weights, safe_serialization=True)
    if "adapter" not in tensors:
        return {}
    config = backbone.peft_config["default"]
    base = config.base_model_name_or_path
    path = None if base is None else base_from(base, home)
    save_adapter(backbone, tensors["adapter"], folder / "adapter", path)
    if path is None:
        return {}
    known = {"path": path, "revision": config.revision, "fingerprint": backbone.base_fingerprint}
    return {"backbone": known}


def base_from(base: str, home: Path) -> str:
    """A base model's path relative to `home`, so that both can move together; a hub id as it is."""
    if not Path(base).exists():
        return base
    relative = os.path.relpath(Path(base).resolve(), home.resolve())
    return relative if relative.startswith(".") else f"./{relative}"


def load_folder_backbone(
    folder: Path, settings: dict[str, Any], options: BackboneConfig | None, processing: Processing
) -> PreTrainedModel:
    """The backbone of a model folder, with its adapter if it has one.

    Args:
        folder: a model folder.
        settings: its `metaembed.json`.
        options: how the backbone is run; None: as it was saved.
        processing: the folder's.
    """
    options = options or BackboneConfig(dtype=settings.get("dtype", "float32"))
    known = settings.get("backbone")
    if known is None:
        source = {"path": str(folder / "backbone")}
    else:
        source = {"path": find_base(folder, known["path"]), "revision": known["revision"]}
    backbone: Any = build_backbone(replace(options, **source), processing)
    if known is None and (cached := HUB_CACHE.search(folder.resolve().as_posix())):
        backbone.config.name_or_path = f"{cached[1]}/{cached[2]}/backbone"
        backbone.base_revision = cached[3]
    if known is not None:
        _refuse_other_base(folder, known, backbone)
    if (folder / "adapter").is_dir():
        load_adapter(backbone, folder / "adapter")
    elif known is not None:
        raise UserError(f"{folder}: {SETTINGS} names an adapter, but has no adapter/")
    return backbone


def find_base(folder: Path, base: str) -> str:
    """The path of a model folder's base model; a hub id as it is."""
    if not base.startswith("."):
        return base
    path = (folder / base).resolve()
    if not path.is_dir():
        raise UserError(
            f"{folder}: its adapter belongs to the base model at {path}, which is not there; bring "
            "it back, or export the model with --merge where it is"
        )
    return str(path)


def _refuse_other_base(folder: Path, known: dict[str, Any], backbone: PreTrainedModel) -> None:
    found = fingerprint(backbone)
    expected = known.get("fingerprint")
    if expected and found and found != expected:
        raise UserError(
            f"{folder}: its adapter was trained on other weights than {known['path']} has now "
            f"(fingerprint {expected}, found {found}); use the base model it was trained on"
        )
