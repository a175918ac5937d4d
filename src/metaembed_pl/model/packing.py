"""Rows of a batch one after the other, without padding, for flash attention.

transformers' decoders accept several sequences as one row: each starts where the positions restart,
and flash attention gets cumulative lengths. With sdpa they build a block mask from the positions,
which costs far more; tests use it to show that the results are equal.

Shape letters: B rows, L tokens of the longest, T tokens of all rows, K slots a row.
"""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from metaembed_pl.model.vision import Inputs


def packed(
    inputs: Inputs, slot_index: Int[Tensor, "B K"]
) -> tuple[dict[str, Any], Int[Tensor, "B K"]]:
    """Padded rows as a single row for a decoder, and the columns of their slots in it.

    Args:
        inputs: of shape (B, L), but M-RoPE's `position_ids` of shape (3, B, L).
        slot_index: columns of each row's slots.
    """
    mask = inputs["attention_mask"].bool()
    of_all = mask.flatten().nonzero()[:, 0]
    place = mask.flatten().cumsum(0).view_as(mask) - 1
    text = mask.cumsum(1) - 1  # rows begin where positions restart
    grid = inputs.get("position_ids", text.expand(3, -1, -1))
    rows = {name: part for name, part in inputs.items() if part.dim() == 2}
    found: dict[str, Any] = {name: part.flatten()[of_all][None] for name, part in rows.items()}
    del found["attention_mask"]
    found["position_ids"] = torch.cat([text[None], grid]).flatten(1)[:, of_all][:, None]
    lengths = mask.sum(dim=1)
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    longest = int(lengths.max())
    found |= {f"cu_seq_lens_{of}": ends for of in "qk"}
    found |= {f"max_length_{of}": longest for of in "qk"}
    return found, place.gather(1, slot_index)
