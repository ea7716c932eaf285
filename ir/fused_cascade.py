"""A cascade that stands in a graph as one node: what a kernel is generated for.

It is self-contained: the Einsums, the size of every rank, and how each of its input and output tensors lies in an
operand or result of the node. An input ``Q[b,h,m,d]`` may be any affine view of its operand; so a head split, a
permutation, a slice or a group of query heads that share keys is read in place::

    tensor  Q[b,h,m,d]   is element   operand 0 [b, m, h*64 + d]
    tensor  K[b,g,n,d]   is element   operand 1 [b, n, g*64 + d]

Two tensors may lie in one operand (the parts of a joint projection). Equal layers have equal fused cascades.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import sympy

from .cascade import Cascade
from .types import Size, TensorType


@dataclass(frozen=True)
class TensorView:
    """``tensor[ranks]`` is element ``index`` of operand (or result) number ``position``.

    ``ranks`` are the cascade tensor's ranks in its own order, each a rank symbol. ``index`` has one expression for each
    dimension of the operand, affine in ``ranks`` with whole coefficients; a dimension that is not walked is a number.
    Every coordinate is inside the operand as long as each rank is below its size in ``sizes``.
    """

    tensor: str
    position: int
    ranks: tuple[sympy.Symbol, ...]
    index: tuple[sympy.Expr, ...]
    sizes: tuple[Size, ...] = ()


@dataclass(frozen=True)
class FusedCascade:
    """A cascade as written (``passes.rewrite_cascade.rewrite`` gives the one-pass form), with its surroundings.

    ``sizes``: rank name -> its size, an int or an expression over the graph's size symbols. ``operands`` and
    ``results`` are the types (dtype, shape, strides) of the node's operands and results. ``inputs`` describe every
    input of the cascade, ``outputs`` the tensors that are wanted, which need not be outputs of the cascade in the sense
    that nothing reads them. ``dtypes``: tensor -> the element type it has in the model, for every tensor the cascade
    writes; a kernel computes in float32 or better whatever they are. ``wide`` are tensors that a kernel never stores.
    ``thread_bytes`` and ``shared_bytes``: what its kernel holds while it runs, for each thread and once; 0 where it has
    not been generated. ``chunks``: rank -> coordinates at a time, where a library computes the cascade as it is
    written, in chunks of independent rows; then the wide tensors are stored for one chunk. ``schedule``: what was
    chosen of the kernel where its generator has rules of its own: ``rows`` and ``streamed``, the tile's lengths; on a
    CPU ``parts`` of the streamed rank, 1 for one loop, and ``crossing`` 0 for a kernel for each direction; on a GPU
    ``warps`` of a block and ``stages`` of loads in flight.
    """

    cascade: Cascade
    sizes: Mapping[str, Size]
    operands: tuple[TensorType, ...]
    results: tuple[TensorType, ...]
    inputs: tuple[TensorView, ...]
    outputs: tuple[TensorView, ...]
    dtypes: Mapping[str, str] = field(default_factory=dict)
    wide: tuple[str, ...] = ()
    thread_bytes: int = 0
    shared_bytes: int = 0
    chunks: Mapping[str, int] = field(default_factory=dict)
    schedule: Mapping[str, int] = field(default_factory=dict)
