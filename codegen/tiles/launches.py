"""Cutting a rewritten cascade into kernels: a list of launches, each with what it streams and what it stores.

A *unit* is what one loop over the streamed ranks must compute together: the states of one monoid, or one reduction.
Units of one level (longest chain of units through memory) that stream the same ranks and share tiles become one
kernel. What a unit reads that carries the streamed rank and is a reduction itself (scores, ``QK[m,n]``) is *inner*:
computed tile by tile inside the loop and never in memory. What does not carry it is read from memory, or computed by
the elements around.

A reduction is not inner if computing it again for each tile of a rank that it lacks would multiply its work: then it is
stored once, as a buffer between two kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import sympy
from sympy.core.function import AppliedUndef

from ...ir.cascade import accesses, ranks_of, tensor_name
from .dataflow import Dataflow, Value
from .errors import NotLowerable

#: A rank up to this size can be whole in a tile, so that nothing is computed again for its sake.
WHOLE = 512


@dataclass
class Kernel:
    """One launch. ``roots`` are computed by streaming; ``finals`` are maps of them, or of memory where nothing streams.

    ``stored`` names what the kernel writes to memory. ``anchor`` are kept ranks that its inner values have.
    """

    streamed: tuple[sympy.Symbol, ...]
    level: int
    roots: list[Value] = field(default_factory=list)
    finals: list[Value] = field(default_factory=list)
    stored: set[str] = field(default_factory=set)
    inner: set[str] = field(default_factory=set)
    anchor: frozenset[sympy.Symbol] = frozenset()
    reads: set[str] = field(default_factory=set)
    #: Two loops over the same tiles at once: roots that stream the first rank keep the second one whole.
    crossed: bool = False

    @property
    def names(self) -> set[str]:
        return {value.name for value in self.roots}


@dataclass(frozen=True)
class _Unit:
    roots: tuple[Value, ...]
    streamed: tuple[sympy.Symbol, ...]
    level: int
    inner: frozenset[str]
    anchor: frozenset[sympy.Symbol]
    reads: frozenset[str]


def substituted(value: Value, item: AppliedUndef) -> dict[sympy.Expr, sympy.Expr]:
    """The value's own ranks -> the indices that an access reads it at."""
    return dict(zip(value.indices, item.args, strict=True))


def ranks_read(item: AppliedUndef) -> frozenset[sympy.Symbol]:
    return frozenset().union(*(ranks_of(index) for index in item.args))


class Launches:
    """The kernels that compute ``outputs``. ``kernels`` is in launch order; ``buffers`` are tensors between them."""

    def __init__(
        self, flow: Dataflow, outputs: Iterable[str], sizes: Mapping[str, int], wide: frozenset[str] = frozenset()
    ) -> None:
        self.flow, self.sizes, self.wide = flow, sizes, wide
        self.outputs = tuple(outputs)
        self._units: dict[str, _Unit] = {}
        self._kernel_of: dict[str, Kernel] = {}
        self._open: set[str] = set()
        self._kernels: list[Kernel] = []
        for name in self.outputs:
            if name not in flow.values:
                raise NotLowerable(f"the output {name} is not computed by the rewritten cascade", where=name)
            self._demand(name)

    @cached_property
    def kernels(self) -> tuple[Kernel, ...]:
        return tuple(sorted(self._joined(), key=lambda kernel: kernel.level))

    def _joined(self) -> list[Kernel]:
        """The kernels, where one has moved into a later one that computes the same inner values in the same loop."""
        found = list(self._kernels)
        for early in sorted(self._kernels, key=lambda kernel: kernel.level):
            readers = [k for k in found if k is not early and k.reads & early.stored]
            for late in found:
                fits = late.level > early.level and early.roots and _one_loop(early, late)
                if fits and early.inner & late.inner and all(k.level > late.level for k in readers):
                    late.roots = self.ordered([*early.roots, *(r for r in late.roots if r.name not in early.names)])
                    late.finals = [*early.finals, *late.finals]
                    late.stored |= early.stored
                    late.inner |= early.inner
                    late.anchor |= early.anchor
                    late.reads |= early.reads
                    found.remove(early)
                    break
        return found

    def ordered(self, roots: list[Value]) -> list[Value]:
        order = list(self.flow.values)
        return sorted(roots, key=lambda root: order.index(root.name))

    @property
    def buffers(self) -> tuple[str, ...]:
        stored = [name for kernel in self.kernels for name in sorted(kernel.stored)]
        return tuple(name for name in stored if name not in self.outputs)

    # What is stored where ---------------------------------------------------------------------------------------------

    def _demand(self, name: str) -> Kernel:
        """The kernel that leaves a tensor in memory."""
        if name not in self._kernel_of:
            if name in self._open:
                raise NotLowerable(f"{name} depends on itself", where=name)
            self._open.add(name)
            value = self.flow.values[name]
            kernel = self._host(value) if value.is_map else self._kernel(value)
            self._kernel_of[name] = kernel
            self._open.discard(name)
        kernel = self._kernel_of[name]
        kernel.stored.add(name)
        return kernel

    def _kernel(self, value: Value) -> Kernel:
        """The kernel that computes a reduction or state, whether stored or not."""
        if value.name in self._units:
            return self._kernel_of_root(value.name)
        unit = self._unit(value)
        for each in unit.roots:
            self._units[each.name] = unit
        kernel = next((k for k in self._kernels if k.roots and _fits(k, unit)), None)
        if kernel is None:
            kernel = Kernel(unit.streamed, unit.level, anchor=unit.anchor)
            self._kernels.append(kernel)
        kernel.roots = self.ordered([*kernel.roots, *(v for v in unit.roots if v.name not in kernel.names)])
        kernel.inner |= unit.inner
        kernel.reads |= unit.reads
        kernel.anchor = kernel.anchor | unit.anchor if kernel.inner else kernel.anchor & unit.anchor
        return kernel

    def _kernel_of_root(self, name: str) -> Kernel:
        return next(kernel for kernel in self._kernels if name in kernel.names)

    def _host(self, value: Value) -> Kernel:
        """Where a map is computed: at the end of the one kernel that has what it needs, else in a kernel of its own."""
        needed = self._reductions(value)
        hosts: list[Kernel] = []
        for each in needed:
            kernel = self._kernel(each)
            if kernel not in hosts:
                hosts.append(kernel)
        top = max((kernel.level for kernel in hosts), default=0)
        last = [kernel for kernel in hosts if kernel.level == top]
        if len(last) == 1 and set(value.indices) <= self._epilogue_ranks(last[0]):
            kernel = last[0]
            for each in needed:
                if each.name not in kernel.names:
                    self._demand(each.name)
                    kernel.reads.add(each.name)
            kernel.finals.append(value)
            return kernel
        return self._map_kernel(value)

    def _epilogue_ranks(self, kernel: Kernel) -> set[sympy.Symbol]:
        return {symbol for root in kernel.roots for symbol in root.indices}

    def _map_kernel(self, value: Value) -> Kernel:
        reads: set[str] = set()
        inner: set[str] = set()
        level = 0
        for item in accesses(self.inline(value.body, frozenset(value.indices))):
            found = self.flow.value(item)
            if found is None:
                continue
            if self.is_inner(found, item, value, frozenset(value.indices), 1):
                inner.add(found.name)
                level = max(level, self._inner_level(found, item, frozenset(value.indices), reads, inner))
            else:
                level = max(level, self._demand(found.name).level)
                reads.add(found.name)
        kernel = Kernel((), level + 1, [], [value], {value.name}, inner, frozenset(value.indices), reads)
        self._kernels.append(kernel)
        return kernel

    def _reductions(self, value: Value) -> list[Value]:
        """The reductions and states that a map reads, through other maps."""
        found: dict[str, Value] = {}
        waiting = [value.body]
        while waiting:
            for item in accesses(waiting.pop()):
                each = self.flow.value(item)
                if each is None:
                    continue
                if each.is_map:
                    waiting.append(each.body)
                else:
                    found[each.name] = each
        return list(found.values())

    # Units ------------------------------------------------------------------------------------------------------------

    def _unit(self, value: Value) -> _Unit:
        values = self._together(value)
        streamed = tuple(s for s in value.reduced if all(s in each.reduced or not each.reduced for each in values))
        if not streamed:
            raise NotLowerable("reductions that belong together have no rank in common", where=value.name)
        inner: set[str] = set()
        reads: set[str] = set()
        level = 0
        for each in values:
            for body in (each.body, each.carry):
                if body is not None:
                    level = max(level, self._scan(body, each, frozenset(streamed), reads, inner, 1))
        kept = {symbol for each in values for symbol in each.indices}
        carried = {symbol for name in inner for symbol in self.flow.values[name].indices}
        anchor = frozenset(kept & carried) if inner else frozenset(kept)
        return _Unit(values, streamed, level + 1, frozenset(inner), anchor, frozenset(reads))

    def _together(self, value: Value) -> tuple[Value, ...]:
        """The value and, for a state, all states that it reads within a step, in cascade order."""
        found, waiting = {value.name}, [value]
        while waiting:
            each = waiting.pop()
            for body in (each.body, each.carry):
                for item in accesses(self.inline(body, frozenset(each.reduced))) if body is not None else ():
                    state = self.flow.state(item)
                    if state is not None and state.name not in found:
                        found.add(state.name)
                        waiting.append(state)
        return tuple(each for name, each in self.flow.values.items() if name in found)

    def _scan(
        self,
        e: sympy.Expr,
        reader: Value,
        streamed: frozenset[sympy.Symbol],
        reads: set[str],
        inner: set[str],
        depth: int,
    ) -> int:
        """Note what an expression inside a loop reads from memory and what is inner; the level of what is read."""
        level = 0
        for item in accesses(self.inline(e, streamed)):
            found = self.flow.value(item)
            if found is None:
                continue
            if self.is_inner(found, item, reader, streamed, depth):
                inner.add(found.name)
                level = max(level, self._inner_level(found, item, streamed, reads, inner))
            else:
                level = max(level, self._demand(found.name).level)
                reads.add(found.name)
        return level

    def _inner_level(
        self,
        value: Value,
        item: AppliedUndef,
        streamed: frozenset[sympy.Symbol],
        reads: set[str],
        inner: set[str],
    ) -> int:
        level = 0
        for each in self._together(value):
            inner.add(each.name)
            body = each.body.xreplace(substituted(value, item)) if each is value else each.body
            level = max(level, self._scan(body, value, streamed, reads, inner, 2))
        return level

    def is_inner(
        self, value: Value, item: AppliedUndef, reader: Value, streamed: frozenset[sympy.Symbol], depth: int
    ) -> bool:
        """Whether a reduction is computed tile by tile for its reader, rather than read from memory."""
        if value.is_map:
            return False
        carried = ranks_read(item)
        if not carried & streamed or any(not index.is_Symbol for index in item.args):
            return False
        if not self.may_be_inner(value):
            return False
        if value.name in self.wide or self._is_wide(value):
            return True
        if not reader.reduced and not streamed <= carried:
            # A map kernel: what lacks one of its ranks is a smaller tensor, stored once.
            return False
        lacking = [symbol for symbol in reader.indices if symbol not in carried]
        return all(self.sizes[s.name] <= WHOLE for s in lacking) if depth == 1 else not lacking

    def may_be_inner(self, value: Value) -> bool:
        """Whether a reduction is ever computed inside a loop over one of its ranks, rather than stored."""
        if value.name in self.wide or self._is_wide(value):
            return True
        return not value.is_state and self._is_outer_product(value)

    def _is_outer_product(self, value: Value) -> bool:
        """Made of inputs, none of which has all its ranks: as cheap to make as to store, and larger for longer
        ranks."""
        parts = accesses(self.inline(value.body, frozenset(value.indices)))
        own = frozenset(value.indices)
        return bool(parts) and all(
            tensor_name(item) in self.flow.inputs and not own <= ranks_read(item) for item in parts
        )

    def _is_wide(self, value: Value) -> bool:
        """Larger than everything that it is made of."""
        own = math.prod(self.sizes[s.name] for s in value.indices)
        parts = [self._footprint(item) for item in accesses(self.inline(value.body, frozenset(value.indices)))]
        return bool(parts) and own > max(parts)

    def _footprint(self, item: AppliedUndef) -> int:
        return math.prod(self.sizes[s.name] for s in ranks_read(item))

    # Maps -------------------------------------------------------------------------------------------------------------

    def inline(self, e: sympy.Expr, streamed: frozenset[sympy.Symbol]) -> sympy.Expr:
        """The expression with maps replaced by what they map, except those that only need finished reductions."""
        while True:
            table: dict[sympy.Expr, sympy.Expr] = {}
            for item in accesses(e):
                value = self.flow.value(item)
                if value is None or not value.is_map or self.is_settled(item, streamed):
                    continue
                table[item] = value.body.xreplace(substituted(value, item))
            if not table:
                return e
            e = e.xreplace(table)

    def is_settled(self, item: AppliedUndef, streamed: frozenset[sympy.Symbol]) -> bool:
        """Whether a map is ready before the loop: it needs reductions, and none that is computed in the loop."""
        walked, finished = self._dependence(item, streamed)
        return finished and not walked

    def _dependence(self, item: AppliedUndef, streamed: frozenset[sympy.Symbol]) -> tuple[bool, bool]:
        """(reads a reduction that carries a streamed rank or a running state, reads another reduction)."""
        if self.flow.state(item) is not None:
            return True, False
        value = self.flow.value(item)
        if value is None:
            return False, False
        if not value.is_map:
            walked = bool(ranks_read(item) & streamed) and self.may_be_inner(value)
            return walked, not walked
        walked = finished = False
        for inner in accesses(value.body.xreplace(substituted(value, item))):
            a, b = self._dependence(inner, streamed)
            walked, finished = walked or a, finished or b
        return walked, finished


def _fits(kernel: Kernel, unit: _Unit) -> bool:
    """Whether a unit can share a kernel: same level, same loop, and tiles in common."""
    if kernel.level != unit.level or not _one_loop(kernel, unit):
        return False
    if kernel.inner & unit.inner:
        return True
    return kernel.anchor <= unit.anchor or unit.anchor <= kernel.anchor


def _one_loop(first: Kernel | _Unit, second: Kernel | _Unit) -> bool:
    """Whether both stream the same ranks, and neither keeps a rank that the other one sums over within a step: tiles of
    the kept rank would each hold a part of that sum."""
    if set(first.streamed) != set(second.streamed):
        return False
    return not any(
        (set(own.reduced) - set(a.streamed)) & set(other.indices)
        for a, b in ((first, second), (second, first))
        for own in a.roots
        for other in b.roots
    )
