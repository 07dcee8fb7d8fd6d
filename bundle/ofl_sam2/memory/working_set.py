"""The learner's working set for one volume: retrieved supports plus accepted query slices, with sample weights."""

import torch
from torch import Tensor


class WorkingSet:
    """Samples of B classes and their weights a_t >= 0 with sum 1.

    Accepted query slices enter with weight `rate` and the rest is renormalised; the supports together keep at least
    `support_floor`; when more than `capacity` queries are held, one goes, but not the newest: the one that weighs least
    in the class where it weighs most.

    Args:
        x: learner inputs of the supports, `(B, S, C_x, h, w)`.
        encoding, weight: target encodings and spatial weights of the supports, `(B, S, D, h, w)`.
        rate, support_floor, capacity: as above.
    """

    def __init__(
        self,
        x: Tensor,
        encoding: Tensor,
        weight: Tensor,
        rate: float = 0.1,
        support_floor: float = 0.25,
        capacity: int = 20,
    ) -> None:
        self.rate, self.floor, self.capacity = rate, support_floor, capacity
        self.supports = (x, encoding, weight)
        self.queries: list[tuple[Tensor, Tensor, Tensor]] = []
        self.query_weight = x.new_zeros(x.shape[0], 0)

    def replace_supports(self, x: Tensor, encoding: Tensor, weight: Tensor) -> None:
        """Take the supports retrieved for another query slice; queries and their weights stay."""
        self.supports = (x, encoding, weight)

    def add(self, x: Tensor, encoding: Tensor, weight: Tensor, accepted: Tensor | None = None) -> None:
        """Add one query slice per class: `x (B, C_x, h, w)`, `encoding` and `weight (B, D, h, w)`.

        Args:
            x, encoding, weight: the sample.
            accepted: `(B,)` bool, the classes that learn from it; default all.
        """
        accepted = torch.ones(x.shape[0], dtype=torch.bool, device=x.device) if accepted is None else accepted
        if not accepted.any():
            return
        rate = torch.where(accepted, self.rate, 0.0)[:, None]
        self.query_weight = torch.cat([self.query_weight * (1 - rate), rate], 1)
        share = self.query_weight.sum(1, keepdim=True)
        self.query_weight = self.query_weight * ((1 - self.floor) / share.clamp_min(1e-12)).clamp_max(1.0)
        self.queries.append((x, encoding, weight))
        if len(self.queries) > self.capacity:
            weights = self.query_weight.T.tolist()
            lightest = min(range(max(1, len(weights) - 1)), key=lambda row: (max(weights[row]), sum(weights[row])))
            del self.queries[lightest]
            keep = [i for i in range(self.query_weight.shape[1]) if i != lightest]
            self.query_weight = self.query_weight[:, keep]

    def weights(self) -> Tensor:
        """Sample weights `(B, S + Q)`, supports first."""
        count = self.supports[0].shape[1]
        rest = (1 - self.query_weight.sum(1, keepdim=True)).expand(-1, count) / count
        return torch.cat([rest, self.query_weight], 1)

    def samples(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`x (B, T, C_x, h, w)`, `encoding` and `weight (B, T, D, h, w)`, sample weights `(B, T)`."""
        columns = [
            torch.cat([support, *(query[i][:, None] for query in self.queries)], 1)
            for i, support in enumerate(self.supports)
        ]
        return columns[0], columns[1], columns[2], self.weights()
