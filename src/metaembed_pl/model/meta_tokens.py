"""Meta tokens: the learned input vectors whose last hidden states are the meta embeddings.

They are an ordinary `nn.Embedding` of ours, outside the vocabulary and outside peft. A row of token
ids ends in K slots (see processing.py); while the backbone runs, a forward hook on its input
embedding writes the learned vectors into these slots. So every family computes positions and
masks from token ids as usual, and no vocabulary is resized.

Shape letters: B rows, N rows of which the first B are read, L tokens, H hidden width, K slots.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from metaembed_pl.data.collate import Side
from metaembed_pl.errors import UserError

Layout = Literal["both", "own"]


class MetaTokens(nn.Module):
    """R_q query tokens and R_c candidate tokens, in one table.

    Args:
        num_query: R_q; 0 of both for a model that has no meta tokens.
        num_candidate: R_c.
        hidden_size: H.
        layout: `both`: every input ends in [query tokens ; candidate tokens], as in the paper's
            release. `own`: queries end in the query tokens, candidates in the candidate tokens,
            which is shorter. Under the causal mask a query cannot see the candidate tokens behind
            its own, so they are left out of queries in either layout: the result is the same.
        std: standard deviation of the initial values; the backbone's `initializer_range`.
        orthogonal: whether they start at right angles to each other, all of one length.

    Raises:
        UserError: there are more of them than H, which cannot all be orthogonal.
    """

    def __init__(
        self,
        num_query: int,
        num_candidate: int,
        hidden_size: int,
        layout: Layout = "both",
        std: float = 0.02,
        orthogonal: bool = False,
    ):
        super().__init__()
        if layout not in ("both", "own"):
            raise UserError(f"layout must be 'both' or 'own', got {layout!r}")
        self.num_query, self.num_candidate, self.layout = num_query, num_candidate, layout
        self.embedding = nn.Embedding(num_query + num_candidate, hidden_size)
        if not orthogonal:
            nn.init.normal_(self.embedding.weight, std=std)
        elif num_query + num_candidate > hidden_size:
            raise UserError(
                f"{num_query} + {num_candidate} meta tokens of width {hidden_size} cannot be "
                "orthogonal: leave out model.meta_tokens_orthogonal"
            )
        else:
            nn.init.orthogonal_(self.embedding.weight, gain=std * hidden_size**0.5)
        self.embedding.weight.requires_grad_(num_query + num_candidate > 0)

    def num_slots(self, side: Side) -> int:
        """K: how many slots a row of this side ends in.

        >>> [MetaTokens(16, 64, 8, layout).num_slots("candidate") for layout in ("both", "own")]
        [80, 64]
        """
        if side == "query":
            return self.num_query
        return self.num_candidate + (self.num_query if self.layout == "both" else 0)

    def _rows(self, side: Side) -> Int[Tensor, " K"]:
        start = self.num_query if side == "candidate" and self.layout == "own" else 0
        count = self.num_slots(side)
        return torch.arange(start, start + count, device=self.embedding.weight.device)

    @contextmanager
    def inserted(
        self, input_embedding: nn.Module, slot_index: Int[Tensor, "B K"], side: Side
    ) -> Iterator[None]:
        """While open, the output of `input_embedding` holds the meta tokens at `slot_index`.

        Columns of each row, or where all rows are packed into one, columns of that.

        The hook lives for one forward only: Lightning's DeepSpeed set-up strips persistent hooks.
        Rows beyond those of `slot_index` stay as they are. Gemma scales its input embeddings; so it
        does the meta tokens, which are then what new rows of the vocabulary would be.
        """
        if not slot_index.shape[1]:  # a model without meta tokens
            yield
            return
        scale = getattr(input_embedding, "embed_scale", 1.0)

        def write(_module: nn.Module, _args: tuple, output: Float[Tensor, "B L H"]) -> Tensor:
            # Called as a module, so that ZeRO-3 gathers the sharded table.
            tokens = (self.embedding(self._rows(side)) * scale).to(output.dtype)
            index = slot_index.flatten() if len(output) == 1 else slot_index
            index = index.view(-1, index.shape[-1], 1).expand(-1, -1, output.shape[-1])
            tokens = tokens.expand(*slot_index.shape, -1).reshape(index.shape)
            return output.scatter(1, index, tokens)

        handle = input_embedding.register_forward_hook(write)
        try:
            yield
        finally:
            handle.remove()

    def read(
        self, hidden: Float[Tensor, "N L H"], slot_index: Int[Tensor, "B K"], side: Side
    ) -> Float[Tensor, "B R H"]:
        """The states of this side's own meta tokens: R = R_q for queries, R_c for candidates."""
        own = slot_index if side == "query" else slot_index[:, -self.num_candidate :]
        if len(hidden) == 1:  # a row, or all rows in one
            return hidden[0, own]
        return hidden.gather(1, own[:, :, None].expand(-1, -1, hidden.shape[-1]))
