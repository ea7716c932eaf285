"""Tile programs as text: read back as they were, and refused with the place where they break a rule."""

from __future__ import annotations

import random

import pytest
from attention_cascades import BACKWARD, FORWARD, GROUPED
from effcc.codegen.tiles.errors import NotLowerable
from effcc.codegen.tiles.lower import Operand, Settings, lower
from effcc.codegen.tiles.roles import Caches
from effcc.errors import ParseError, VerificationError
from effcc.ir.cascade_parser import parse_cascade
from effcc.ir.tile import Program
from effcc.ir.tile_parser import parse_program
from effcc.ir.tile_printer import print_program
from effcc.ir.tile_verifier import verify_program
from effcc.passes.rewrite_cascade import rewrite
from fresh_seed import fresh_random
from known_cascades import KNOWN, REFUSED
from random_cascades import random_text

PROGRAM = """\
program softmax_sum in f32
input X[b,m,n]: bf16 unit n
input V[b,n,f]: f32 unit f
output Y[b,m,f]: f32 unit f
size d = n
grid b step 1 {
  grid m step 64 {
    state M[m] = -inf
    state A[m,f] = 0
    for n step 256 {
      skip unless n <= m
      load T[m,n] = X[b,m,n]
      reduce M_next[m] = max[n] T[m,n]
      if all n <= m {
        map P[m,n] = exp(T[m,n] - M_next[m])
      } else {
        map P[m,n] = where(n <= m, exp(T[m,n] - M_next[m]), 0)
      }
      carry A[m,f] = A[m,f]*exp(M[m] - M_next[m])
      dot A[m,f] sum= sum[n] P[m,n] * V[b,n,f]
      reduce M[m] max= max[n] T[m,n]
    }
    store Y[b,m,f] = A[m,f]
  }
}
"""


def test_text_and_back() -> None:
    program = parse_program(PROGRAM)
    verify_program(program)
    assert print_program(program) == PROGRAM
    assert [loop.kind for loop in program.loops] == ["grid", "grid", "for"]


def lowered(text: str, sizes: dict[str, int]) -> tuple[Program, ...]:
    cascade = parse_cascade(text)
    rewriting = rewrite(cascade)
    operands = {}
    for einsum in rewriting.cascade.einsums:
        for item in einsum.reads:
            unit = len(item.args) - 1 if item.args else None
            operands[str(item.func.__name__)] = Operand("f32", unit)
    inputs = {name: operand for name, operand in operands.items() if name in rewriting.cascade.inputs}
    settings = Settings(sizes, inputs, machine=Caches(1 << 12, 1 << 14))
    return lower(rewriting.cascade, rewriting.monoids, cascade.outputs, settings).programs


TEXTS = {
    **{name: known.text for name, known in KNOWN.items()},
    **{name: entry[0] for name, entry in REFUSED.items()},
    **FORWARD,
    **{f"backward, {name}": text for name, text in BACKWARD.items()},
    "grouped": GROUPED,
}


def random_sizes(text: str, source: random.Random) -> dict[str, int]:
    ranks = [symbol.name for symbol in rewrite(parse_cascade(text)).cascade.ranks]
    return {name: source.choice([1, 2, 5, 33, 200]) for name in ranks} | {"B": 4, "W": 5, "P": 3, "R": 2}


@pytest.mark.parametrize("name", TEXTS)
def test_lowered_programs_read_back(name: str) -> None:
    """Whatever the sizes; lowering verifies each program as well."""
    sizes = random_sizes(TEXTS[name], fresh_random())
    print(sizes)
    for program in lowered(TEXTS[name], sizes):
        text = print_program(program)
        assert parse_program(text) == program
        verify_program(parse_program(text))


def test_random_programs_read_back() -> None:
    source = fresh_random()
    for _ in range(8):
        text = random_text(source.randrange(2**32))
        print(text)
        try:
            programs = lowered(text, random_sizes(text, source))
        except NotLowerable:
            continue
        for program in programs:
            assert parse_program(print_program(program)) == program


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("reduce M_next[m] = max[n] T[m,n]", "reduce M_next[m] = max[n] U[m,n]", "U is read before it is made"),
        ("map P[m,n] = exp", "map P[b,m,n] = exp", "a dimension that is one number here"),
        ("dot A[m,f] sum= sum[n] P[m,n]", "dot A[m,f] sum= sum[n] T[n,m]", "at other indices"),
        ("store Y[b,m,f] = A[m,f]", "store V[b,n,f] = A[m,f]", "is no output"),
        ("store Y[b,m,f] = A[m,f]", "store Y[b,m,f] = P[m,f]", "P is read before it is made"),
        ("for n step 256", "for m step 256", "walked by a loop around already"),
        ("grid b step 1", "for b step 1", "a grid loop inside a sequential one"),
        ("state M[m] = -inf", "skip unless m <= 3", "nothing to skip"),
        ("skip unless n <= m", "skip unless n <= f", "rank f is not walked"),
        ("reduce M[m] max= max[n] T[m,n]", "reduce Q[m] max= max[n] T[m,n]", "changed before it is made"),
        ("input V[b,n,f]", "input X[b,n,f]", "declared twice"),
        ("load T[m,n] = X[b,m,n]", "load T[m,n] = A[m,n]", "A is read at other indices"),
        ("sum[n] P[m,n] * V[b,n,f]", "sum[n,f] P[m,n] * V[b,n,f]", "both kept and reduced"),
        ("reduce M_next[m] = max[n] T[m,n]", "reduce R[n] = sum[m] T[m,n]", "only tiles of m, .* are reduced"),
    ],
)
def test_broken_rules_are_shown(old: str, new: str, message: str) -> None:
    assert old in PROGRAM
    program = parse_program(PROGRAM.replace(old, new))
    with pytest.raises(VerificationError, match=message):
        verify_program(program)


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("program softmax_sum in f32", "program softmax_sum in f8", ":1:"),
        ("bf16 unit n", "bf16 unit q", ":2:"),
        ("grid b step 1 {", "grid b step 0 {", ":6:"),
        ("grid b step 1 {", "grid b step 1", ":6:"),
        ("skip unless", "skip if", ":11:"),
        ("max[n] T", "med[n] T", ":13:"),
        ("} else {", "} or {", ":16:"),
        ("carry A", "carve A", ":19:"),
        ("dot A[m,f] sum= sum[n]", "dot A[m,f] sum= max[n]", ":20:"),
    ],
)
def test_bad_text_is_refused_with_its_place(old: str, new: str, where: str) -> None:
    assert old in PROGRAM
    with pytest.raises(ParseError) as caught:
        parse_program(PROGRAM.replace(old, new))
    assert where in caught.value.where


def test_an_unfinished_program_is_refused() -> None:
    with pytest.raises(ParseError, match="not closed"):
        parse_program(PROGRAM.rstrip().rstrip("}"))
    with pytest.raises(ParseError, match="ends where"):
        parse_program("")
