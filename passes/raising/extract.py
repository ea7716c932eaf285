"""One stage as a fused cascade: a text of its own, with names that do not depend on where in the model it stands."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
from sympy.core.function import AppliedUndef

from ...ir.cascade import Cascade, Einsum, access, is_rank, rank, ranks_of, tensor_name
from ...ir.fused_cascade import FusedCascade, TensorView
from ...ir.types import Size, TensorType
from .affine import join
from .emit import Tensor
from .ranks import canonical_ranks, rename_ranks, unify_ranks


@dataclass(frozen=True)
class Extracted:
    """``operands`` and ``results`` are tensors of the raised cascade, in the order of the fused one's."""

    fused: FusedCascade
    operands: tuple[str, ...]
    results: tuple[str, ...]
    #: Name in the raised cascade -> name in the fused one, for what the stage writes.
    names: Mapping[str, str]


@dataclass(frozen=True)
class Surroundings:
    """What an extraction must know of the graph: ``type_of`` gives the type of the graph value that a tensor is."""

    tensors: Mapping[str, Tensor]
    sizes: Mapping[str, Size]
    type_of: Callable[[str], TensorType]
    order: Mapping[str, int]


def extract(
    einsums: Sequence[Einsum], wanted: Sequence[str], around: Surroundings, copied: Collection[str] = ()
) -> Extracted:
    """The Einsums as a fused cascade that gives the ``wanted`` tensors.

    Of those in ``copied``, which other Einsums read, the output is a copy: rewriting drops what is read only.
    """
    einsums = list(einsums)
    copies = {name: f"{name}_out" for name in copied}
    for einsum in [einsum for einsum in einsums if einsum.output in copies]:
        body = access(einsum.output, einsum.indices)
        einsums.append(Einsum(copies[einsum.output], einsum.indices, body, line=einsum.line))
    bindings = _Bindings(einsums, around)
    bound = [bindings.bind(einsum) for einsum in einsums]
    walked = {symbol for einsum in bound for symbol in einsum.space}
    sizes = {symbol: bindings.new_sizes.get(symbol, around.sizes.get(symbol.name, 0)) for symbol in walked}
    bound, rank_sizes = unify_ranks(bound, sizes, {einsum.output for einsum in bound})
    ranks = canonical_ranks(bound)
    names = _canonical_names(bound, bindings.inputs)
    final = [_rename(rename_ranks(einsum, ranks), names) for einsum in bound]
    operands, inputs, extra = bindings.views(bound, names, ranks)
    origin = {copy: name for name, copy in copies.items()}
    results = []
    outputs = []
    for position, name in enumerate(wanted):
        own = names[copies.get(name, name)]
        einsum = next(einsum for einsum in final if einsum.output == own)
        results.append(around.type_of(name))
        tensor = around.tensors[name]
        outputs.append(TensorView(own, position, einsum.kept, _dims(einsum.kept, tensor), tensor.sizes))
    fused = FusedCascade(
        Cascade(tuple(replace(einsum, line=number) for number, einsum in enumerate(final, start=1))),
        {new.name: rank_sizes[old] for old, new in ranks.items()} | extra,
        tuple(around.type_of(name) for name in operands),
        tuple(results),
        inputs,
        tuple(outputs),
        {names[e.output]: around.tensors[origin.get(e.output, e.output)].dtype for e in einsums},
    )
    made = {einsum.output: names[einsum.output] for einsum in einsums if einsum.output not in origin}
    return Extracted(fused, tuple(operands), tuple(wanted), made)


def _dims(index: Sequence[sympy.Expr], tensor: Tensor) -> tuple[sympy.Expr, ...]:
    """Coordinates in the graph value from those of the tensor's ranks."""
    found, at = [], 0
    for count in tensor.dims:
        found.append(join(index[at : at + count], tensor.sizes[at : at + count]))
        at += count
    return tuple(found)


class _Bindings:
    """Every read of a tensor from outside, as an input of its own name for each way in which it is read."""

    def __init__(self, einsums: Sequence[Einsum], around: Surroundings) -> None:
        self.around = around
        self.inside = {einsum.output for einsum in einsums}
        #: Input name -> (tensor, its ranks, the place in the tensor).
        self.inputs: dict[str, tuple[str, tuple[sympy.Symbol, ...], tuple[sympy.Expr, ...]]] = {}
        self._known: dict[Any, str] = {}
        self.new_sizes: dict[sympy.Symbol, Size] = {}
        self._table: dict[Einsum, dict[AppliedUndef, sympy.Expr]] = {}
        for einsum in einsums:
            outer = [item for item in einsum.reads if tensor_name(item) not in self.inside]
            # By the place of its ranks, not by names, which tell one layer from another.
            outer.sort(key=lambda item: (_pattern(item, einsum), around.order[tensor_name(item)]))
            self._table[einsum] = {item: self._input(item) for item in outer}

    def bind(self, einsum: Einsum) -> Einsum:
        return replace(einsum, body=einsum.body.xreplace(self._table[einsum]))

    def _input(self, item: AppliedUndef) -> sympy.Expr:
        name, tensor = tensor_name(item), self.around.tensors[tensor_name(item)]
        index: tuple[sympy.Expr, ...] = item.args
        if not self._within(index, tensor):
            # Some places are outside, and a where() keeps them from being read: the tensor is taken as it is.
            own = []
            for size in tensor.sizes:
                symbol = rank(f"own{len(self.new_sizes)}")
                self.new_sizes[symbol] = size
                own.append(symbol)
            return access(self._name(name, tuple(own), tuple(own), whole=True), index)
        walked = tuple(dict.fromkeys(s for at in index for s in sorted(ranks_of(at), key=lambda s: s.name)))
        return access(self._name(name, walked, index), walked)

    def _name(
        self, tensor: str, ranks: tuple[sympy.Symbol, ...], index: tuple[sympy.Expr, ...], whole: bool = False
    ) -> str:
        places = {symbol: sympy.Symbol(f"_{number}") for number, symbol in enumerate(ranks)}
        sizes = tuple(self._size(symbol) for symbol in ranks)
        key = (tensor, whole, sizes, tuple(at.xreplace(places) for at in index))
        if key not in self._known:
            self._known[key] = f"Input{len(self._known)}"
            self.inputs[self._known[key]] = (tensor, ranks, index)
        return self._known[key]

    def _size(self, symbol: sympy.Symbol) -> Size:
        return self.new_sizes.get(symbol, self.around.sizes.get(symbol.name, 0))

    def _within(self, index: Sequence[sympy.Expr], tensor: Tensor) -> bool:
        """Whether every place is certainly inside the tensor."""
        for at, size in zip(index, tensor.sizes, strict=True):
            if at.is_Symbol and is_rank(at):
                continue
            if not isinstance(size, int):
                return False
            low = high = 0
            for term, coefficient in at.as_coefficients_dict().items():
                extent = self._size(term) if term.is_Symbol else 1
                if not isinstance(extent, int) or not coefficient.is_Integer:
                    return False
                ends = (int(coefficient), int(coefficient)) if term == 1 else (0, int(coefficient) * (extent - 1))
                low, high = low + min(ends), high + max(ends)
            if low < 0 or high >= size:
                return False
        return True

    def views(
        self, einsums: Sequence[Einsum], names: Mapping[str, str], ranks: Mapping[sympy.Symbol, sympy.Symbol]
    ) -> tuple[list[str], tuple[TensorView, ...], dict[str, Size]]:
        """The operands in the order in which they are first read, where each input lies in them, and sizes of ranks
        that only these views have. A view has the ranks that its tensor is first read with, if all of it is read."""
        read: dict[str, AppliedUndef] = {}
        for item in (item for einsum in einsums for item in einsum.reads):
            read.setdefault(tensor_name(item), item)
        inputs = {name: entry for name, entry in self.inputs.items() if name in read}
        operands = list(dict.fromkeys(entry[0] for entry in inputs.values()))
        views = []
        extra: dict[str, Size] = {}
        for name, (tensor, own, index) in inputs.items():
            args = read[name].args
            plain = all(at.is_Symbol and is_rank(at) for at in args) and len(set(args)) == len(args)
            sizes = tuple(self._size(symbol) for symbol in own)
            if plain:
                places = {symbol: ranks[at] for symbol, at in zip(own, args, strict=True)}
            else:
                places = {symbol: rank(f"i{len(extra) + number}") for number, symbol in enumerate(own)}
                extra.update({places[symbol].name: size for symbol, size in zip(own, sizes, strict=True)})
            at = _dims([part.xreplace(places) for part in index], self.around.tensors[tensor])
            views.append(TensorView(names[name], operands.index(tensor), tuple(places.values()), at, sizes))
        return operands, tuple(sorted(views, key=lambda view: (view.position, view.tensor))), extra


def _pattern(item: AppliedUndef, einsum: Einsum) -> list[str]:
    """An access with ranks by their position in the Einsum."""
    places = {symbol: sympy.Symbol(f"_{at:03d}") for at, symbol in enumerate((*einsum.kept, *einsum.reduced))}
    return [str(at.xreplace(places)) for at in item.args]


def _canonical_names(einsums: Sequence[Einsum], inputs: Mapping[str, Any]) -> dict[str, str]:
    """Names without the numbers that tell one layer's ops from another's."""
    table: dict[str, str] = {}
    taken: set[str] = set()

    def add(name: str, hint: str) -> None:
        count, made = 1, hint
        while made in taken:
            count += 1
            made = f"{hint}{count}"
        taken.add(made)
        table[name] = made

    read = {tensor_name(item) for einsum in einsums for item in einsum.reads}
    for name in inputs:
        if name in read:
            add(name, "In")
    for einsum in einsums:
        add(einsum.output, re.sub(r"[_\d]+$", "", einsum.output).replace("_", "") or "T")
    return table


def _rename(einsum: Einsum, names: Mapping[str, str]) -> Einsum:
    table = {item: access(names[tensor_name(item)], item.args) for item in einsum.reads}
    return replace(einsum, output=names[einsum.output], body=einsum.body.xreplace(table))
