"""The vision tower's part of a forward pass, separate from the language model.

The tower encodes the pictures first, and the backbone gets its outputs. So a frozen tower runs
without a graph, gradient caching need not run it twice, and a batch without pictures can run only
the tower if all ranks must run the same modules.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Inputs = dict[str, Tensor]
Seen = dict[str, Any]
"""The vision tower's outputs for the language model: tensors, and lists of them, by name."""

READ = ("pooler_output", "deepstack_features")  # of what `get_image_features` gives


def image_features(backbone: Any, pictures: Mapping[str, Tensor]) -> Seen:
    """The projected features of the library's own method, without unused outputs."""
    output = backbone.get_image_features(**pictures)
    return {name: output[name] for name in READ if name in output}


@contextmanager
def shown(backbone: Any, inputs: Inputs, seen: Seen) -> Iterator[Inputs]:
    """While open, `backbone(**inputs)` uses `seen` instead of its vision tower."""
    backbone.get_image_features = lambda *_args, **_kwargs: SimpleNamespace(**seen)
    try:
        # The backbone asks for features where there are pixels, whatever they are.
        yield inputs | {"pixel_values": inputs["input_ids"]}
    finally:
        del backbone.get_image_features


@contextmanager
def as_it_is(backbone: nn.Module, inputs: Inputs, unused: Seen) -> Iterator[Inputs]:
    """A language model that runs all of its layers whether there are pictures or not."""
    yield inputs


def nothing_of(seen: Seen) -> Tensor | float:
    """0, with a graph to all outputs: weights without influence get a gradient of 0."""
    leaves = [leaf for leaf in tree_leaves(seen) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return 0 * torch.stack([leaf.float().sum() for leaf in leaves]).sum() if leaves else 0.0
