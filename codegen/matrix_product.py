"""A sum of products of two tensors by the library's matrix product, written where it belongs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import sympy
import torch

Ranks = Sequence[sympy.Symbol]


def multiply(
    left: tuple[torch.Tensor, Ranks], right: tuple[torch.Tensor, Ranks], out: tuple[torch.Tensor, Ranks], add: bool
) -> None:
    """``out = sum left * right`` over the ranks that ``out`` has not, or added to ``out`` if ``add``. Each tensor comes
    with its ranks; of those, a rank may be walked over in a tensor of size 1 by the other alone."""
    (a, a_ranks), (b, b_ranks), (c, c_ranks) = left, right, out
    both = [rank for rank in c_ranks if rank in a_ranks and rank in b_ranks]
    rows = [rank for rank in c_ranks if rank in a_ranks and rank not in b_ranks]
    columns = [rank for rank in c_ranks if rank in b_ranks and rank not in a_ranks]
    summed = [rank for rank in a_ranks if rank in b_ranks and rank not in c_ranks]
    x = _matrices(a, a_ranks, both, rows, summed)
    y = _matrices(b, b_ranks, both, summed, columns)
    place = c.permute([list(c_ranks).index(rank) for rank in (*both, *rows, *columns)])
    z = _as_matrices(place, len(both), len(rows))
    flip = z is not None and z.stride(-1) != 1 and z.stride(-2) == 1
    if z is not None and flip:
        x, y, z = y.mT, x.mT, z.mT
    if z is not None and z.dtype == x.dtype:
        if add:
            (torch.addmm if z.dim() == 2 else torch.baddbmm)(z, x, y, out=z)
        else:
            (torch.mm if z.dim() == 2 else torch.bmm)(x, y, out=z)
        return
    found = (x @ y).reshape(place.shape)
    if add:
        place.add_(found)
    else:
        place.copy_(found)


def _matrices(tensor: torch.Tensor, ranks: Ranks, batch: Ranks, rows: Ranks, columns: Ranks) -> torch.Tensor:
    """[batch, rows, columns], without the first dimension if there is no batch. Copied only if it must be."""
    order = tensor.permute([list(ranks).index(rank) for rank in (*batch, *rows, *columns)])
    sizes = order.shape
    first, second = len(batch), len(batch) + len(rows)
    shape = [math.prod(sizes[first:second]), math.prod(sizes[second:])]
    return order.reshape([math.prod(sizes[:first]), *shape] if batch else shape)


def _as_matrices(place: torch.Tensor, batch: int, rows: int) -> torch.Tensor | None:
    """The same as a view, None where there is none."""
    sizes = place.shape
    shape = [math.prod(sizes[batch : batch + rows]), math.prod(sizes[batch + rows :])]
    try:
        return place.view([math.prod(sizes[:batch]), *shape] if batch else shape)
    except RuntimeError:  # its dimensions do not lie as one
        return None
