"""What every printer of tile programs asks of one: which ranks are points, how long ranks are, what may be outside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import sympy
from sympy.core.function import AppliedUndef

from ...ir.cascade import COMPARISONS, accesses, is_rank, ranks_of, tensor_name
from ...ir.tile import GRID, MAKERS, Loop, Program, Statement, Store, Tensor, expressions, walk


@dataclass
class Facts:
    """``steps``: walked rank -> its loop's step. ``sizes`` are the numbers the program was made for, ``shapes`` those
    of its tensors: they decide which accesses can leave their tensor."""

    program: Program
    sizes: Mapping[str, int]
    shapes: Mapping[str, Sequence[int]]
    steps: dict[sympy.Symbol, int] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, tuple[sympy.Symbol, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.steps = {loop.rank: loop.step for loop in self.program.loops}
        self.tensors = {item.name: item for item in self.program.tensors}
        self.values = self.program.values

    def is_point(self, rank: sympy.Symbol) -> bool:
        """Whether a tile has one coordinate of a rank."""
        return self.steps.get(rank) == 1

    def is_value(self, item: AppliedUndef) -> bool:
        """Whether an access reads a value of the program, rather than memory."""
        name = tensor_name(item)
        return name in self.values and tuple(item.args) == self.values[name]

    def size(self, rank: sympy.Symbol) -> int:
        return self.sizes[dict(self.program.alias).get(rank, rank).name]

    def can_leave(self, item: AppliedUndef) -> bool:
        """Whether an access to memory may lie outside the tensor for some coordinates."""
        name = tensor_name(item)
        for position, index in enumerate(item.args):
            extent = self.shapes[name][position]
            if index.is_Symbol and is_rank(index) and self.size(index) <= extent:
                continue
            low = high = sympy.expand(index).xreplace(
                {s: sympy.Integer(self.sizes[s.name.strip("|")]) for s in index.free_symbols if not is_rank(s)}
            )
            for s in ranks_of(index):
                slope = low.coeff(s)
                ends = (sympy.Integer(0), slope * (self.size(s) - 1))
                low, high = (
                    low.xreplace({s: sympy.Integer(0)}) + min(ends),
                    high.xreplace({s: sympy.Integer(0)}) + max(ends),
                )
            if low < 0 or high >= extent:
                return True
        return False


def read_by(item: Statement) -> set[str]:
    """The names of the values and tensors that a statement reads or changes, its nested statements included."""
    found: set[str] = set()
    for inner in walk((item,)):
        for e in expressions(inner):
            found.update(map(tensor_name, accesses(e)))
        if isinstance(inner, MAKERS):
            found.add(tensor_name(inner.target))
    return found


def comparison_text(condition: sympy.Expr) -> str:
    """``<=`` and its like for a comparison of the cascade language; empty for anything else."""
    return next((text for text, cls in COMPARISONS.items() if isinstance(condition, cls)), "")


def changed_by(body: Sequence[Statement]) -> frozenset[str]:
    """The values that statements make or change, nested ones included."""
    return frozenset(tensor_name(item.target) for item in walk(tuple(body)) if isinstance(item, MAKERS))


def around_the_grid(
    body: Sequence[Statement],
) -> tuple[Sequence[Statement], list[Loop], Sequence[Statement], Sequence[Statement]]:
    """(what each worker does first, the grid's loops, what is in them, what is done with the workers' sums)."""
    at = next((p for p, item in enumerate(body) if isinstance(item, Loop) and item.kind == GRID), None)
    if at is None:
        return [], [], body, []
    before, after = body[:at], body[at + 1 :]
    grid: list[Loop] = []
    inside: Sequence[Statement] = [body[at]]
    while len(inside) == 1 and isinstance(inside[0], Loop) and inside[0].kind == GRID:
        grid.append(inside[0])
        inside = inside[0].body
    return before, grid, inside, after


def sizes_of(program: Program) -> tuple[str, ...]:
    """Ranks and constants whose sizes a printed program may mention, those of aliases under the name that they
    follow."""
    found: dict[str, None] = {}
    alias = dict(program.alias)

    def note(symbols: Iterable[sympy.Symbol]) -> None:
        for symbol in sorted(symbols, key=lambda s: str(s.name)):
            found.setdefault(alias.get(symbol, symbol).name.strip("|"))

    for declared in program.tensors:
        note(declared.ranks)
    for item in walk(program.body):
        if isinstance(item, Loop):
            note([item.rank])
        for e in expressions(item):
            note(e.free_symbols)
        if isinstance(item, (*MAKERS, Store)):
            note(item.target.free_symbols)
    return tuple(found)
