"""Factors of dimensions and coordinates: what lets a split or merged dimension be walked by two ranks."""

from __future__ import annotations

import pytest
import sympy
from effcc.ir.cascade import rank
from effcc.ir.cascade_parser import parse_cascade
from effcc.ir.cascade_printer import print_cascade
from effcc.passes.raising.affine import NotAffine, join, split
from effcc.passes.raising.axes import Axes
from effcc.passes.raising.ranks import unify_ranks
from effcc.passes.raising.sizes import divide, equal
from fresh_seed import fresh_random

S = sympy.Symbol("s0", integer=True)


def _sizes(axes: Axes, factors: tuple[int, ...]) -> list[object]:
    return [axes.size(factor) for factor in axes.resolve(factors)]


def test_a_split_reaches_every_dimension_of_the_class() -> None:
    axes = Axes()
    c, other, h, d = axes.new(512), axes.new(512), axes.new(8), axes.new(64)
    assert axes.unify(c, other)
    assert axes.unify(c, (*h, *d))
    assert _sizes(axes, other) == [8, 64]
    assert axes.resolve(other) == axes.resolve((*h, *d))


def test_two_splits_have_common_factors() -> None:
    axes = Axes()
    c = axes.new(24)
    assert axes.unify(c, (*axes.new(2), *axes.new(12)))
    assert axes.unify(c, (*axes.new(6), *axes.new(4)))
    assert _sizes(axes, c) == [2, 3, 4]


def test_splits_without_common_factors_are_told() -> None:
    axes = Axes()
    c = axes.new(24)
    assert axes.unify(c, (*axes.new(4), *axes.new(6)))
    assert not axes.unify(c, (*axes.new(6), *axes.new(4)))


def test_a_dimension_of_size_one_has_no_factors() -> None:
    axes = Axes()
    assert axes.new(1) == ()
    assert axes.unify((), ())


def test_symbolic_sizes() -> None:
    axes = Axes()
    tokens, batch, length = axes.new(4 * S), axes.new(4), axes.new(S)
    assert axes.unify(tokens, (*batch, *length))
    assert _sizes(axes, tokens) == [4, S]
    assert divide(S * 8, 8) == S
    assert divide(S, 8) is None
    assert equal(2 * S - S, S) and not equal(S, S + 1)


def test_coordinates_of_factors_are_those_that_make_the_coordinate() -> None:
    """Random affine coordinates: what ``split`` finds gives the same numbers as // and %, or it refuses."""
    random = fresh_random()
    found = 0
    for _ in range(200):
        sizes = [random.randint(2, 5) for _ in range(random.randint(2, 3))]
        ranks = {rank(f"r{number}"): random.randint(2, 4) for number in range(2)}
        coordinate = sum(random.choice([1, 2, *sizes, sizes[-1] * 2]) * symbol for symbol in ranks)
        coordinate += random.randint(0, sizes[-1])
        try:
            parts = split(sympy.sympify(coordinate), sizes, ranks)
        except NotAffine:
            continue
        found += 1
        a, b = ranks
        for x in range(ranks[a]):
            for y in range(ranks[b]):
                at = {a: x, b: y}
                whole = int(coordinate.xreplace(at))
                for size, part in reversed(list(zip(sizes, parts, strict=True))[1:]):
                    assert int(part.xreplace(at)) == whole % size
                    whole //= size
                assert int(parts[0].xreplace(at)) == whole
    assert found > 10


def test_joined_factors_split_again() -> None:
    h, d = rank("h"), rank("d")
    assert join((h, d), (8, 64)) == 64 * h + d
    assert split(64 * h + d + 128, (10, 64), {h: 8, d: 64}) == (h + 2, d)
    with pytest.raises(NotAffine):
        split(h + d, (8, 64), {h: 8, d: 64})


def test_queries_and_keys_of_one_tensor_keep_two_names() -> None:
    cascade = parse_cascade("Y[a,b] = sum[c] X[a,c] * X[b,c]\nZ[e,f] = exp(Y[e,f])\nM[g] = max[i] Z[g,i]\n")
    einsums, sizes = unify_ranks(cascade.einsums, dict.fromkeys(cascade.ranks, 4))
    text = print_cascade(type(cascade)(tuple(einsums)))
    assert len(sizes) == 3
    y, z, m = text.splitlines()
    a, b = (name.strip() for name in y[y.index("[") + 1 : y.index("]")].split(","))
    assert z.startswith(f"Z[{a},{b}]") and m == f"M[{a}] = max[{b}] Z[{a},{b}]"
