"""Einsums of a program: which values become tensors, and what each of them is.

A leaf and a reduction are tensors. A view never is. A map is written into its reader if it has one reader that walks
over the same elements, or if it is cheap and much larger than what it reads (a mask, a bias from distances): then each
reader computes it again. Every other map is a tensor of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import sympy

from ...ir.cascade import Cascade, Einsum, access, accesses, constant, rank, tensor_name
from ...ir.types import Size
from .affine import NotAffine
from .program import Program
from .ranks import unify_ranks
from .sizes import in_cascade, product
from .steps import Index, Leaf, Map, Reduce, Value, View, Window, broadcast, coordinate

#: A map is computed again by each reader if it has at most this many operations and this many times more elements than
#: the tensors that it reads.
_CHEAP, _EXPANDS = 40, 4
#: What the size of a symbol is taken for where sizes are only compared.
SIZE_HINT = 512


@dataclass(frozen=True)
class Tensor:
    """A tensor of the raised cascade: its graph values ("" for a part of an op), element type, sizes in rank order.

    ``dims``: for each dimension of the graph value how many of the tensor's ranks it is made of.
    """

    name: str
    nodes: tuple[str, ...]
    dtype: str
    sizes: tuple[Size, ...]
    dims: tuple[int, ...]
    leaf: bool

    @property
    def shape(self) -> tuple[Size, ...]:
        """Sizes of the graph value's dimensions."""
        found, at = [], 0
        for count in self.dims:
            found.append(product(self.sizes[at : at + count]))
            at += count
        return tuple(found)


@dataclass(frozen=True)
class Emitted:
    """``raw`` are the Einsums with ranks of their own each; ``raw_sizes`` the sizes of those."""

    cascade: Cascade
    raw: tuple[Einsum, ...]
    raw_sizes: Mapping[sympy.Symbol, Size]
    tensors: Mapping[str, Tensor]
    sizes: Mapping[sympy.Symbol, Size]
    names: Mapping[int, str]


def numeric(size: Size) -> int:
    """A size as a number, with ``SIZE_HINT`` for symbols."""
    if isinstance(size, int):
        return size
    return int(size.xreplace({symbol: sympy.Integer(SIZE_HINT) for symbol in size.free_symbols}))


def elements(sizes: Iterable[Size]) -> int:
    return numeric(product(sizes))


def emit(program: Program, roots: Sequence[Value], nodes: Mapping[int, Sequence[tuple[str, Value]]]) -> Emitted:
    """The cascade that computes ``roots``.

    ``nodes``: value number -> the graph values that are this value, or differ by dimensions of size 1.
    Raises ``Unwritten`` with the values whose elements have no affine form.
    """
    return _Emitter(program, roots, nodes).run()


class Unwritten(Exception):
    """Values cannot be written: their ops must stay as they are."""

    def __init__(self, values: Sequence[Value]) -> None:
        super().__init__(f"values {', '.join(str(value.number) for value in values)} have no affine form")
        self.values = values


@dataclass
class _Emitter:
    program: Program
    roots: Sequence[Value]
    nodes: Mapping[int, Sequence[tuple[str, Value]]]
    einsums: list[Einsum] = field(default_factory=list)
    written: dict[int, str] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    rank_sizes: dict[sympy.Symbol, Size] = field(default_factory=dict)
    #: Values that are tensors for others, and still written into their readers.
    external: dict[int, str] = field(default_factory=dict)
    factor_cache: dict[tuple[int, int], list[Size]] = field(default_factory=dict)

    def run(self) -> Emitted:
        live, readers = self._readers()
        unwritten = self._unwritten(live)
        if unwritten:
            raise Unwritten(unwritten)
        external = {base(root).number for root in self.roots}
        for value in self.program.values:
            if value.number not in live:
                continue
            try:
                self._visit(value, readers.get(value.number, []), value.number in external)
            except NotAffine:
                unwritten.append(value)
                self._name(value, True)  # so that what reads it can be looked at too
        if unwritten:
            raise Unwritten(unwritten)
        einsums, sizes = unify_ranks(self.einsums, self.rank_sizes)
        names = {**self.external, **self.written}
        return Emitted(Cascade(tuple(einsums)), tuple(self.einsums), self.rank_sizes, self.tensors, sizes, names)

    def _unwritten(self, live: set[int]) -> list[Value]:
        """Values that are not at affine places of what they show, whatever else becomes a tensor: told before anything
        is written, for then all has to be written again."""
        found: list[Value] = []
        for value in self.program.values:
            if value.number not in live or not isinstance(value.step, View | Window):
                continue
            index = [
                tuple(self._probe(size, dim, place) for place, size in enumerate(self.factor_sizes(value, dim)))
                for dim in range(value.ndim)
            ]
            try:
                if isinstance(value.step, Window):
                    value.step.part_indices(index, coordinate(value, value.step.dim, index, self), self)
                else:
                    value.step.base_index(value, index, self)
            except NotAffine:
                found.append(value)
        self.rank_sizes.clear()
        return found

    def _probe(self, size: Size, dim: int, place: int) -> sympy.Symbol:
        """A rank to try an index with; no two of one index are the same."""
        symbol = rank(f"r{dim}_{place}")
        self.rank_sizes[symbol] = size
        return symbol

    def _readers(self) -> tuple[set[int], dict[int, list[Value]]]:
        """Live values; value -> the live values that read it, directly or through views."""
        live: set[int] = set()
        waiting = list(self.roots)
        readers: dict[int, list[Value]] = {}
        while waiting:
            value = waiting.pop()
            if value.number in live:
                continue
            live.add(value.number)
            for operand in value.step.operands:
                waiting.append(operand)
                if not isinstance(value.step, View):
                    readers.setdefault(base(operand).number, []).append(value)
        return live, readers

    def _visit(self, value: Value, readers: list[Value], external: bool) -> None:
        step = value.step
        if isinstance(step, Leaf):
            self._name(value, True)
        elif isinstance(step, Reduce):
            self._reduce(value, step)
        elif isinstance(step, View):
            # A coordinate without affine form is found here, where the view is, not in some reader.
            self._follow(value, self._fresh(value))
        else:
            self._map(value, readers, external)

    def _follow(self, value: Value, index: Index) -> None:
        """Go to the tensors that an element is made of, as ``element`` does, without the expression. Raises what it
        raises."""
        step = value.step
        if value.number in self.written:
            return
        if isinstance(step, View):
            self._follow(step.operands[0], step.base_index(value, index, self))
        elif isinstance(step, Map):
            for operand in step.operands:
                self._follow(operand, broadcast(operand, index))
        else:
            self.element(value, index)

    def _map(self, value: Value, readers: list[Value], external: bool) -> None:
        index = self._fresh(value)
        body = self.element(value, index)
        again = self._cheap(value, body)
        inside = len(readers) == 1 and (
            isinstance(readers[0].step, Window) or self._space(readers[0]) == elements(value.shape)
        )
        if not external and (again or inside):
            return
        name = self._name(value, False, keep_lazy=again)
        self.external.setdefault(value.number, name)
        self.einsums.append(Einsum(name, tuple(part for dim in index for part in dim), body, line=value.line))

    def _space(self, reader: Value) -> int:
        """How many points the reader walks over."""
        source = reader.step.operands[0] if isinstance(reader.step, Reduce) else reader
        return elements(source.shape)

    def _cheap(self, value: Value, body: sympy.Expr) -> bool:
        read = {tensor_name(item) for item in accesses(body)}
        if not read:
            return bool(body.count_ops() <= 4 * _CHEAP)
        total = sum(elements(self.tensors[name].sizes) for name in read)
        return bool(total * _EXPANDS <= elements(value.shape) and body.count_ops() <= _CHEAP)

    def _reduce(self, value: Value, step: Reduce) -> None:
        (operand,) = step.operands
        index = self._fresh(operand)
        body = self.element(operand, index)
        kept = tuple(part for dim, own in enumerate(index) if dim not in step.dims for part in own)
        reduced = tuple(part for dim in step.dims for part in index[dim])
        name = self._name(value, False)
        assert all(part.is_Symbol for part in (*kept, *reduced))
        self.einsums.append(Einsum(name, kept, body, step.kind, reduced, line=value.line))

    # What steps ask for ----------------------------------------------------------------------------------------------

    def element(self, value: Value, index: Index) -> sympy.Expr:
        name = self.written.get(value.number)
        if name is not None:
            return access(name, [part for dim in index for part in dim])
        return value.step.element(value, index, self)

    def factor_sizes(self, value: Value, dim: int) -> list[Size]:
        key = (value.number, dim)
        if key not in self.factor_cache:
            axes = self.program.axes
            self.factor_cache[key] = [axes.size(factor) for factor in axes.resolve(value.axes[dim])]
        return self.factor_cache[key]

    def rank_size(self, rank: sympy.Symbol) -> Size:
        return self.rank_sizes[rank]

    def size_of(self, rank: sympy.Symbol) -> sympy.Expr:
        return in_cascade(self.rank_sizes[rank])

    def _fresh(self, value: Value) -> Index:
        """New ranks for every factor of a value's dimensions."""
        index: Index = []
        for dim in range(value.ndim):
            own = []
            for size in self.factor_sizes(value, dim):
                symbol = rank(f"r{len(self.rank_sizes)}")
                self.rank_sizes[symbol] = size
                own.append(symbol)
            index.append(tuple(own))
        return index

    def _name(self, value: Value, leaf: bool, keep_lazy: bool = False) -> str:
        known = self.nodes.get(value.number, ())
        nodes = tuple(node for node, _ in known)
        hint = value.step.node if isinstance(value.step, Leaf) else (nodes[0] if nodes else value.hint)
        name = _tensor_name(hint, self.tensors)
        shown = known[0][1] if known else value
        sizes = [self.factor_sizes(shown, dim) for dim in range(shown.ndim)]
        flat = tuple(size for own in sizes for size in own)
        self.tensors[name] = Tensor(name, nodes, value.dtype, flat, tuple(len(own) for own in sizes), leaf)
        if not keep_lazy:
            self.written[value.number] = name
        return name


def base(value: Value) -> Value:
    """The value that a view shows."""
    while isinstance(value.step, View):
        value = value.step.operands[0]
    return value


def _tensor_name(hint: str, taken: Mapping[str, object]) -> str:
    """A tensor's name from a graph value's: letters, digits and underscores, a capital first."""
    plain = re.sub(r"\W", "_", hint).strip("_") or "T"
    if not plain[0].isalpha():
        plain = f"T_{plain}"
    name = plain[0].upper() + plain[1:]
    while name in taken or constant(name).name.startswith("S_"):
        name = f"{name}_"
    return name
