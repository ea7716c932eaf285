"""Matrix products of a tile program as ``tl.dot``: element types of the operands, zeros beyond the ends of what is
summed over, and the two dimensions that it wants."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import sympy
from sympy.core.function import AppliedUndef

from ...ir.cascade import rank, ranks_of, tensor_name
from ...ir.tile import Cases, Dot, Load, Loop, walk
from ..tiles.facts import read_by
from ..tiles.names import origin
from .expressions import Emitter
from .memory import FLOATING, TRITON_TYPES
from .scopes import BOOL, FLOAT, NARROW, Piece

_NARROW = ("bf16", "f16")
#: Coordinates of a rank that is summed over which operands hold at once; longer ones are read piece by piece.
LONGEST_WHOLE, PIECE = 256, 64


class Products:
    """An operand that comes from memory keeps its element type; one that is computed takes the other's. If both are
    computed, they are rounded to the type that all other operands in memory have, if that is a narrow one: the model
    computes in it."""

    def __init__(self, emitter: Emitter, precision: str, interpreted: bool) -> None:
        self.emitter, self.precision, self.interpreted = emitter, precision, interpreted
        self.blocks = emitter.blocks
        self.loads = {
            tensor_name(item.target): item.source for item in walk(self.blocks.program.body) if isinstance(item, Load)
        }
        self.in_pieces = frozenset(self._in_pieces())

    def dot(self, item: Dot) -> Piece:
        """The product, added to the target's content if it accumulates."""
        if any(tensor_name(side) in self.in_pieces for side in (item.left, item.right)):
            return self._long(item)
        held = self.emitter.held(item.target) if item.accumulate else None
        return self._whole(item, held)

    # Long sums --------------------------------------------------------------------------------------------------------

    def _in_pieces(self) -> set[str]:
        """Loaded values that only products read, and so much of a rank at once that they are read piece by piece."""
        found: set[str] = set()
        other: set[str] = set()
        for item in walk(self.blocks.program.body):
            if isinstance(item, Dot):
                sides = {tensor_name(side) for side in (item.left, item.right)}
                long = len(item.reduced) == 1 and item.reduced[0] not in self.blocks.steps
                long = long and self.blocks.length(item.reduced[0]) > LONGEST_WHOLE and sides <= set(self.loads)
                (found if long else other).update(sides)
            elif not isinstance(item, Load):
                other.update(read_by(item) if not isinstance(item, Loop | Cases) else ())
        return found - other

    def _long(self, item: Dot) -> Piece:
        """A loop over pieces of the rank that is summed over, which both operands are read in."""
        whole, scopes, blocks = item.reduced[0], self.emitter.scopes, self.blocks
        part = rank(f"{whole.name}_piece")
        blocks.add(part, blocks.size(whole), PIECE)
        table = {whole: part}
        sides = [self.loads[tensor_name(side)].xreplace(table) for side in (item.left, item.right)]
        total, dims = scopes.fresh(), tuple(item.target.args)
        start = self.emitter.held(item.target).text if item.accumulate else ""
        zeros = f"tl.full({self.emitter.shape(dims)}, 0.0, {self.emitter.number_type})"
        scopes.write(f"{total} = {start or zeros}")
        scopes.open(frozenset())
        self.emitter.walked[part] = scopes.depth
        held = Piece(total, dims, FLOAT, scopes.depth)
        found = self._whole(replace(item, reduced=(part,), left=sides[0], right=sides[1]), held)
        scopes.write(f"{total} = {found.text}")
        del self.emitter.walked[part]
        lines = scopes.close()
        scopes.write(f"for {origin(part)} in tl.range(0, {blocks.size(whole)}, {PIECE}):")
        for line in lines:
            scopes.write(f"    {line}")
        return Piece(total, dims, FLOAT, scopes.depth)

    # One product ------------------------------------------------------------------------------------------------------

    def _whole(self, item: Dot, held: Piece | None) -> Piece:
        rows = tuple(s for s in item.target.args if s in ranks_of(item.left))
        columns = tuple(s for s in item.target.args if s not in rows)
        left, right = self._piece(item.left, (*rows, *item.reduced)), self._piece(item.right, (*item.reduced, *columns))
        dtype = self._type(left, right)
        texts = [
            self._operand(left, (rows, item.reduced), item.reduced, dtype),
            self._operand(right, (item.reduced, columns), item.reduced, dtype),
        ]
        dims = tuple(item.target.args)
        flat = len(rows) == 1 and len(columns) == 1
        arguments = ", ".join(texts)
        if held is not None and flat:
            arguments += f", {held.text}"
        if dtype == "f32":
            arguments += f', input_precision="{self.precision}"'
        text = f"tl.dot({arguments})"
        if dtype == "f64" or self.blocks.program.compute == "f64":
            text = f"tl.dot({arguments}, out_dtype=tl.float64)"
        if not flat:
            text = f"tl.reshape({text}, {self.emitter.shape(dims)})"
            if held is not None:
                text = f"{held.text} + {text}"
        return Piece(text, dims, FLOAT, self.emitter.scopes.depth)

    def _piece(self, item: AppliedUndef, dims: tuple[sympy.Symbol, ...]) -> Piece:
        self.emitter.order = dims
        found = self.emitter.read(item, dims)
        if not self.blocks.is_value(item) and self.blocks.can_leave(item):
            # There are NaNs beyond the ends: to be masked as what is computed.
            return replace(self.emitter.as_float(found), dtype="")
        return found

    def _type(self, left: Piece, right: Piece) -> str:
        """The element type that both operands are multiplied in."""
        compute = self.blocks.program.compute
        given = [self._stored(piece) for piece in (left, right)]
        known = [each for each in given if each]
        if not known:
            return self._common if compute == "f32" else compute
        if len(set(known)) == 1 and known[0] in (*_NARROW, "f32", "f64"):
            return known[0] if compute == "f32" else compute
        return compute

    def _stored(self, piece: Piece) -> str:
        """The element type in memory of an operand that comes from there as it is; empty for a computed one."""
        return piece.dtype if piece.dtype in FLOATING and piece.kind in (FLOAT, NARROW) else ""

    @cached_property
    def _common(self) -> str:
        """The narrow element type of all floating inputs that products read, else of all that have two dimensions."""
        sides = {
            tensor_name(side)
            for item in walk(self.blocks.program.body)
            if isinstance(item, Dot)
            for side in (item.left, item.right)
        }
        read = sides | {tensor_name(source) for name, source in self.loads.items() if name in sides}
        tensors = [t for t in self.blocks.tensors.values() if t.dtype in FLOATING and t.role == "input"]
        found = {t.dtype for t in tensors if t.name in read} or {t.dtype for t in tensors if len(t.ranks) > 1}
        return found.pop() if len(found) == 1 and found <= set(_NARROW) else "f32"

    def _operand(
        self,
        piece: Piece,
        sides: tuple[tuple[sympy.Symbol, ...], tuple[sympy.Symbol, ...]],
        reduced: tuple[sympy.Symbol, ...],
        dtype: str,
    ) -> str:
        """The text of an operand with two dimensions."""
        dims = (*sides[0], *sides[1])
        text = self.emitter.filled(piece, dims)
        if not self._stored(piece):
            masks = [self.emitter.tail(s) for s in reduced if self.blocks.has_tail(s)]
            if masks:
                self.emitter.order = dims
                mask = self.emitter.combined(" & ".join(f"({{{k}}})" for k in range(len(masks))), masks, BOOL)
                mask = Piece(f"({mask.text})", mask.dims, BOOL, mask.depth)
                text = f"tl.where({self.emitter.spread(mask, dims)}, {text}, 0.0)"
        if (piece.dtype or self.blocks.program.compute) != dtype:
            text = f"tl.cast({text}, {TRITON_TYPES[dtype]})"
        if len(sides[0]) > 1 or len(sides[1]) > 1:
            lengths = [self._flat(side) for side in sides]
            text = f"tl.reshape({text}, ({lengths[0]}, {lengths[1]}))"
        if self.interpreted and dtype in _NARROW:
            text = f"tl.cast({text}, tl.float32)"
        return text

    def _flat(self, ranks: tuple[sympy.Symbol, ...]) -> int:
        total = 1
        for s in ranks:
            total *= self.blocks.length(s)
        return total
