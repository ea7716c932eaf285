"""Rewritten cascades to tile programs: one program a launch.

lower: Cascade, monoids, sizes, how inputs lie in memory -> [Program]. Raises ``NotLowerable`` with a reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import sympy
from sympy.core.function import AppliedUndef

from ...ir.cascade import (
    IDENTITY,
    Cascade,
    Greater,
    LessEqual,
    Maximum,
    access,
    accesses,
    is_rank,
    rank,
    ranks_of,
    tensor_name,
)
from ...ir.monoid import Monoid
from ...ir.tile import (
    BUFFER,
    GRID,
    INPUT,
    OUTPUT,
    SEQUENTIAL,
    Cases,
    Loop,
    Program,
    Skip,
    Statement,
    Store,
    Tensor,
    walk,
)
from ...ir.tile import expressions as expressions_of
from ...ir.tile_verifier import verify_program
from .body import Body, Layout, Names, Shared, held_states, state_statements
from .crossing import cross
from .dataflow import Value, dataflow, following
from .errors import NotLowerable
from .exclusion import Exclusion
from .launches import Kernel, Launches, substituted
from .predicates import certain_part, conditions, decidable, limit, where_false, where_true
from .roles import Caches, Machine, Roles, choose_roles
from .split import Parts, choose_parts, merging

#: Index variables are compared as floating-point numbers: exact below this.
LARGEST_INDEX = {"f32": 1 << 24, "f64": 1 << 53}


@dataclass(frozen=True)
class Operand:
    """How a tensor lies in memory: its element type, and the dimension that has stride 1 (None: none is known to)."""

    dtype: str
    unit: int | None


@dataclass(frozen=True)
class Settings:
    """``operands``: how inputs and outputs lie in memory. ``sizes``: ranks and named constants. ``wide``: never stored.

    ``crossing`` and ``splitting`` allow one kernel for two directions, and parts of a streamed rank at once.
    """

    sizes: Mapping[str, int]
    operands: Mapping[str, Operand]
    compute: str = "f32"
    wide: frozenset[str] = frozenset()
    machine: Machine = field(default_factory=Caches.of_this_machine)
    crossing: bool = True
    splitting: bool = True


@dataclass(frozen=True)
class Lowered:
    """Programs in launch order, and the sizes of ranks that they have and the cascade has not."""

    programs: tuple[Program, ...]
    sizes: Mapping[str, int]


def lower(
    cascade: Cascade, monoids: Iterable[Monoid], outputs: Iterable[str], settings: Settings, name: str = "kernel"
) -> Lowered:
    """The programs that compute ``outputs``."""
    for rank_name, size in settings.sizes.items():
        if size < 1:
            raise NotLowerable(f"rank {rank_name} is empty")
        if size >= LARGEST_INDEX[settings.compute]:
            raise NotLowerable(f"rank {rank_name} is too long for exact comparisons in {settings.compute}")
    flow = dataflow(cascade, monoids)
    launches = Launches(flow, outputs, settings.sizes, settings.wide)
    kernels = list(launches.kernels)
    if settings.crossing:
        cross(launches, kernels, 8 if settings.compute == "f64" else 4)
    programs: list[Program] = []
    sizes: dict[str, int] = {}
    for kernel in kernels:
        lowering = _Lowering(launches, kernel, settings, cascade)
        part = rank(f"part{len(programs)}")
        parts = choose_parts(kernel, lowering.roles, settings.sizes, part, settings.machine)
        if (
            parts is not None
            and settings.splitting
            and not {parts.rank.name, *map(parts.name, kernel.names)} & (lowering.names.taken)
        ):
            sizes[parts.rank.name] = parts.count
            programs.append(lowering.first_part(f"{name}_{len(programs)}", parts))
            programs.append(lowering.merged(f"{name}_{len(programs)}", parts))
        else:
            programs.append(lowering.program(f"{name}_{len(programs)}"))
    return Lowered(tuple(programs), sizes)


class _Lowering:
    def __init__(self, launches: Launches, kernel: Kernel, settings: Settings, cascade: Cascade) -> None:
        self.launches, self.kernel, self.settings = launches, kernel, settings
        self.parts: Parts | None = None
        units = {key: operand.unit for key, operand in settings.operands.items()}
        item_bytes = 8 if settings.compute == "f64" else 4
        self.roles = choose_roles(launches, kernel, settings.sizes, units, settings.machine, item_bytes)
        taken = {*launches.flow.inputs, *launches.outputs, *launches.buffers, *kernel.names}
        taken |= {following(value) for value in launches.flow.values}
        taken |= {symbol.name for symbol in cascade.ranks} | set(settings.sizes)
        self.names = Names(taken)
        kept = [s for value in (*kernel.roots, *kernel.finals) for s in value.indices]
        self.layout = Layout(self.roles, [s for s in dict.fromkeys(kept) if s not in self.roles.grid])
        self.shared = Shared()
        self.memory = {name: self.unit(name) for name in (*launches.flow.inputs, *sorted(kernel.reads))}
        self.held = held_states(launches, kernel)

    def unit(self, name: str) -> int | None:
        """The dimension that can be an operand's inner one: of stride 1, and of the type computed in."""
        operand = self.settings.operands.get(name)
        if operand is None:
            value = self.launches.flow.values.get(name)
            return len(value.indices) - 1 if value is not None and value.indices else None
        return operand.unit if operand.dtype == self.settings.compute else None

    def program(self, name: str) -> Program:
        inside = self.streaming() if self.kernel.roots else []
        end = self.epilogue()
        # What is prepared once is only known after all that may ask for it.
        return self.finish(name, [*self.shared.statements, *inside, *end])

    def first_part(self, name: str, parts: Parts) -> Program:
        """The states of each part of the streamed rank, stored."""
        self.parts = parts
        inside = self.streaming()
        stores = [
            Store(
                access(parts.name(root.name), (parts.rank, *root.indices)), self.layout.value(root.name, root.indices)
            )
            for root in self.kernel.roots
        ]
        body = (Loop(GRID, parts.rank, 1, (*self.shared.statements, *inside, *stores)),)
        return self.finish(name, body)

    def merged(self, name: str, parts: Parts) -> Program:
        """The parts' states merged, and what the kernel computes at its end."""
        inside = merging(self.launches, self.kernel, self.layout, self.held, parts)
        states = state_statements(self.kernel.roots, self.layout)
        return self.finish(name, [*states, *inside, *self.epilogue()])

    def finish(self, name: str, statements: Sequence[Statement]) -> Program:
        body = tuple(statements)
        for s in reversed(self.roles.grid):
            body = (Loop(GRID, s, self.roles.steps[s], body),)
        alias = tuple(self.names.alias.items())
        program = Program(name, self.tensors(body), body, self.settings.compute, alias)
        verify_program(program)
        return program

    # The streamed loop ------------------------------------------------------------------------------------------------

    def streaming(self) -> list[Statement]:
        streamed = frozenset(self.roles.streamed)
        raw = {root.name: self.launches.inline(root.body, streamed) for root in self.kernel.roots}
        masks = [c for c in conditions(raw.values()) if self.is_known(self.walked(c))]
        steps = self.version(raw)
        certain = sympy.Mul(*(certain_part(self.walked(c), self.roles.ranges, self.scans) for c in masks))
        if certain != 1:
            known = frozenset(sympy.Mul.make_args(certain))
            full = self.version({name: where_true(e, known) for name, e in raw.items()})
            steps = [Cases(certain, tuple(full), tuple(steps))]
        skips = [skip for c in masks if (skip := self.skip(c, raw)) is not None]
        body: tuple[Statement, ...] = (*skips, *steps)
        if self.kernel.crossed:
            return self.crossed(body)
        for s in reversed(self.roles.streamed):
            part = (self.parts.rank, self.parts.length) if self.parts is not None else (None, 0)
            body = (Loop(SEQUENTIAL, s, self.roles.steps[s], body, *part),)
            if s == self.roles.streamed[-1]:
                body = (*self.shared.outer, *body)
        return [*state_statements(self.kernel.roots, self.layout), *body]

    def crossed(self, body: tuple[Statement, ...]) -> list[Statement]:
        """Two loops: what sums over the inner rank lives for one round of it, what sums over the outer one
        throughout."""
        outer, inner = self.roles.streamed
        whole = [root for root in self.kernel.roots if outer in root.reduced]
        short = [root for root in self.kernel.roots if outer not in root.reduced]
        body = (Loop(SEQUENTIAL, inner, self.roles.steps[inner], body),)
        body = (*state_statements(short, self.layout), *self.shared.outer, *body, *self.stores(short))
        body = (Loop(GRID if self.roles.workers else SEQUENTIAL, outer, self.roles.steps[outer], body),)
        return [*state_statements(whole, self.layout), *body, *self.stores(whole)]

    def stores(self, roots: Sequence[Value]) -> list[Statement]:
        return [
            Store(access(root.name, root.indices), self.layout.value(root.name, root.indices))
            for root in roots
            if root.name in self.kernel.stored
        ]

    def walked(self, condition: sympy.Expr) -> sympy.Expr:
        """The factors of a condition that say something of the ranks that loops walk, and of no others."""
        parts = sympy.Mul.make_args(condition)
        own = [part for part in parts if ranks_of(part) <= self.roles.steps.keys()]
        return condition if len(own) == len(parts) else sympy.Mul(*own)

    def is_known(self, condition: sympy.Expr) -> bool:
        """Whether tile bounds can decide a condition; what it reads besides ranks must be in memory."""
        parts = [part for part in sympy.Mul.make_args(condition) if decidable(part, self.roles.ranges, self.scans)]
        return bool(parts) and all(self.in_memory(item) for part in parts for item in accesses(part))

    def in_memory(self, item: AppliedUndef) -> bool:
        return tensor_name(item) in self.launches.flow.inputs

    @property
    def scans(self) -> bool:
        return self.settings.machine.scans

    def skip(self, condition: sympy.Expr, raw: Mapping[str, sympy.Expr]) -> Skip | None:
        """What leaves out the tiles where the condition holds nowhere; None if they change something."""
        outside = {name: where_false(e, condition) for name, e in raw.items()}
        if all(self.vanishes(name, e) for name, e in outside.items()):
            return Skip(self.walked(condition))
        if not self.scans or (len(self.roles.streamed) > 1 and not self.kernel.crossed):
            return None
        exclusion = Exclusion(ranks_of(condition) | frozenset(self.roles.streamed))
        for name, e in outside.items():
            root = self.launches.flow.values[name]
            own = access(name, root.indices)
            lowered = exclusion.of_maximum(e, own) if root.reduction == "max" else exclusion.of(e)
            if not self.vanishes(name, lowered):
                return None
        return self.unless_masked(self.walked(condition), exclusion.above)

    def unless_masked(self, condition: sympy.Expr, above: Mapping[AppliedUndef, sympy.Expr]) -> Skip | None:
        """A skip for a finite mask. A row's statistic that lies in memory says at once whether the row has anything
        that is not masked; one that the loop computes says so at the loop's end."""
        states = {named: root for root in self.kernel.roots for named in (root.name, following(root.name))}
        holds: dict[sympy.Expr, None] = {}
        for item, least in above.items():
            root = states.get(tensor_name(item))
            if root is not None and tuple(item.args) == root.indices and not self.kernel.crossed:
                holds[Greater(self.layout.value(root.name, root.indices), least)] = None
            elif self.in_memory(item) and decidable(LessEqual(item, least), self.roles.ranges, self.scans):
                condition = Maximum(condition, LessEqual(item, least))
            else:
                return None
        return Skip(condition, sympy.Mul(*holds) if holds else None)

    def vanishes(self, name: str, e: sympy.Expr) -> bool:
        """Whether a tile where a root's element is ``e`` changes nothing."""
        root = self.launches.flow.values[name]
        if root.recurrence:
            return False
        return root.reduction is None or limit(e) == IDENTITY[root.reduction]

    def version(self, elements: Mapping[str, sympy.Expr]) -> list[Statement]:
        body = self.body()
        lowered = {root.name: body.lower(elements[root.name], root) for root in self.kernel.roots}
        return body.step(lowered)

    def body(self) -> Body:
        return Body(
            self.launches, self.kernel, self.roles, self.layout, self.names, self.shared, self.memory, self.held
        )

    # The end ----------------------------------------------------------------------------------------------------------

    def epilogue(self) -> list[Statement]:
        found = [] if self.kernel.crossed else self.stores(self.kernel.roots)
        for value in self.kernel.finals:
            target = access(value.name, value.indices)
            if self.kernel.roots:
                found.append(Store(target, self.finished(value.body)))
            else:
                body = self.body()
                e = body.lower(value.body, value)
                found += [*body.statements, Store(target, e)]
        return found

    def finished(self, e: sympy.Expr) -> sympy.Expr:
        """An expression over the last states and memory."""
        while True:
            table: dict[sympy.Expr, sympy.Expr] = {}
            for item in accesses(e):
                value = self.launches.flow.value(item)
                if value is not None and value.is_map and value.name not in self.kernel.reads:
                    table[item] = value.body.xreplace(substituted(value, item))
            if not table:
                break
            e = e.xreplace(table)
        table = {}
        for item in accesses(e):
            value = self.launches.flow.value(item)
            if value is not None and value.name in self.kernel.names:
                if tuple(item.args) != value.indices:
                    raise NotLowerable(f"{item} is read at other indices than it is computed at", where=value.name)
                # A name of its own meanwhile: the value and the tensor in memory are called the same.
                table[item] = self.layout.value(value.name, value.indices)
        return e.xreplace(table)

    # Tensors ----------------------------------------------------------------------------------------------------------

    def tensors(self, body: tuple[Statement, ...]) -> tuple[Tensor, ...]:
        made = {
            tensor_name(item.target) for item in walk(body) if hasattr(item, "target") and not isinstance(item, Store)
        }
        read: dict[str, AppliedUndef] = {}
        for item in walk(body):
            for e in expressions_of(item):
                for each in accesses(e):
                    if tensor_name(each) not in made:
                        read.setdefault(tensor_name(each), each)
        found = [self.tensor(name, each) for name, each in read.items()]
        for item in walk(body):
            if isinstance(item, Store):
                found.append(self.stored(tensor_name(item.target)))
        return tuple(found)

    def tensor(self, name: str, item: AppliedUndef) -> Tensor:
        if name in self.part_names:
            return self.stored(name)
        if name in self.launches.flow.values:
            return self.stored(name)
        ranks = []
        for position, index in enumerate(item.args):
            plain = index.is_Symbol and is_rank(index)
            ranks.append(index if plain else rank(f"dim{position}_of_{name}".lower()))
        operand = self.settings.operands[name]
        return Tensor(name, tuple(ranks), operand.dtype, INPUT, operand.unit)

    @property
    def part_names(self) -> dict[str, Value]:
        """Tensors that hold parts' states -> the state."""
        return {self.parts.name(root.name): root for root in self.kernel.roots} if self.parts is not None else {}

    def stored(self, name: str) -> Tensor:
        if name in self.part_names and self.parts is not None:
            ranks = (self.parts.rank, *self.part_names[name].indices)
            return Tensor(name, ranks, self.settings.compute, BUFFER, len(ranks) - 1)
        value = self.launches.flow.values[name]
        role = OUTPUT if name in self.launches.outputs else BUFFER
        if name in self.kernel.reads and name not in self.kernel.stored:
            role = INPUT if role == OUTPUT else BUFFER
        operand = self.settings.operands.get(name)
        unit = len(value.indices) - 1 if value.indices else None
        if operand is not None:
            return Tensor(name, value.indices, operand.dtype, role, operand.unit)
        return Tensor(name, value.indices, self.settings.compute, role, unit)


def ranks_in(program: Program) -> frozenset[sympy.Symbol]:
    """Every rank of a program."""
    found: set[sympy.Symbol] = set()
    for item in walk(program.body):
        if isinstance(item, Loop):
            found.add(item.rank)
        for e in expressions_of(item):
            found |= ranks_of(e)
        if hasattr(item, "target"):
            found |= ranks_of(item.target)
    return frozenset(found)


__all__ = ["Operand", "Roles", "Settings", "lower", "ranks_in"]
