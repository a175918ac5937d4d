"""What the evaluation of one dataset leaves: its metrics, and the vectors they were computed from.

Q: queries    C: candidates    Rq, Rc: vectors of a query, of a candidate    D: width
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaembed_pl.budget import Budget
from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.late_interaction import SCORES_AT_A_TIME, maxsim


@dataclass(frozen=True)
class DatasetResult:
    """One dataset, evaluated.

    Args:
        retrieval_set: what was asked, of which pool, and what is right.
        metrics: means over the queries by metric and budget, such as `recall@1/4x8`.
        queries: meta embeddings in the order of the retrieval set, on the CPU.
        candidates: likewise.
    """

    retrieval_set: RetrievalSet
    metrics: dict[str, float]
    queries: Float[Tensor, "Q Rq D"]
    candidates: Float[Tensor, "C Rc D"]

    @property
    def name(self) -> str:
        """The dataset's name."""
        return self.retrieval_set.name

    def scores(self, budget: Budget, first: int, last: int) -> Float[Tensor, "q C"]:
        """MaxSim of the queries from `first` up to `last` with every candidate."""
        queries = self.queries[first:last, : budget.r_q]
        return maxsim(queries, self.candidates[:, : budget.r_c])

    def ranks(self, budget: Budget) -> Int[Tensor, " Q"]:
        """The rank of each query's best right candidate, from 1; ties count against it."""
        step = max(1, SCORES_AT_A_TIME // len(self.candidates))
        ranks = []
        for start in range(0, len(self.queries), step):
            scores = self.scores(budget, start, start + step)
            for query, row in enumerate(scores, start=start):
                right = row[[i for i in self.retrieval_set.relevant[query] if i >= 0]]
                if self.retrieval_set.itself and self.retrieval_set.itself[query] >= 0:
                    row[self.retrieval_set.itself[query]] = -torch.inf
                if not len(right):  # nobody can find it
                    ranks.append(torch.tensor(1 + len(row)))
                    continue
                # Right ones that tie with the best are not before it: only wrong ones count.
                num_before = (row >= right.max()).sum() - (right == right.max()).sum()
                ranks.append(1 + num_before)
        return torch.stack(ranks)
