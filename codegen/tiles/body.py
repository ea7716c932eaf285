"""The statements of one kernel: what is computed for a tile, in which order, and which values are shared.

A *version* of a loop body is built from the element expressions of the kernel's roots, with masks resolved or not.
Inner reductions become ``dot`` or ``reduce`` statements, roots become updates of states; an operand of a matrix
product that is no plain access becomes a value of its own, as does a costly expression that several statements read.
"""

from __future__ import annotations

from collections.abc import Iterable

import sympy
from sympy.core.function import AppliedUndef

from ...ir.cascade import Sigmoid, access, accesses, rank, ranks_of, tensor_name
from ...ir.monoid import join
from ...ir.tile import Carry, Dot, Load, Map, Reduce, State, Statement
from .dataflow import Value, following, previous
from .errors import NotLowerable
from .launches import Kernel, Launches, ranks_read, substituted
from .operands import Split, split_product
from .roles import Roles

#: Functions that cost more than reading a value back.
_COSTLY = (sympy.exp, sympy.log, sympy.tanh, Sigmoid)


class Names:
    """Names that no tensor and no other value of the program has, and ranks that stand for another of its size."""

    def __init__(self, taken: Iterable[str]) -> None:
        self.taken = set(taken)
        self.alias: dict[sympy.Symbol, sympy.Symbol] = {}

    def value(self, hint: str) -> str:
        name, count = hint, 1
        while name in self.taken:
            count += 1
            name = f"{hint}_{count}"
        self.taken.add(name)
        return name

    def rank(self, like: sympy.Symbol) -> sympy.Symbol:
        name, count = f"{like.name}_1", 1
        while name in self.taken:
            count += 1
            name = f"{like.name}_{count}"
        self.taken.add(name)
        made = rank(name)
        self.alias[made] = self.alias.get(like, like)
        return made


class Layout:
    """The order of a value's dimensions: walked ranks, whole ranks that are reduced, streamed ranks, kept whole
    ones."""

    def __init__(self, roles: Roles, kept_whole: Iterable[sympy.Symbol]) -> None:
        self.roles, self.kept_whole = roles, tuple(kept_whole)

    def order(self, ranks: Iterable[sympy.Symbol]) -> tuple[sympy.Symbol, ...]:
        def key(s: sympy.Symbol) -> tuple[int, int, str]:
            if s in self.roles.streamed:
                # Outer loops last: what a tile of the outer rank needs transposed is then transposed once for it.
                return 2, -self.roles.streamed.index(s), s.name
            if s in self.roles.grid:
                return 0, self.roles.grid.index(s), s.name
            if s in self.kept_whole:
                return 3, self.kept_whole.index(s), s.name
            return 1, 0, s.name

        return tuple(sorted((s for s in set(ranks) if s not in self.roles.points), key=key))

    def value(self, name: str, ranks: Iterable[sympy.Symbol]) -> AppliedUndef:
        return access(name, self.order(ranks))


class Shared:
    """Operands in memory that need converting or another layout, prepared once before the streamed loop; and those that
    need it once in each round of the outer one of two streamed loops."""

    def __init__(self) -> None:
        self.statements: list[Statement] = []
        self.outer: list[Statement] = []
        self.made: dict[tuple[sympy.Expr, tuple[sympy.Symbol, ...]], AppliedUndef] = {}


class Body:
    """Builds one version. ``direct(access, rows, columns)`` says whether memory can be an operand as it lies."""

    def __init__(
        self,
        launches: Launches,
        kernel: Kernel,
        roles: Roles,
        layout: Layout,
        names: Names,
        shared: Shared,
        direct: dict[str, int | None],
        held: frozenset[str],
    ) -> None:
        self.launches, self.kernel, self.roles, self.layout = launches, kernel, roles, layout
        self.names, self.shared, self.direct, self.held = names, shared, direct, held
        self.statements: list[Statement] = []
        self.instances: dict[AppliedUndef, AppliedUndef] = {}
        #: Expression -> the value that holds it, and those not yet computed.
        self.shared_values: dict[sympy.Expr, AppliedUndef] = {}
        self.pending: dict[str, tuple[AppliedUndef, sympy.Expr]] = {}
        self.streamed = frozenset(roles.streamed) or frozenset(roles.grid)

    # Reading ----------------------------------------------------------------------------------------------------------

    def lower(self, e: sympy.Expr, reader: Value, depth: int = 1) -> sympy.Expr:
        """An expression over values and memory; inner reductions that it reads are computed first."""
        e = self.launches.inline(e, self.streamed)
        table: dict[sympy.Expr, sympy.Expr] = {}
        for item in accesses(e):
            state = self.launches.flow.state(item)
            if state is not None and state.name in self.kernel.names:
                table[item] = self.state(state, item)
                continue
            value = state or self.launches.flow.value(item)
            if value is None:
                continue
            if state is not None or self.launches.is_inner(value, item, reader, self.streamed, depth):
                table[item] = self.instance(value, item, reader)
        return e.xreplace(table)

    def state(self, value: Value, item: AppliedUndef) -> AppliedUndef:
        if tuple(item.args) != value.indices:
            raise NotLowerable(f"a state is read at other indices, {item}", where=value.name)
        next_one = tensor_name(item) == following(value.name)
        name = following(value.name) if next_one and value.name in self.held else value.name
        return self.layout.value(name, value.indices)

    def instance(self, value: Value, item: AppliedUndef, reader: Value) -> AppliedUndef:
        """The value that holds an inner reduction (or an inner state at the end of its fiber)."""
        plain = access(value.name, item.args)
        if tensor_name(item) == previous(value.name):
            raise NotLowerable(f"{item} is read inside a tile that holds the whole fiber", where=value.name)
        if plain in self.instances:
            return self.instances[plain]
        if len(set(item.args)) != len(item.args):
            raise NotLowerable(f"the diagonal {item} of an inner reduction", where=value.name)
        table = substituted(value, item)
        if value.is_state and any(key != at for key, at in table.items()):
            raise NotLowerable(f"an inner state is read at other indices, {item}", where=value.name)
        reduced = []
        for s in value.reduced:
            clash = s in self.roles.steps or s in ranks_read(item)
            reduced.append(self.names.rank(s) if clash else s)
            table[s] = reduced[-1]
        body = value.body.xreplace(table)
        target = self.layout.value(self.names.value(value.name), ranks_read(item))
        self.instances[plain] = target
        if value.recurrence:
            raise NotLowerable("a recurrence inside another loop", where=value.name)
        element = self.lower(body, value, 2)
        if value.reduction is None:
            self.statements.append(Map(target, element))
        else:
            self.reduction(target, value.reduction, tuple(reduced), element, accumulate=False)
        return target

    # Computing --------------------------------------------------------------------------------------------------------

    def reduction(
        self,
        target: AppliedUndef,
        reduction: str,
        reduced: tuple[sympy.Symbol, ...],
        element: sympy.Expr,
        accumulate: bool,
    ) -> None:
        walked = tuple(s for s in reduced if s not in self.roles.points)
        split = split_product(element, target.args, reduced, self.roles.points) if reduction == "sum" else None
        if split is None:
            element = self.recall(element)
        if not walked:
            before = target if accumulate else None
            body = join(reduction, before, element) if before is not None else element
            self.statements.append(Carry(target, body) if accumulate else Map(target, body))
        elif split is not None:
            left = self.operand(split.left, (*split.rows, *self.order_reduced(walked)), "Left")
            right = self.operand(split.right, (*self.order_reduced(walked), *split.columns), "Right")
            self.statements.append(Dot(target, self.order_reduced(walked), left, right, accumulate))
        else:
            self.statements.append(Reduce(target, reduction, walked, element, accumulate))

    def order_reduced(self, reduced: tuple[sympy.Symbol, ...]) -> tuple[sympy.Symbol, ...]:
        return self.layout.order(reduced)

    def operand(self, e: sympy.Expr, ranks: tuple[sympy.Symbol, ...], hint: str) -> AppliedUndef:
        """An access that a matrix product can read: rows and columns in this order, neighbours last."""
        e = self.recall(e)
        if isinstance(e, AppliedUndef):
            name = tensor_name(e)
            if name in self.direct:
                unit = self.direct[name]
                inside = [index for index in e.args if ranks_of(index) & set(ranks)]
                plain = len(ranks) == 2 and inside in ([ranks[0], ranks[1]], [ranks[1], ranks[0]])
                if plain and unit is not None and e.args[unit] == ranks[1]:
                    return e
            elif tuple(e.args) == ranks:
                return e
        loose = ranks_of(e) & (frozenset(self.roles.streamed))
        where = self.shared.statements
        if self.reads_values(e) or loose - frozenset(self.roles.streamed[:-1]):
            where = self.statements
        elif loose:
            where = self.shared.outer
        key = (e, ranks)
        if key in self.shared.made and where is not self.statements:
            return self.shared.made[key]
        if key in self.instances:
            return self.instances[key]
        base = tensor_name(e) if isinstance(e, AppliedUndef) else hint
        target = access(self.names.value(f"{base}_tile"), ranks)
        memory = isinstance(e, AppliedUndef) and tensor_name(e) in self.direct
        where.append(Load(target, e) if memory else Map(target, e))
        if where is not self.statements:
            self.shared.made[key] = target
        else:
            self.instances[key] = target
        return target

    def reads_values(self, e: sympy.Expr) -> bool:
        """Whether an expression reads what the loop computes, not only memory."""
        return any(tensor_name(item) not in self.direct for item in accesses(e))

    # Sharing ----------------------------------------------------------------------------------------------------------

    def share(self, elements: list[tuple[sympy.Expr, Split | None]]) -> None:
        """Choose which expressions get a value of their own: computed operands, and costly parts read twice."""
        sources = [part for e, split in elements for part in ((split.left, split.right) if split else (e,))]
        for _, split in elements:
            for operand in (split.left, split.right) if split else ():
                if isinstance(operand, AppliedUndef) or not ranks_of(operand) & frozenset(self.roles.streamed):
                    continue
                if operand not in self.shared_values and self.reads_values(operand) and self._is_tile(operand):
                    self._add(operand, sources)
        while True:
            found = self._costly_twice(sources)
            if found is None:
                break
            self._add(found, sources)

    def _is_tile(self, e: sympy.Expr) -> bool:
        return len(self.layout.order(self._dimensions(e))) > 1 or not self.kernel.crossed

    def _add(self, e: sympy.Expr, sources: list[sympy.Expr]) -> None:
        target = self.layout.value(self.names.value("Shared"), self._dimensions(e))
        table = {e: target}
        for position, source in enumerate(sources):
            sources[position] = source.xreplace(table)
        for name, (other, body) in list(self.pending.items()):
            self.pending[name] = (other, body.xreplace(table))
        self.shared_values = {key.xreplace(table): value for key, value in self.shared_values.items()}
        self.shared_values[e] = target
        self.pending[tensor_name(target)] = (target, e)
        sources.append(e)

    def _dimensions(self, e: sympy.Expr) -> frozenset[sympy.Symbol]:
        return ranks_of(e)

    def _costly_twice(self, sources: list[sympy.Expr]) -> sympy.Expr | None:
        counts: dict[sympy.Expr, int] = {}
        for source in sources:
            for node in source.atoms(*_COSTLY):
                if (
                    ranks_of(node) & frozenset(self.roles.streamed) - self.roles.points
                    and node not in self.shared_values
                ):
                    counts[node] = counts.get(node, 0) + 1
        twice = [node for node, count in counts.items() if count > 1]
        return max(twice, key=lambda node: (node.count_ops(), sympy.default_sort_key(node)), default=None)

    def recall(self, e: sympy.Expr) -> sympy.Expr:
        """The expression with what is shared replaced by the values that hold it, computed now if they are not yet."""
        for _ in range(len(self.shared_values) + 1):
            changed = e.xreplace(self.shared_values)
            if changed == e:
                break
            e = changed
        for item in accesses(e):
            waiting = self.pending.pop(tensor_name(item), None)
            if waiting is not None:
                target, body = waiting
                self.statements.append(Map(target, self.recall_inside(body, target)))
        return e

    def recall_inside(self, body: sympy.Expr, target: AppliedUndef) -> sympy.Expr:
        table = {key: value for key, value in self.shared_values.items() if value != target}
        changed = body.xreplace(table)
        for item in accesses(changed):
            waiting = self.pending.pop(tensor_name(item), None)
            if waiting is not None:
                self.statements.append(Map(waiting[0], self.recall_inside(waiting[1], waiting[0])))
        return changed

    # The step of a loop -----------------------------------------------------------------------------------------------

    def step(self, elements: dict[str, sympy.Expr]) -> list[Statement]:
        """All roots updated by one tile. ``elements`` are their lowered elements with masks resolved."""
        roots = self.kernel.roots
        splits = []
        for root in roots:
            kept = self.layout.value(root.name, root.indices).args
            split = None
            if root.reduction == "sum" and not root.recurrence:
                split = split_product(elements[root.name], kept, root.reduced, self.roles.points)
            splits.append((elements[root.name], split))
        self.share(splits)
        for root in roots:
            self.update(root, elements[root.name])
        for root in roots:
            if root.name in self.held:
                target = self.layout.value(root.name, root.indices)
                self.statements.append(Carry(target, self.layout.value(following(root.name), root.indices)))
        return self.statements

    def update(self, root: Value, element: sympy.Expr) -> None:
        held = root.name in self.held
        target = self.layout.value(following(root.name) if held else root.name, root.indices)
        own = self.layout.value(root.name, root.indices)
        if root.recurrence or root.reduction is None:
            self.statements.append(Map(target, self.recall(element)) if held else Carry(own, self.recall(element)))
            return
        carry = self.hoisted(self.lower(root.carry, root), own) if root.carry is not None else own
        if held:
            self.reduction(target, root.reduction, root.reduced, element, accumulate=False)
            self.statements.append(Carry(target, join(root.reduction, target, carry)))
            return
        if carry != own:
            self.statements.append(Carry(own, carry))
        self.reduction(own, root.reduction, root.reduced, element, accumulate=True)

    def hoisted(self, e: sympy.Expr, target: AppliedUndef) -> sympy.Expr:
        """Costly parts of a carry that have fewer ranks than the state, as values that several carries share."""
        table: dict[sympy.Expr, sympy.Expr] = {}
        for node in sorted(e.atoms(*_COSTLY), key=lambda n: (n.count_ops(), sympy.default_sort_key(n))):
            own = self.layout.order(ranks_read_in(node))
            if not own or (len(own) >= len(target.args) and len(target.args) > 1):
                continue
            if node not in self.instances:
                value = self.layout.value(self.names.value("Factor"), own)
                self.statements.append(Map(value, node))
                self.instances[node] = value
            table[node] = self.instances[node]
        return e.xreplace(table)


def ranks_read_in(e: sympy.Expr) -> frozenset[sympy.Symbol]:
    return frozenset().union(frozenset(), *(ranks_read(item) for item in accesses(e)))


def held_states(launches: Launches, kernel: Kernel) -> frozenset[str]:
    """States whose old and new values are both needed during a step: the new one gets a value of its own.

    That is a state that another one reads, old after it has moved or new before the step ends.
    """
    found: set[str] = set()
    for root in kernel.roots:
        for body in (root.body, root.carry):
            read = accesses(launches.inline(body, frozenset(kernel.streamed))) if body is not None else []
            for name in map(tensor_name, read):
                for other in kernel.roots:
                    if name == following(other.name) or (name == previous(other.name) and other is not root):
                        found.add(other.name)
    return frozenset(found)


def state_statements(roots: Iterable[Value], layout: Layout) -> list[Statement]:
    """The roots' states before the first step."""
    return [State(layout.value(root.name, root.indices), root.initial) for root in roots]
