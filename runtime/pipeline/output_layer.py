"""One device's share of an output layer and its loss: the passes S and T, and the exchanges between them.

All of it comes from the cascade (``passes.pipeline_parallel.vocabulary_cascade``): S computes the first exchange's
state from the rows of W that lie here, T what is left. An exchange reduces each component over the devices with the
component's own operation, references first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...codegen.einsums import Values, reduce
from ...passes.pipeline_parallel.vocabulary_cascade import OutputCascade
from ..monoid_state import AllReduce, State, local_state, merge, results


@dataclass(frozen=True)
class Shard:
    """Rows ``first`` to ``first + rows`` of a vocabulary of ``size``."""

    first: int
    rows: int
    size: int

    @classmethod
    def of(cls, rank: int, ranks: int, size: int) -> Shard:
        """The rows of a rank; sizes differ by one where ``ranks`` does not divide the vocabulary."""
        first = rank * size // ranks
        return cls(first, (rank + 1) * size // ranks - first, size)

    @property
    def slice(self) -> slice:
        return slice(self.first, self.first + self.rows)


class OutputLayer:
    """The layer on one device. ``hidden`` is [tokens, d], ``target`` [tokens] (any value outside the vocabulary for a
    token that does not count), ``scale`` [tokens]: what the loss of each token is multiplied with."""

    def __init__(self, cascade: OutputCascade, weight: torch.Tensor, shard: Shard) -> None:
        self.cascade, self.weight, self.shard = cascade, weight, shard

    def start(self, hidden: torch.Tensor, target: torch.Tensor, scale: torch.Tensor) -> Microbatch:
        """S: the logits, and the state of the first exchange."""
        values = Values(
            {"H": hidden, "W": self.weight.detach(), "T": target, "G": scale},
            {"v": self.shard.first},
            {"v": self.shard.size},
        )
        logits = self.cascade.logits
        values = values.with_tensors({"Z": reduce(logits.body, "sum", logits.indices, logits.reduced, values)})
        return Microbatch(values, local_state(self.cascade.meetings[0], values))

    def exchange(self, microbatch: Microbatch, meeting: int, all_reduce: AllReduce) -> None:
        """The meeting's state over all devices, and what follows from it."""
        monoid = self.cascade.meetings[meeting]
        merged = merge(monoid, microbatch.state, microbatch.values, all_reduce)
        microbatch.values = results(monoid, merged, microbatch.values)

    def finish(self, microbatch: Microbatch) -> torch.Tensor:
        """T: the gradient of this device's rows of W; with two barriers, also the state of the second exchange."""
        if len(self.cascade.meetings) > 1:
            microbatch.state = local_state(self.cascade.meetings[1], microbatch.values)
        weight = self.cascade.weight
        return reduce(weight.body, "sum", weight.indices, weight.reduced, microbatch.values)

    def input_gradient(self, microbatch: Microbatch) -> torch.Tensor:
        """The gradient of ``hidden``, once the last exchange is over."""
        return microbatch.values.tensor("DH") * microbatch.values.tensor("G").unsqueeze(-1)

    def loss(self, microbatch: Microbatch) -> torch.Tensor:
        """The scaled sum of the tokens' losses, once the first exchange is over."""
        values, smoothing = microbatch.values, self.cascade.label_smoothing
        normalizer = values.tensor("MX") + torch.log(values.tensor("SE"))
        each = normalizer - (1 - smoothing) * values.tensor("ZT")
        if smoothing:
            each = each - smoothing / self.shard.size * values.tensor("ZS")
        scale = values.tensor("G")
        return torch.where(scale != 0, each * scale, 0).sum()


@dataclass
class Microbatch:
    """What the layer holds of a microbatch between S and T: all tensors, and the state that goes into the next
    exchange."""

    values: Values
    state: State
