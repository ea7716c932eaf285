"""Loads and stores of a Triton kernel: addresses, masks, conversions.

An address is a base for the tile, 64 bits and computed once for each tile, plus offsets within it of 32 bits that no
loop changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sympy
from sympy.core.function import AppliedUndef

from ...ir.cascade import is_rank, ranks_of, tensor_name
from ..tiles.names import origin, stride, tensor
from .scopes import BOOL, FLOAT, INT, NARROW, Piece

if TYPE_CHECKING:
    from .expressions import Emitter

#: Element type -> Triton's.
TRITON_TYPES = {
    "f32": "tl.float32",
    "f64": "tl.float64",
    "bf16": "tl.bfloat16",
    "f16": "tl.float16",
    "i64": "tl.int64",
    "i32": "tl.int32",
    "i16": "tl.int16",
    "i8": "tl.int8",
    "u8": "tl.uint8",
    "b1": "tl.int1",
}
FLOATING = ("f32", "f64", "bf16", "f16")


#: Limits of the tensor memory accelerator: elements of a block along a dimension, and dimensions.
_LONGEST_BOX, _MOST_DIMENSIONS = 256, 5


def descriptor(name: str, lengths: tuple[int, ...]) -> str:
    """The argument that describes blocks of a tensor."""
    return f"d_{name}_{'_'.join(map(str, lengths))}"


class Memory:
    def __init__(self, emitter: Emitter) -> None:
        self.emitter = emitter
        self.blocks, self.scopes = emitter.blocks, emitter.scopes
        #: Whether tiles are read through descriptors where they can be, and those that are: (tensor, block's lengths).
        self.by_descriptor = False
        self.descriptors: dict[tuple[str, tuple[int, ...]], None] = {}

    def load(self, item: AppliedUndef, order: tuple[sympy.Symbol, ...]) -> Piece:
        """The elements that an access reads, dimensions in this order; 0 beyond the ends of ranks, NaN outside of the
        tensor."""
        dims = self.blocks.kept(order)
        key = (item, dims, "memory")
        found = self.scopes.known.get(key)
        if found is not None:
            return found
        declared = self.blocks.tensors[tensor_name(item)]
        if len(dims) == 2 and declared.unit is not None and item.args[declared.unit] == dims[0]:
            # As it lies there, once, whichever way round it is read.
            plain = self.load(item, dims[::-1])
            turned = Piece(f"tl.trans({plain.text})", dims, plain.kind, plain.depth, plain.reads, plain.dtype)
            return self.scopes.named(key, turned)
        described = self._described(item, dims)
        if described is not None:
            return self.scopes.named(key, described)
        before, self.emitter.order = self.emitter.order, dims
        pointer = self._pointer(item, dims)
        masks = [self.emitter.tail(s) for s in dims if self.blocks.has_tail(s)]
        other = "0.0" if declared.dtype in FLOATING else "0"
        if self.blocks.can_leave(item):
            masks += self._inside(item, dims)
            other = 'float("nan")' if declared.dtype in FLOATING else "0"
        parts = [pointer, *masks]
        depth = max(part.depth for part in parts)
        text = pointer.text
        if masks:
            mask = self.emitter.combined(" & ".join(f"{{{k}}}" for k in range(len(masks))), masks, BOOL)
            mask = Piece(f"({mask.text})", mask.dims, BOOL, mask.depth)
            text += f", mask={self.emitter.spread(mask, dims) if dims else mask.text}, other={other}"
        kind = _kind(declared.dtype, self.blocks.program.compute)
        made = Piece(f"tl.load({text})", dims, kind, depth, frozenset(), declared.dtype)
        self.emitter.order = before
        return self.scopes.named(key, made)

    def store(self, target: AppliedUndef, body: Piece, extra: list[str]) -> None:
        """Write a tile; ``extra`` are further conditions, scalars."""
        declared = self.blocks.tensors[tensor_name(target)]
        dims = self.blocks.kept(tuple(s for index in target.args for s in sorted(ranks_of(index), key=str)))
        before, self.emitter.order = self.emitter.order, dims
        pointer = self._pointer(target, dims)
        self.emitter.order = before
        masks = [self.emitter.spread(self.emitter.tail(s), dims) for s in dims if self.blocks.has_tail(s)] + extra
        text = self.emitter.filled(body, dims) if dims else body.text
        if declared.dtype == "b1":
            text = f"({text}) != 0"
        elif declared.dtype != self.blocks.program.compute or body.kind != FLOAT:
            text = f"tl.cast({text}, {TRITON_TYPES[declared.dtype]})"
        mask = f", mask={' & '.join(f'({each})' for each in masks)}" if masks else ""
        self.scopes.write(f"tl.store({pointer.text}, {text}{mask})")

    def _described(self, item: AppliedUndef, dims: tuple[sympy.Symbol, ...]) -> Piece | None:
        """A tile of two dimensions read through a descriptor, with zeros outside of the tensor; None if it cannot be:
        its rows must have neighbouring elements, its ranks be plain indices, and all other indices be one number."""
        name = tensor_name(item)
        declared = self.blocks.tensors[name]
        plain = len(dims) == 2 and all(s in item.args and self.blocks.length(s) <= _LONGEST_BOX for s in dims)
        if not (self.by_descriptor and plain and declared.dtype in FLOATING and len(item.args) <= _MOST_DIMENSIONS):
            return None
        if declared.unit != len(item.args) - 1 or item.args[-1] != dims[1] or self.blocks.can_leave(item):
            return None
        lengths, coordinates, depth = [], [], 0
        for index in item.args:
            if index in dims:
                walked = index in self.emitter.walked
                lengths.append(self.blocks.length(index))
                coordinates.append(origin(index) if walked else "0")
                depth = max(depth, self.emitter.walked.get(index, 0))
                continue
            scalar = self.emitter.integer(index)
            if scalar is None:
                return None
            lengths.append(1)
            coordinates.append(scalar.text)
            depth = max(depth, scalar.depth)
        key = (name, tuple(lengths))
        self.descriptors.setdefault(key)
        text = f"tl.reshape({descriptor(*key)}.load([{', '.join(coordinates)}]), {self.emitter.shape(dims)})"
        return Piece(text, dims, _kind(declared.dtype, self.blocks.program.compute), depth, frozenset(), declared.dtype)

    def _pointer(self, item: AppliedUndef, dims: tuple[sympy.Symbol, ...]) -> Piece:
        """The addresses of an access's elements."""
        name = tensor_name(item)
        unit = self.blocks.tensors[name].unit
        bases: dict[int, list[str]] = {}
        offsets: list[Piece] = []
        for position, index in enumerate(item.args):
            step = "" if position == unit else f" * {stride(name, position)}"
            plain = sympy.expand(index)
            rest = plain
            for s in sorted(ranks_of(plain), key=str):
                slope = plain.coeff(s)
                rest = rest - slope * s
                factor = "" if slope == 1 else f" * {self._factor(slope)}"
                if s in self.emitter.walked:
                    at = f"tl.cast({origin(s)}, tl.int64){factor}{step}"
                    bases.setdefault(self.emitter.walked[s], []).append(at)
                if not self.blocks.is_point(s):
                    within = self.emitter.within(s)
                    text = f"{within.text}{factor}{step}"
                    offsets.append(Piece(text if text == within.text else f"({text})", within.dims, INT, 0))
            rest = sympy.expand(rest)
            if rest != 0:
                bases.setdefault(0, []).append(f"tl.cast({self._factor(rest)}, tl.int64){step}")
        pointer = Piece(tensor(name), (), INT, 0)
        for depth in sorted(bases):
            text = " + ".join([pointer.text, *bases[depth]])
            key = (text, "base")
            pointer = self.scopes.known.get(key) or self.scopes.named(key, Piece(text, (), INT, depth))
        if not offsets:
            return pointer
        offset = self.emitter.combined(" + ".join(f"{{{k}}}" for k in range(len(offsets))), offsets, INT)
        offset = self.scopes.known.get((offset.text, "offset")) or self.scopes.named((offset.text, "offset"), offset)
        return Piece(f"{pointer.text} + {self.emitter.spread(offset, dims)}", dims, INT, pointer.depth)

    def _factor(self, e: sympy.Expr) -> str:
        """A whole number made of numbers, sizes and constants."""
        if e.is_Integer:
            return str(int(e))
        found = self.emitter.integer(e)
        assert found is not None, f"no whole factor: {e}"
        return found.text

    def _inside(self, item: AppliedUndef, dims: tuple[sympy.Symbol, ...]) -> list[Piece]:
        """Conditions that the access is inside the tensor, one for each index that can leave."""
        name = tensor_name(item)
        found = []
        for position, index in enumerate(item.args):
            if index.is_Symbol and is_rank(index) and self.blocks.size(index) <= self.blocks.shapes[name][position]:
                continue
            at = self.emitter.piece(index, dims)
            extent = self.emitter.size(self.blocks.tensors[name].ranks[position].name)
            low = self.emitter.combined("({0} >= 0)", [at], BOOL)
            high = self.emitter.combined("({0} < {1})", [at, extent], BOOL)
            found += [low, high]
        return found


def _kind(dtype: str, compute: str) -> str:
    if dtype == "b1":
        return BOOL
    if dtype in FLOATING:
        return FLOAT if dtype == compute else NARROW
    return INT
