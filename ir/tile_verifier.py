"""What must hold of a tile program; ``verify_program`` raises ``VerificationError`` with the lines around what is
wrong."""

from __future__ import annotations

from collections.abc import Iterable

import sympy
from sympy.core.function import AppliedUndef

from ..errors import VerificationError
from .cascade import accesses, is_rank, ranks_of, tensor_name
from .tile import (
    GRID,
    INPUT,
    MAKERS,
    Carry,
    Cases,
    Dot,
    Load,
    Loop,
    Program,
    Reduce,
    Skip,
    State,
    Statement,
    Store,
    Tensor,
    expressions,
)
from .tile_printer import print_head, print_program, print_statement

_AROUND = 3


def verify_program(program: Program) -> None:
    """Check names, dimensions, scopes and the shapes of matrix products.

    A value is known from where it is made to the end of the block that it is made in. Every rank of a statement is
    walked by a loop around it, or a whole dimension of what the statement makes, stores or reduces. What is reduced
    over a grid's rank is kept outside of the grid.
    """
    _Checker(program).check()


class _Checker:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.tensors: dict[str, Tensor] = {}
        self.steps: dict[sympy.Symbol, int] = {}
        #: Rank of a grid loop around -> the values made outside of it.
        self.before: dict[sympy.Symbol, frozenset[str]] = {}

    def check(self) -> None:
        for tensor in self.program.tensors:
            if tensor.name in self.tensors:
                raise VerificationError(f"the tensor {tensor.name} is declared twice", where=self.program.name)
            if tensor.unit is not None and not 0 <= tensor.unit < len(tensor.ranks):
                raise VerificationError(f"{tensor.name} has no dimension {tensor.unit}", where=self.program.name)
            self.tensors[tensor.name] = tensor
        self.block(self.program.body, {}, [])

    def fail(self, item: Statement, message: str) -> VerificationError:
        """The error, with the lines around the statement."""
        lines = print_program(self.program).splitlines()
        if isinstance(item, Loop):
            own = print_head(item)
        elif isinstance(item, Cases):
            own = "if all "
        else:
            own = print_statement(item)
        at = next((number for number, line in enumerate(lines) if line.strip().startswith(own)), 0)
        around = lines[max(0, at - _AROUND) : at + _AROUND + 1]
        shown = "\n".join(("> " if line is lines[at] else "  ") + line for line in around)
        return VerificationError(f"{message}\n{shown}", where=f"{self.program.name}:{at + 1}")

    def block(
        self, body: Iterable[Statement], outer: dict[str, tuple[sympy.Symbol, ...]], loops: list[Loop]
    ) -> dict[str, tuple[sympy.Symbol, ...]]:
        """Check statements that see the values ``outer``; returns what is known after the last."""
        known = dict(outer)
        for item in body:
            if isinstance(item, Loop):
                self.loop(item, known, loops)
            elif isinstance(item, Cases):
                self.condition(item, item.condition, known)
                branches = [self.block(branch, known, loops) for branch in (item.full, item.partial)]
                # What both branches make is known after them.
                known.update({name: ranks for name, ranks in branches[0].items() if branches[1].get(name) == ranks})
            elif isinstance(item, Skip):
                if not loops or loops[-1].kind == GRID:
                    raise self.fail(item, "nothing to skip: no sequential loop is around")
                self.condition(item, item.condition, known)
                if item.holds is not None:
                    self.reads(item, item.holds, known)
            else:
                self.simple(item, known)
        return known

    def loop(self, item: Loop, known: dict[str, tuple[sympy.Symbol, ...]], loops: list[Loop]) -> None:
        if item.rank in self.steps:
            raise self.fail(item, f"rank {item.rank} is walked by a loop around already")
        if item.kind == GRID and any(loop.kind != GRID for loop in loops):
            raise self.fail(item, "a grid loop inside a sequential one")
        if item.step < 1:
            raise self.fail(item, "a step is at least 1")
        if item.part is not None and (not self.is_point(item.part) or item.length < 1):
            raise self.fail(item, f"{item.part} is not walked point by point around its part of {item.rank}")
        self.steps[item.rank] = item.step
        if item.kind == GRID:
            self.before[item.rank] = frozenset(known)
        self.block(item.body, known, [*loops, item])
        del self.steps[item.rank]
        self.before.pop(item.rank, None)

    def is_point(self, rank: sympy.Symbol) -> bool:
        return self.steps.get(rank) == 1

    def condition(self, item: Statement, e: sympy.Expr, known: dict[str, tuple[sympy.Symbol, ...]]) -> None:
        loose = ranks_of(e) - set(self.steps)
        if loose:
            raise self.fail(item, f"rank {min(s.name for s in loose)} is not walked here")
        self.reads(item, e, known)

    def simple(self, item: Statement, known: dict[str, tuple[sympy.Symbol, ...]]) -> None:
        assert not isinstance(item, Loop | Cases | Skip)
        name = tensor_name(item.target)
        reduced = item.reduced if isinstance(item, Reduce | Dot) else ()
        if isinstance(item, Store):
            self.store(item)
        else:
            self.target(item, name, known)
        for e in expressions(item):
            self.reads(item, e, known)
            outside = ranks_of(e) - ranks_of(item.target) - set(reduced)
            loose = {s for s in outside if not self.is_point(s)}
            if loose:
                raise self.fail(item, f"rank {min(s.name for s in loose)} is neither kept, reduced nor one number here")
        if isinstance(item, Reduce | Dot):
            self.reduction(item, name)
        if isinstance(item, Dot):
            self.product(item)
        if isinstance(item, Load) and tensor_name(item.source) not in self.tensors:
            raise self.fail(item, f"{tensor_name(item.source)} is no tensor in memory")
        if isinstance(item, MAKERS):
            known[name] = tuple(item.target.args)

    def reduction(self, item: Reduce | Dot, name: str) -> None:
        if set(item.reduced) & ranks_of(item.target):
            raise self.fail(item, "a rank is both kept and reduced")
        for s in item.reduced:
            if s in self.before and not (item.accumulate and name in self.before[s]):
                raise self.fail(item, f"only tiles of {s}, which are independent here, are reduced")

    def target(self, item: Statement, name: str, known: dict[str, tuple[sympy.Symbol, ...]]) -> None:
        assert isinstance(item, MAKERS)
        ranks = tuple(item.target.args)
        if any(not s.is_Symbol or not is_rank(s) for s in ranks) or len(set(ranks)) != len(ranks):
            raise self.fail(item, f"the dimensions of {name} are no distinct ranks")
        if any(self.is_point(s) for s in ranks):
            raise self.fail(item, f"{name} has a dimension that is one number here")
        if known.get(name, ranks) != ranks:
            raise self.fail(item, f"{name} has other dimensions elsewhere")
        changes = isinstance(item, Carry) or (isinstance(item, Reduce | Dot) and item.accumulate)
        if changes and name not in known:
            raise self.fail(item, f"{name} is changed before it is made")
        if isinstance(item, State) and name in known:
            raise self.fail(item, f"the state {name} exists already")

    def store(self, item: Store) -> None:
        tensor = self.tensors.get(tensor_name(item.target))
        if tensor is None or tensor.role == INPUT:
            raise self.fail(item, f"{tensor_name(item.target)} is no output")
        if len(tensor.ranks) != len(item.target.args):
            raise self.fail(item, f"{tensor.name} has {len(tensor.ranks)} dimensions")

    def reads(self, item: Statement, e: sympy.Expr, known: dict[str, tuple[sympy.Symbol, ...]]) -> None:
        for each in accesses(e):
            name = tensor_name(each)
            if name in known and tuple(each.args) == known[name]:
                continue
            if name not in self.tensors:
                kind = "at other indices than its own" if name in known else "before it is made"
                raise self.fail(item, f"{name} is read {kind}")
            if len(each.args) != len(self.tensors[name].ranks):
                raise self.fail(item, f"{name} has {len(self.tensors[name].ranks)} dimensions, not {len(each.args)}")

    def product(self, item: Dot) -> None:
        left, right = (self.ranges(each) for each in (item.left, item.right))
        rows = [s for s in item.target.args if s in left]
        columns = [s for s in item.target.args if s in right]
        if not rows or not columns or (*rows, *columns) != tuple(item.target.args):
            raise self.fail(item, "the target of a product has the left operand's dimensions, then the right one's")
        if left != {*rows, *item.reduced} or right != {*columns, *item.reduced}:
            raise self.fail(item, "both operands of a product have every reduced rank, and no other that is not kept")

    def ranges(self, item: AppliedUndef) -> set[sympy.Symbol]:
        return {s for s in ranks_of(item) if not self.is_point(s)}
