"""The model of a verb: its flags, loading it, and checking it against a store."""

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from metaembed_pl.errors import UserError, first_line

if TYPE_CHECKING:
    from metaembed_pl.model.embedder import MetaEmbedder
    from metaembed_pl.model.encoding import Pace
    from metaembed_pl.retrieval.searchable import Searchable

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
STORED = ("fp16", "int8")


def add_model_arguments(
    parser: argparse.ArgumentParser, required: bool = True, others: str = ""
) -> None:
    """Declare the flags of the model, which are the same for every verb.

    Args:
        parser: of the verb.
        required: whether --model must be given.
        others: what else --model takes, for its help.
    """
    add = parser.add_argument
    add(
        "--model",
        required=required,
        metavar="FOLDER",
        help=f"a model folder such as runs/NAME/model, or a hub id{others}",
    )
    add("--revision", metavar="NAME", help="branch, tag or commit of a model on the hub")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: cuda if available)")
    add(
        "--dtype",
        type=_dtype,
        metavar="{bf16,fp32}",
        help="compute dtype (default: bf16 on a GPU that supports it, else the saved "
        "dtype); adapters are merged into the weights first",
    )
    add(
        "--attention",
        choices=("sdpa", "sdpa_fp32", "flash_attention_2", "eager"),
        default="sdpa",
        help="attention implementation; sdpa_fp32 is for bf16 on a CPU (default: sdpa)",
    )
    add("--compile", action="store_true", help="torch.compile for the layers of the model")


def _dtype(name: str) -> str:
    if name in STORED:
        raise argparse.ArgumentTypeError(
            f"{name} is a dtype for stored vectors: use --store-dtype {name}"
        )
    if name not in DTYPES:
        raise argparse.ArgumentTypeError(f"expected bf16 or fp32, got {name!r}")
    return DTYPES[name]


def add_pace_arguments(parser: argparse.ArgumentParser, workers: bool = True) -> None:
    """Declare the flags for the speed of encoding; they do not change results."""
    add = parser.add_argument
    add(
        "--batch-size",
        type=int,
        default=32,
        metavar="N",
        help="images prepared at a time, or eight times as many texts (default: 32)",
    )
    if not workers:
        return
    add(
        "--chunk-tokens",
        type=int,
        metavar="N",
        help="tokens per forward pass, padding included (default: 4096)",
    )
    add(
        "--workers",
        type=int,
        metavar="N",
        help="processes that read and prepare items (default: up to 8 with a GPU, else none)",
    )


def check_at_least(args: argparse.Namespace, least: int, *names: str) -> None:
    """Refuse flags that are given and below `least`."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")


def refuse_ignored(args: argparse.Namespace, why: str, *names: str, **defaults: Any) -> None:
    """Refuse flags without an effect: `names` that are given, `defaults` with another value."""
    for name, default in (dict.fromkeys(names) | defaults).items():
        if getattr(args, name) not in (None, [], default) and getattr(args, name) is not False:
            raise UserError(f"--{name.replace('_', '-')} {why}")


def pace_of(args: argparse.Namespace) -> "Pace":
    """The flags of `add_pace_arguments`, checked."""
    check_at_least(args, 1, "batch_size", "chunk_tokens")
    check_at_least(args, 0, "workers")

    from metaembed_pl.model.encoding import CHUNK_TOKENS, Pace

    return Pace(args.batch_size, args.chunk_tokens or CHUNK_TOKENS, args.workers)


def load_model(args: argparse.Namespace, store: "Searchable | None" = None) -> "MetaEmbedder":
    """Load the model that the flags of `add_model_arguments` name, and merge its adapter.

    Raises:
        UserError: there is no such model or device, or it is not the model of `store`.
    """
    from transformers.utils import logging

    from metaembed_pl.model.embedder import MetaEmbedder
    from metaembed_pl.model.export import merge_in_memory
    from metaembed_pl.model.model_folder import find_model_folder, options_to_run

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    device = find_device(args.device)
    folder = find_model_folder(args.model, args.revision)
    dtype = args.dtype or ("bfloat16" if _has_bf16(device) else None)
    options = options_to_run(folder, dtype, args.attention, args.compile)
    model = MetaEmbedder.from_pretrained(folder, device, options)
    merge_in_memory(model)
    if store is not None:
        store.check_model(model)
    return model


def _has_bf16(device: str) -> bool:
    import torch

    if not device.startswith("cuda"):
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def report_truncation(model: "MetaEmbedder") -> None:
    """Print how many texts the model truncated; every rank must call it."""
    from metaembed_pl.data.collate import Cut
    from metaembed_pl.ranks import gather_objects

    total = Cut()
    for cut in gather_objects(model.processing.cut):
        total += cut
    if total.num_cut:
        print(total, file=sys.stderr)


def find_device(name: str | None) -> str:
    """The device of that name; None: a GPU if available, and under torchrun one for each rank.

    Raises:
        UserError: the device is not available.
    """
    import torch

    if name is None:
        local = os.environ.get("LOCAL_RANK", "0")
        return f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name} is not available: {first_line(error)}") from error
    return name
