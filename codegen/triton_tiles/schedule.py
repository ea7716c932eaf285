"""Tile shapes, warps and pipeline stages: a first choice for a target, and a few others to time.

The first choice keeps states and scores in registers and what streams past, several stages of it, in shared memory.
What works on Hopper for attention agrees with it: 128 x 64 for head dimensions of 64 and 128, 64 x 32 for 256, in 4
warps or 8 as the accumulators ask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy

from ...ir.cascade import Where, accesses, ranks_of, tensor_name
from ...ir.tile import SEQUENTIAL, Cases, Dot, Load, Loop, Map, Program, Reduce, State, Statement, walk
from ..tiles.launches import Kernel
from .blocks import Blocks
from .products import LONGEST_WHOLE, PIECE
from .target import Target

#: Registers of 32 bits that a thread's arrays may take, of the 255 that it can have: before Hopper, products have their
#: operands in registers too. Seen in machine code for every variant of attention.
_ARRAYS, _ARRAYS_BEFORE_HOPPER = 160, 140
#: (rows, streamed) from large to small, tried in this order.
_SHAPES = ((128, 128), (128, 64), (64, 64), (128, 32), (64, 32), (32, 32), (16, 32), (16, 16))
_FEW = 16
#: Elements of a block where nothing is multiplied.
_PLAIN = (32, 128)
_MAP = 1024


@dataclass(frozen=True)
class Shape:
    """Factors on the first choice's tile lengths."""

    rows: float = 1.0
    columns: float = 1.0


@dataclass(frozen=True)
class Launch:
    """``warps`` of 32 threads a block; ``stages`` of loads in flight. ``descriptors``: tiles come through the tensor
    memory accelerator; ``specialized``: with warps of their own that load them."""

    warps: int
    stages: int
    descriptors: bool = False
    specialized: bool = False


@dataclass(frozen=True)
class GpuTiles:
    """Tile lengths for a target. ``operand_bytes``: of an element of what streams past. ``shape``: other than the first
    choice; ``tile``: (rows, streamed) that were chosen by their price."""

    target: Target
    operand_bytes: int = 2
    shape: Shape = Shape()
    tile: tuple[int, int] | None = None

    @property
    def workers(self) -> int:
        return self.target.units

    @property
    def readers(self) -> int:
        # So many loads are in flight at once that memory is busy.
        return 4 * self.target.units

    @property
    def shortest(self) -> int:
        # Products are slow in shorter tiles: parts of the streamed rank fill the multiprocessors instead.
        return 128 if self.tile is None else self.tile[0]

    @property
    def scans(self) -> bool:
        # Loops end where bounds of ranks say; a choice by data in every tile would keep loads from being in flight.
        return False

    def lengths(self, kernel: Kernel, held: Sequence[int], depth: int, item_bytes: int) -> tuple[int, int]:
        products = len(kernel.inner)
        if not products and not _multiplies(kernel):
            return _PLAIN if kernel.roots else (_MAP, _MAP)
        if self.tile is not None:
            return self.tile
        rows, columns = self._first(sum(held), depth, max(products, 1), item_bytes // 4)
        return max(16, int(rows * self.shape.rows)), max(16, int(columns * self.shape.columns))

    def _first(self, held: int, depth: int, products: int, words: int) -> tuple[int, int]:
        # Products of float32 by parts need registers for the parts.
        room = array_registers(self.target) * 256 // words
        if self.operand_bytes > 2:
            room = room * 2 // (14 if products > 1 and depth > 64 else 7)
        # Without accumulators of many columns, as for a loss, tiles are those of a plain matrix product.
        shapes = _SHAPES if held <= _FEW else _SHAPES[1:]
        depth = PIECE if depth > LONGEST_WHOLE else depth
        for rows, columns in shapes:
            arrays = rows * held + rows * columns * products * 5 // 4
            shared = (2 * columns * 2 * depth + rows * depth * products) * self.operand_bytes
            if arrays <= room and shared <= self.target.shared:
                return rows, columns
        return _SHAPES[-1]


def chosen(schedule: Mapping[str, int]) -> dict[str, Any]:
    """A chosen schedule (``FusedCascade.schedule``) as settings of ``prepare_triton``; nothing where rules decide."""
    if not {"rows", "streamed"} <= schedule.keys():
        return {}
    launches = Launch(schedule["warps"], schedule["stages"]) if {"warps", "stages"} <= schedule.keys() else None
    return {"tile": (schedule["rows"], schedule["streamed"]), "launches": launches}


def array_registers(target: Target) -> int:
    return _ARRAYS if target.capability >= 90 else _ARRAYS_BEFORE_HOPPER


def _multiplies(kernel: Kernel) -> bool:
    return any(root.reduction == "sum" and len(root.indices) > 1 for root in kernel.roots)


def launch(program: Program, blocks: Blocks, target: Target, operand_bytes: int) -> Launch:
    """Warps and stages for a program with the tiles that it has."""
    arrays, pieces = arrays_of(program, blocks, operand_bytes)
    warps = 4 if arrays <= array_registers(target) * 128 and not pieces else 8
    dots = any(isinstance(item, Dot) for item in _one_version(program.body))
    return Launch(warps, _stages(program, blocks, target, operand_bytes) if dots else 1)


def arrays_of(program: Program, blocks: Blocks, operand_bytes: int) -> tuple[int, bool]:
    """Registers of 32 bits that a block's states and scores take; whether a product is made in pieces of its depth."""
    statements = list(_one_version(program.body))
    states = {tensor_name(item.target): item.target for item in statements if isinstance(item, State)}
    dots = {tensor_name(item.target): item.target for item in statements if isinstance(item, Dot)}
    held = sum(_elements(blocks, target.args) for target in states.values())
    scores = sum(_elements(blocks, target.args) for name, target in dots.items() if name not in states)
    # What is added to or multiplies scores element by element is as large as they are.
    more = any(_has_tile_terms(item, blocks) for item in statements if isinstance(item, Map | Reduce))
    arrays = (held + scores * (7 if more else 5) // 4) * (2 if program.compute == "f64" else 1)
    if operand_bytes > 2:
        arrays = arrays * 2
    pieces = any(blocks.length(s) > LONGEST_WHOLE for item in statements if isinstance(item, Dot) for s in item.reduced)
    return arrays, pieces


def _has_tile_terms(item: Map | Reduce, blocks: Blocks) -> bool:
    """Whether an expression over a tile's elements uses memory of two dimensions, or coordinates as numbers."""
    whole = item.body.replace(lambda e: isinstance(e, Where), lambda e: e.args[1] + e.args[2])
    if any(len(blocks.kept(tuple(ranks_of(each)))) > 1 for each in accesses(whole) if not blocks.is_value(each)):
        return True
    plain = whole.xreplace({each: sympy.Integer(0) for each in accesses(whole)})
    return any(not blocks.is_point(s) for s in ranks_of(plain))


def _one_version(body: Sequence[Statement]) -> Iterator[Statement]:
    """Every statement, of two versions of a loop's body only the longer one."""
    for item in body:
        if isinstance(item, Loop):
            yield from _one_version(item.body)
        elif isinstance(item, Cases):
            yield from _one_version(item.partial)
        else:
            yield item


def _stages(program: Program, blocks: Blocks, target: Target, operand_bytes: int) -> int:
    """As many as shared memory has room for, beside what is resident, up to 3."""
    resident, streamed = shared_tiles(program, blocks, operand_bytes)
    return max(1, min(3, (target.shared - resident) // streamed)) if streamed else 1


def shared_tiles(program: Program, blocks: Blocks, operand_bytes: int) -> tuple[int, int]:
    """Bytes of operands of products that stay in shared memory, and that one stage of the streamed loop takes of it."""
    streamed = resident = 0
    inside = [loop for loop in program.loops if loop.kind == SEQUENTIAL]
    ranks = {loop.rank for loop in inside}
    loaded = {tensor_name(item.target): item.source for item in walk(program.body) if isinstance(item, Load)}
    seen: set[sympy.Expr] = set()
    for item in (each for each in _one_version(program.body) if isinstance(each, Dot)):
        long = blocks.length(item.reduced[0]) // PIECE if blocks.length(item.reduced[0]) > LONGEST_WHOLE else 1
        for side in (item.left, item.right):
            source = loaded.get(tensor_name(side), side)
            if source in seen:
                continue
            seen.add(source)
            computed = tensor_name(side) in blocks.values and tensor_name(side) not in loaded
            size = _elements(blocks, side.args) // long * operand_bytes
            if long == 1 and not any(ranks & index.free_symbols for index in side.args):
                resident += size
            elif not computed:
                streamed += size
    return resident, streamed


def _elements(blocks: Blocks, indices: Sequence[object]) -> int:
    total = 1
    for index in indices:
        for s in getattr(index, "free_symbols", ()):
            if s in blocks.steps or s.name in blocks.sizes or s in dict(blocks.program.alias):
                total *= 1 if blocks.is_point(s) else blocks.length(s)
    return total


def candidates(first: Launch, target: Target) -> tuple[tuple[Shape, Launch | None], ...]:
    """(tile shape, launch or None for that shape's own) worth timing, the first choice first."""
    described = replace(first, descriptors=True)
    hopper = ((Shape(), described), (Shape(columns=2.0), replace(described, warps=8)))
    blackwell = ((Shape(), replace(described, specialized=True)),)
    return (
        (Shape(), None),
        *(hopper if target.capability >= 90 else ()),
        *(blackwell if target.capability >= 100 else ()),
        (Shape(), Launch(12 - first.warps, first.stages)),
        (Shape(columns=2.0), None),
        (Shape(columns=0.5), None),
        (Shape(rows=0.5), None),
        (Shape(rows=0.5), Launch(4, min(4, first.stages + 1))),
    )


__all__ = ["GpuTiles", "Launch", "Loop", "Shape", "candidates", "chosen", "launch"]
