"""Tile statements in the order in which C++ is printed: nothing overtakes what it depends on."""

from __future__ import annotations

from effcc.codegen.cpp_tiles.order import products_first
from effcc.ir.cascade import tensor_name
from effcc.ir.tile import Dot, Loop, Statement
from effcc.ir.tile_parser import parse_program

_PROGRAM = """
program kernel in f32
input Q[m,d]: f32 unit d
input KT[d,n]: f32 unit n
input V[n,f]: f32 unit f
input X[m,n]: f32 unit n
output O[m,f]: f32 unit f
state A[m,f] = 0
state R[m] = 0
for n step 16 {
  map E[m,n] = exp(X[m,n])
  dot S[m,n] = sum[d] Q[m,d] * KT[d,n]
  map P[m,n] = S[m,n] * E[m,n]
  map B[m] = R[m]
  carry A[m,f] = A[m,f] * B[m]
  dot A[m,f] sum= sum[n] P[m,n] * V[n,f]
  dot S2[m,n] = sum[d] Q[m,d] * KT[d,n]
  reduce R[m] sum= sum[n] S2[m,n]
  map T[m,n] = P[m,n]
  carry A[m,f] = A[m,f] + B[m]
}
store O[m,f] = A[m,f]
"""


def _inside(body: tuple[Statement, ...]) -> list[str]:
    (loop,) = [item for item in body if isinstance(item, Loop)]
    return [("dot " if isinstance(item, Dot) else "") + tensor_name(item.target) for item in loop.body]  # type: ignore[union-attr]


def test_products_come_as_soon_as_they_can() -> None:
    """``S2`` needs nothing; ``A``'s product needs ``P`` and the carry before it, and the carry after it needs both."""
    body = products_first(parse_program(_PROGRAM).body, lambda item: False)
    assert _inside(body) == ["dot S", "dot S2", "E", "P", "B", "A", "R", "T", "dot A", "A"]


def test_maps_that_share_no_loops_go_with_products() -> None:
    body = products_first(parse_program(_PROGRAM).body, lambda item: tensor_name(item.target) == "T")
    assert _inside(body) == ["dot S", "dot S2", "E", "P", "B", "A", "R", "dot A", "T", "A"]
