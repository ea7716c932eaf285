"""Tile programs to Triton: one kernel a program, one block of the grid a tile.

The kernel's arguments are the tensors' pointers, then the sizes (``TritonFunction.sizes``), then the strides of
dimensions that are not known to have stride 1. What a program calls a value is an array in registers; operands of
matrix products come from memory as they lie there, with the element type that they have there.

A loop that skips tiles begins and ends where its conditions can hold; where a program has a version for tiles in which
they hold everywhere, the loop is printed once for those tiles and again for those before and behind.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import sympy

from ...ir.cascade import IDENTITY, accesses, ranks_of, tensor_name
from ...ir.tile import (
    SEQUENTIAL,
    Carry,
    Cases,
    Dot,
    Load,
    Loop,
    Map,
    Program,
    Reduce,
    Skip,
    State,
    Statement,
    Store,
)
from ..tiles.errors import NotLowerable
from ..tiles.facts import around_the_grid, changed_by, comparison_text, sizes_of
from ..tiles.names import indented, origin, size_name, stride, tensor, value
from .algebra import without_factor
from .blocks import Blocks
from .expressions import Emitter
from .memory import descriptor
from .products import Products
from .ranges import stretches
from .scopes import FLOAT, NARROW, Piece, Scopes

#: Stands for the kernel's name, which its text decides.
_NAME = "KERNEL_NAME"
_REDUCE = {"sum": "tl.sum", "max": "highest", "min": "lowest", "prod": "product"}
_JOIN = {"sum": "({0} + {1})", "prod": "({0} * {1})", "max": "maximum({0}, {1})", "min": "minimum({0}, {1})"}


@dataclass(frozen=True)
class TritonFunction:
    """One program's kernel. ``sizes`` are the names of the sizes that are arguments, in order; ``strides`` the (tensor,
    dimension) whose strides are. ``tiles``: (rank, coordinates of a tile) of the grid. Equal texts have equal names."""

    program: Program
    name: str
    text: str
    sizes: tuple[str, ...]
    strides: tuple[tuple[str, int], ...]
    tiles: tuple[tuple[str, int], ...]
    #: (tensor, lengths of a block along its dimensions) that the kernel reads through descriptors, after the pointers.
    descriptors: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def arguments(self) -> tuple[str, ...]:
        return (
            *(tensor(item.name) for item in self.program.tensors),
            *(descriptor(*each) for each in self.descriptors),
            *map(size_name, self.sizes),
            *(stride(*each) for each in self.strides),
        )


def print_kernel(
    program: Program,
    sizes: Mapping[str, int],
    shapes: Mapping[str, Sequence[int]],
    *,
    precision: str = "ieee",
    interpreted: bool = False,
    descriptors: bool = False,
    specialized: bool = False,
    comment: str = "",
) -> TritonFunction:
    """The Triton kernel of one program. ``precision`` of float32 products: ``ieee``, ``tf32x3`` or ``tf32``.

    ``interpreted``: for Triton's interpreter, which multiplies bfloat16 wrongly. ``descriptors``: tiles are read by the
    tensor memory accelerator where their layout allows it. ``specialized``: loops have warps of their own for loads.
    Raises ``NotLowerable``.
    """
    writer = _KernelWriter(program, sizes, shapes, precision, interpreted)
    writer.emitter.memory.by_descriptor, writer.specialized = descriptors, specialized
    return writer.function(comment)


class _KernelWriter:
    def __init__(
        self,
        program: Program,
        sizes: Mapping[str, int],
        shapes: Mapping[str, Sequence[int]],
        precision: str,
        interpreted: bool,
    ) -> None:
        self.program = program
        self.blocks = Blocks(program, sizes, shapes)
        self.scopes = Scopes()
        number_type = "tl.float64" if program.compute == "f64" else "tl.float32"
        self.emitter = Emitter(self.blocks, self.scopes, number_type)
        self.products = Products(self.emitter, precision, interpreted)
        self.grid: list[Loop] = []
        self.specialized = False

    def function(self, comment: str) -> TritonFunction:
        before, self.grid, inside, after = around_the_grid(self.program.body)
        if before or after:
            raise NotLowerable("sums of several workers", where=self.program.name)
        self._decode()
        self.body(inside)
        sizes = tuple(name for name in sizes_of(self.program) if self.blocks.is_argument(name))
        body = "\n".join(self.scopes.lines[0])
        sizes = tuple(name for name in sizes if _mentions(body, size_name(name)))
        strides = tuple(
            (item.name, position)
            for item in self.program.tensors
            for position in range(len(item.ranks))
            if position != item.unit and _mentions(body, stride(item.name, position))
        )
        tiles = tuple((loop.rank.name, self._step(loop)) for loop in self.grid)
        described = tuple(self.emitter.memory.descriptors)
        plain = TritonFunction(self.program, _NAME, "", sizes, strides, tiles, described)
        lines = [f"# {line}".rstrip() for line in comment.splitlines()]
        lines += ["@triton.jit", f"def {_NAME}({', '.join(plain.arguments)}):"]
        text = "\n".join([*lines, *indented(self.scopes.lines[0], 4)]) + "\n"
        name = f"{self.program.name}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        return replace(plain, name=name, text=text.replace(_NAME, name))

    def _step(self, loop: Loop) -> int:
        return 1 if self.blocks.is_point(loop.rank) else self.blocks.length(loop.rank)

    def _decode(self) -> None:
        """The coordinates that a block's number stands for. Tiles with more work come first."""
        if self.grid:
            self.scopes.write("block = tl.program_id(0)")
        for number, loop in reversed(list(enumerate(self.grid))):
            rank, step = loop.rank, self._step(loop)
            size, o = self.emitter.size_text(rank.name), origin(rank)
            tiles = size if step == 1 else f"tl.cdiv({size}, {step})"
            at = f"block % {tiles}" if number else "block"
            if self._longest_last(rank):
                at = f"{tiles} - 1 - {at}" if number == 0 else f"{tiles} - 1 - ({at})"
            self.scopes.write(f"{o} = {at}" if step == 1 else f"{o} = ({at}) * {step}")
            if number:
                self.scopes.write(f"block = block // {tiles}")
            self.emitter.walked[rank] = 0

    def _longest_last(self, rank: sympy.Symbol) -> bool:
        """Whether a loop inside goes further for later tiles of a grid's rank."""
        for loop in self.program.loops:
            for item in loop.body if loop.kind == SEQUENTIAL else ():
                for part in sympy.Mul.make_args(item.condition) if isinstance(item, Skip) else ():
                    if comparison_text(part) in ("<", "<="):
                        difference = sympy.expand(part.args[0] - part.args[1])
                        if difference.coeff(loop.rank) == 1 and difference.coeff(rank) == -1:
                            return True
        return False

    # Statements -------------------------------------------------------------------------------------------------------

    def body(self, body: Sequence[Statement], whole: bool = False) -> None:
        """``whole``: in tiles where the conditions of the program's cases hold everywhere."""
        for item in body:
            if isinstance(item, Loop):
                self.loop(item)
            elif isinstance(item, Cases):
                self.body(item.full if whole else item.partial, whole)
            elif isinstance(item, Dot):
                self.assign(item.target, self.products.dot(item))
            elif isinstance(item, Reduce):
                self.reduce(item)
            elif isinstance(item, Store):
                self.store(item)
            elif isinstance(item, Load | Map | State | Carry):
                self.element(item)

    def loop(self, item: Loop) -> None:
        rank = item.rank
        step = self._step(item)
        for stretch in stretches(self.emitter, item):
            self.scopes.open(changed_by(item.body))
            self.emitter.walked[rank] = self.scopes.depth
            if stretch.whole:
                self.blocks.even.add(rank)
            self.body(item.body, stretch.whole)
            self.blocks.even.discard(rank)
            del self.emitter.walked[rank]
            lines = self.scopes.close()
            more = ", warp_specialize=True" if self.specialized else ""
            self.scopes.write(f"for {origin(rank)} in tl.range({stretch.first}, {stretch.last}, {step}{more}):")
            for line in indented(lines, 4):
                self.scopes.write(line)

    def element(self, item: Load | Map | State | Carry) -> None:
        dims = tuple(item.target.args)
        self.emitter.order = dims
        if isinstance(item, Load):
            if tensor_name(item.target) in self.products.in_pieces:
                return
            found = self.emitter.memory.load(item.source, dims)
            if found.dims == dims and found.kind in (FLOAT, NARROW) and not self.blocks.can_leave(item.source):
                self.assign(item.target, found, keep=True)
                return
            self.assign(item.target, self.emitter.as_float(found))
            return
        found = self.emitter.piece(item.body, dims)
        if isinstance(item, Map) and found.kind == NARROW and set(found.dims) == set(dims):
            self.assign(item.target, found, keep=True)
            return
        self.assign(item.target, self.emitter.as_float(found))

    def assign(self, target: sympy.Expr, piece: Piece, keep: bool = False) -> None:
        """A value takes new content; ``keep``: in the element type that it has."""
        name, dims = tensor_name(target), tuple(target.args)
        text = self.emitter.filled(piece, dims) if dims else piece.text
        if not dims and piece.is_literal:
            text = f"tl.full((), {piece.text}, {self.emitter.number_type})"
        self.scopes.forget(name)
        self.scopes.write(f"{value(name)} = {text}")
        self.emitter.made.setdefault(name, self.scopes.depth)
        self.emitter.kinds[name] = (piece.kind, piece.dtype) if keep else (FLOAT, "")

    def reduce(self, item: Reduce) -> None:
        kept = self.blocks.kept(tuple(item.target.args))
        frame = self._frame(item, kept)
        self.emitter.order = frame
        factor, body = _factored(item.body, item.reduction)
        found = self.emitter.number(body, frame)
        text = self.emitter.filled(found, frame)
        identity = self.emitter.piece(IDENTITY[item.reduction], ()).text
        for s in item.reduced:
            if self.blocks.has_tail(s):
                mask = self.emitter.spread(self.emitter.tail(s), frame)
                text = f"tl.where({mask}, {text}, {identity})"
        for s in sorted(item.reduced, key=frame.index, reverse=True):
            axis = frame.index(s)
            text = f"{_REDUCE[item.reduction]}({text}, {axis})"
        left = tuple(s for s in frame if s in kept)
        total = Piece(text, left, FLOAT, self.scopes.depth, found.reads)
        if factor != 1:
            total = self.emitter.combined("({0} * {1})", [total, self.emitter.number(factor, ())], FLOAT)
        if item.accumulate:
            total = self.emitter.combined(_JOIN[item.reduction], [self.emitter.held(item.target), total], FLOAT)
        self.assign(item.target, total)

    def _frame(self, item: Reduce, kept: tuple[sympy.Symbol, ...]) -> tuple[sympy.Symbol, ...]:
        """The order of dimensions to reduce in: that of a value which has them all, else kept ones first."""
        dims = {*kept, *item.reduced}
        for each in accesses(item.body):
            own = tuple(each.args)
            if self.blocks.is_value(each) and set(own) == dims and tuple(s for s in own if s in kept) == kept:
                return own
        return (*kept, *item.reduced)

    def store(self, item: Store) -> None:
        ranks = tuple(s for index in item.target.args for s in sorted(ranks_of(index), key=str))
        dims = self.blocks.kept(ranks)
        self.emitter.order = dims
        found = self.emitter.piece(item.body, dims)
        if found.kind not in (FLOAT, NARROW):
            found = self.emitter.as_float(found)
        # Ranks of the grid that the tensor does not have: the first block writes.
        others = [loop.rank for loop in self.grid if loop.rank not in ranks]
        self.emitter.memory.store(item.target, found, [f"{origin(s)} == 0" for s in others])


def _factored(e: sympy.Expr, reduction: str) -> tuple[sympy.Expr, sympy.Expr]:
    """(positive number, rest) with the number outside of a sum, maximum or minimum."""
    factor, rest = without_factor(e)
    if reduction == "prod" or not factor > 0 or rest.is_number:
        return sympy.Integer(1), e
    return factor, rest


def _mentions(text: str, name: str) -> bool:
    import re

    return re.search(rf"\b{re.escape(name)}\b", text) is not None


__all__ = ["TritonFunction", "print_kernel"]
