"""What each microbatch's loss counts with in the loss of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .stages import Stages


def loss_weights(
    stages: Stages, microbatches: Sequence[Sequence[Any]], scale: float, replicas: int, total: Callable[[int], int]
) -> list[float]:
    """The factor of each microbatch's loss (a sum over tokens, for a cross-entropy).

    The mean is over the tokens of all replicas' microbatches that are not ignored; losses other than cross-entropies
    are averaged over the microbatches. ``total``: a number added up over the replicas.
    """
    count, loss = len(microbatches), stages.loss
    if stages.targets is None or loss is None:
        return [scale / (count * replicas)] * count
    if not loss.mean:
        return [scale] * count
    tokens = total(sum(int((stages.targets(*each) != loss.ignore_index).sum()) for each in microbatches))
    return [scale / tokens if tokens else float("nan")] * count
