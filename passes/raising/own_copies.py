"""What several layers compute from little, computed by each of them.

A relative bias ``B[h,m,n] = T[bucket(m,n), h]`` that every layer adds to its scores ties all layers together, if it is
one tensor; and it is as wide as the scores. It is looked up in a small table, so each reader gets a copy of its own,
which counts as a part of the reader's op: its kernel looks it up where it needs it.

rewrite::

    B[h,m,n] = sum[l] where(l == I[m,n], T[l,h], 0)          B_for_S1[h,m,n] = sum[l] where(l == I[m,n], T[l,h], 0)
    S1[h,m,n] = QK1[h,m,n] + B[h,m,n]                   ->   S1[h,m,n]       = QK1[h,m,n] + B_for_S1[h,m,n]
    S2[h,m,n] = QK2[h,m,n] + B[h,m,n]                        B_for_S2 ...
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import sympy

from ...ir.cascade import Cascade, Einsum, access, rank, ranks_of, tensor_name
from .components import Space, components, picked_ranks
from .emit import elements
from .raise_graph import Raised
from .ranks import rename_ranks


def with_own_copies(raised: Raised) -> Raised:
    """The raised graph with a copy of such tensors for each Einsum that reads them."""
    leaves = {name: elements(tensor.sizes) for name, tensor in raised.tensors.items()}
    space = Space(raised.cascade.einsums, raised.sizes, leaves)
    light = _light(space)
    times: Counter[str] = Counter()
    readers: dict[str, set[str]] = {}
    for component in components(space, light):
        for name in component.wide & light.keys():
            times[name] += 1
            readers.setdefault(name, set()).update(set(component.core) - light.keys())
    copies: dict[str, list[str]] = {}
    for einsum in space.einsums:
        needed = _needed_for(einsum, space, light) if einsum.output not in light else set()
        if any(times[name] > 1 and einsum.output in readers[name] for name in needed):
            copies[einsum.output] = [each.output for each in space.einsums if each.output in needed]
    if not copies:
        return raised
    tensors = dict(raised.tensors)
    for reader, names in copies.items():
        tensors |= {
            _name(each, reader): replace(tensors[each], name=_name(each, reader), nodes=(), leaf=False)
            for each in names
        }
    raw_sizes = dict(raised.raw_sizes)
    made = Counter(name for names in copies.values() for name in names)
    return replace(
        raised,
        cascade=Cascade(tuple(_copied(raised.cascade.einsums, copies, None))),
        raw=tuple(_copied(raised.raw, copies, raw_sizes)),
        tensors=tensors,
        raw_sizes=raw_sizes,
        shared={_name(name, reader): made[name] for reader, names in copies.items() for name in names},
    )


def _light(space: Space) -> dict[str, int]:
    """Tensors that maps and lookups make from no more than they have themselves -> elements of what they are made
    from."""
    found: dict[str, int] = {}
    for einsum in space.einsums:
        if einsum.reduction is not None and not (
            einsum.reduction == "sum" and set(einsum.reduced) <= picked_ranks(einsum).keys()
        ):
            continue
        names = {tensor_name(item) for item in einsum.reads}
        source = sum(found.get(name, space.tensor_elements(name)) for name in names)
        if source <= space.size(einsum.kept):
            found[einsum.output] = source
    return found


def _needed_for(einsum: Einsum, space: Space, light: Mapping[str, int]) -> set[str]:
    found: set[str] = set()
    waiting = [einsum]
    while waiting:
        for item in waiting.pop().reads:
            name = tensor_name(item)
            if name in light and name not in found:
                found.add(name)
                waiting.append(space.writer[name])
    return found


def _name(name: str, reader: str) -> str:
    return f"{name}_for_{reader}"


def _copied(
    einsums: Iterable[Einsum], copies: Mapping[str, list[str]], sizes: dict[str, Any] | None
) -> Iterable[Einsum]:
    """``sizes``: where each Einsum has ranks of its own, so have the copies; their sizes are added."""
    table = {einsum.output: einsum for einsum in einsums}
    for einsum in table.values():
        names = copies.get(einsum.output, ())
        for name in names:
            copy = table[name]
            if sizes is not None:
                copy = rename_ranks(copy, _fresh(copy, sizes))
            yield replace(_reading(copy, names, einsum.output), output=_name(name, einsum.output), line=einsum.line)
        yield _reading(einsum, names, einsum.output)


def _reading(einsum: Einsum, names: Iterable[str], reader: str) -> Einsum:
    table = {
        item: access(_name(tensor_name(item), reader), item.args) for item in einsum.reads if tensor_name(item) in names
    }
    return replace(einsum, body=einsum.body.xreplace(table)) if table else einsum


def _fresh(einsum: Einsum, sizes: dict[str, Any]) -> dict[sympy.Symbol, sympy.Symbol]:
    found = {}
    for symbol in sorted(einsum.space | ranks_of(einsum.body), key=lambda s: s.name):
        name, number = symbol.name, 1
        while name in sizes:
            name, number = f"{symbol.name}c{number}", number + 1
        sizes[name] = sizes[symbol.name]
        found[symbol] = rank(name)
    return found
