"""Expressions of the cascade language over tiles, as Triton: each part in the outermost loop that knows what it reads,
with no more dimensions than it needs.

Indices, sizes and integer tensors are computed with as integers, all else in the type that the program computes in.
Exponentials are powers of 2: the factor log2(e) goes into the terms of the exponent, where it joins factors that are
there already (``exp(0.125*QK - M)`` is ``exp2(QK*0.18033688 - M*1.442695)``).
"""

from __future__ import annotations

import sympy
from sympy.core.function import AppliedUndef

from ...ir.cascade import (
    COMPARISONS,
    Maximum,
    Minimum,
    Relu,
    Round,
    Sigmoid,
    Where,
    accesses,
    is_literal,
    is_rank,
    is_size,
    ranks_of,
    tensor_name,
)
from ..tiles.facts import comparison_text
from ..tiles.names import inside, origin, size_name, value
from .algebra import scaled
from .blocks import Blocks
from .magnitude import Magnitudes
from .memory import Memory
from .scopes import BOOL, FLOAT, INT, Piece, Scopes

_COMPARED = tuple(COMPARISONS.values())
_FUNCTIONS = {
    sympy.log: "tl.log({0})",
    sympy.tanh: "hyperbolic_tangent({0})",
    sympy.Abs: "tl.abs({0})",
    Sigmoid: "sigmoid({0})",
    Relu: "maximum({0}, 0.0)",
    Round: "rounded({0})",
    Maximum: "maximum({0}, {1})",
    Minimum: "minimum({0}, {1})",
}
#: Precedence of a text, so that it is put in parentheses where it must be.
_LONGEST_TEXT = 60
_LOG2_E = sympy.Float("1.4426950408889634074", 20)


class Emitter:
    """``frame`` in the methods is the order of dimensions that a statement works in."""

    def __init__(self, blocks: Blocks, scopes: Scopes, number_type: str) -> None:
        self.blocks, self.scopes, self.number_type = blocks, scopes, number_type
        self.memory = Memory(self)
        self.magnitudes = Magnitudes(blocks)
        #: Inside how many loops a walked rank's tile is known; the depth and element type at which values were made.
        self.walked: dict[sympy.Symbol, int] = {}
        self.made: dict[str, int] = {}
        self.kinds: dict[str, tuple[str, str]] = {}

    # Entry points -----------------------------------------------------------------------------------------------------

    def number(self, e: sympy.Expr, frame: tuple[sympy.Symbol, ...]) -> Piece:
        """The expression as numbers of the type computed in."""
        return self.as_float(self.piece(e, frame))

    def piece(self, e: sympy.Expr, frame: tuple[sympy.Symbol, ...]) -> Piece:
        """The expression in the kind that it has by itself, with those of the frame's dimensions that it needs."""
        if is_literal(e):
            return self._literal(e)
        key = (e, self._dims(e, frame))
        found = self.scopes.known.get(key)
        if found is not None:
            return found
        made = self._made(e, frame)
        costly = isinstance(e, AppliedUndef) or len(made.text) > _LONGEST_TEXT or isinstance(e, sympy.exp | Where)
        if costly and not made.is_plain:
            return self.scopes.named(key, made)
        self.scopes.known[key] = made
        return made

    def spread(self, piece: Piece, dims: tuple[sympy.Symbol, ...]) -> str:
        """The piece's text with length-1 dimensions where it has none of ``dims``. Order as in ``dims``."""
        if piece.dims == dims or not piece.dims:
            return piece.text
        if not piece.is_plain:
            piece = self.scopes.named((piece.text, piece.dims, "spread"), piece)
        order = tuple(s for s in dims if s in piece.dims)
        if order != piece.dims:
            axes = ", ".join(str(piece.dims.index(s)) for s in order)
            turned = Piece(f"tl.permute({piece.text}, {axes})", order, piece.kind, piece.depth, piece.reads)
            piece = self.scopes.named((piece.text, order, "turned"), turned)
        if order == dims:
            return piece.text
        return f"{piece.text}[{', '.join(':' if s in order else 'None' for s in dims)}]"

    def filled(self, piece: Piece, dims: tuple[sympy.Symbol, ...]) -> str:
        """The piece's text with all of the dimensions ``dims``, at full length."""
        if piece.dims == dims:
            return piece.text
        if set(piece.dims) == set(dims):
            return self.spread(piece, dims)
        shape = self.shape(dims)
        if not piece.dims:
            if piece.is_literal:
                return f"tl.full({shape}, {piece.text}, {self.number_type})"
            return f"tl.full({shape}, 0.0, {self.number_type}) + {piece.text}"
        return f"tl.broadcast_to({self.spread(piece, dims)}, {shape})"

    def shape(self, dims: tuple[sympy.Symbol, ...]) -> str:
        lengths = [str(self.blocks.length(s)) for s in dims]
        return f"({', '.join(lengths)}{',' if len(lengths) == 1 else ''})"

    # Kinds ------------------------------------------------------------------------------------------------------------

    def as_float(self, piece: Piece) -> Piece:
        if piece.kind == FLOAT:
            return piece
        if piece.is_literal:
            return Piece(repr(float(piece.text)), (), FLOAT, 0)
        made = Piece(f"tl.cast({piece.text}, {self.number_type})", piece.dims, FLOAT, piece.depth, piece.reads)
        key = (piece.text, piece.dims, piece.kind, "float")
        return self.scopes.known.get(key) or self.scopes.named(key, made)

    def as_bool(self, piece: Piece) -> Piece:
        if piece.kind == BOOL:
            return piece
        return Piece(f"({piece.text} != 0)", piece.dims, BOOL, piece.depth, piece.reads)

    # Parts ------------------------------------------------------------------------------------------------------------

    def _literal(self, e: sympy.Expr) -> Piece:
        if e is sympy.oo or e == -sympy.oo or e is sympy.nan:
            text = {sympy.oo: "inf", -sympy.oo: "-inf", sympy.nan: "nan"}[e]
            return Piece(f'float("{text}")', (), FLOAT, 0)
        if e.is_Integer:
            return Piece(str(int(e)), (), INT, 0)
        return Piece(repr(float(e)), (), FLOAT, 0)

    def _made(self, e: sympy.Expr, frame: tuple[sympy.Symbol, ...]) -> Piece:
        if isinstance(e, AppliedUndef):
            return self.read(e, frame)
        if e.is_Symbol:
            return self.symbol(e)
        if e.is_Add:
            return self._sum(e, frame)
        if e.is_Mul:
            return self._product(e, frame)
        if e.is_Pow:
            return self._power(e.args[0], e.args[1], frame)
        if isinstance(e, sympy.exp):
            if self.magnitudes.cancels(e.args[0]):
                exponent = self.number(e.args[0], frame)
                return self.combined(f"tl.exp2({{0}} * {float(_LOG2_E)!r})", [exponent], FLOAT)
            exponent = self.number(scaled(e.args[0], _LOG2_E), frame)
            return self.combined("tl.exp2({0})", [exponent], FLOAT)
        if isinstance(e, Where):
            rows = self._masked_rows(e, frame)
            if rows is not None:
                return self._product(rows, frame)
            condition = self.as_bool(self.piece(e.args[0], frame))
            branches = [self.number(branch, frame) for branch in e.args[1:]]
            form = "tl.where({0}, {1}, {2})"
            if all(branch.is_literal for branch in branches):
                form = f"tl.cast({form}, {self.number_type})"
            return self.combined(form, [condition, *branches], FLOAT)
        if isinstance(e, _COMPARED):
            sides = [self.piece(side, frame) for side in e.args]
            if any(side.kind != INT for side in sides):
                sides = [self.as_float(side) for side in sides]
            elif sum(side.dtype == "i64" for side in sides) == 1:
                sides = [self._narrowed(side) for side in sides]
            return self.combined(f"({{0}} {comparison_text(e)} {{1}})", sides, BOOL)
        if isinstance(e, Maximum) and all(self._is_condition(part, frame) for part in e.args):
            return self.combined("({0} | {1})", [self.piece(part, frame) for part in e.args], BOOL)
        return self.combined(_FUNCTIONS[e.func], [self.number(argument, frame) for argument in e.args], FLOAT)

    def _narrowed(self, piece: Piece) -> Piece:
        """64-bit integers as 32-bit ones, for comparing with coordinates: those far out stay far out."""
        if piece.dtype != "i64":
            return piece
        bounded = f"tl.minimum(tl.maximum({piece.text}, -2147483647), 2147483647)"
        made = Piece(f"tl.cast({bounded}, tl.int32)", piece.dims, INT, piece.depth, piece.reads)
        return self.scopes.named((piece.text, piece.dims, "narrowed"), made)

    def _masked_rows(self, e: sympy.Expr, frame: tuple[sympy.Symbol, ...]) -> sympy.Expr | None:
        """``where(c, 0, a * S)`` with a state S that has more dimensions than c and a, as ``where(c, 0, a) * S``: one
        choice a row. What the state holds where c says 0 is 0, or a NaN that a product has brought."""
        condition, yes, no = e.args
        if yes != 0 or not no.is_Mul:
            return None
        outer = [part for part in no.args if len(self._dims(part, frame)) < len(self._dims(no, frame))]
        inner = [part for part in no.args if part not in outer]
        held = all(isinstance(part, AppliedUndef) and self.blocks.is_value(part) for part in inner)
        dims = set(self._dims(sympy.Mul(*outer), frame))
        if not outer or not held or not set(self._dims(condition, frame)) <= dims:
            return None
        return sympy.Mul(Where(condition, sympy.Integer(0), sympy.Mul(*outer)), *inner)

    def _dims(self, e: sympy.Expr, frame: tuple[sympy.Symbol, ...]) -> tuple[sympy.Symbol, ...]:
        return tuple(s for s in frame if s in ranks_of(e) and not self.blocks.is_point(s))

    def _is_condition(self, e: sympy.Expr, frame: tuple[sympy.Symbol, ...]) -> bool:
        if isinstance(e, AppliedUndef):
            return self.piece(e, frame).kind == BOOL
        if isinstance(e, _COMPARED):
            return True
        return (e.is_Mul or isinstance(e, Maximum)) and all(self._is_condition(part, frame) for part in e.args)

    def combined(self, form: str, parts: list[Piece], kind: str) -> Piece:
        """A text made of parts, each spread to the dimensions of all."""
        depth = max(part.depth for part in parts)
        dims = self._joined(parts)
        texts = []
        for part in parts:
            hoisted = part.depth < depth or (part.dims != dims and part.dims)
            if hoisted and not part.is_plain:
                part = self.scopes.named((part.text, part.dims, "hoisted"), part)
            texts.append(self.spread(part, dims))
        reads = frozenset().union(*(part.reads for part in parts))
        return Piece(form.format(*texts), dims, kind, depth, reads)

    def _joined(self, parts: list[Piece]) -> tuple[sympy.Symbol, ...]:
        """The dimensions of all parts, in the order that the one with most of them has."""
        widest = max(parts, key=lambda part: len(part.dims)).dims
        more = [s for part in parts for s in part.dims if s not in widest]
        if not more:
            return widest
        return tuple(s for s in self.order if s in widest or s in more)

    #: The statement's frame, for joining parts that have different dimensions.
    order: tuple[sympy.Symbol, ...] = ()

    def symbol(self, s: sympy.Symbol) -> Piece:
        if is_size(s):
            return self.size(s.name.strip("|"))
        if not is_rank(s):
            return self.size(s.name)
        if self.blocks.is_point(s):
            return Piece(origin(s), (), INT, self.walked[s])
        key = ("coordinates", s)
        found = self.scopes.known.get(key)
        if found is not None:
            return found
        within = self.within(s)
        if s not in self.walked:
            return within
        made = Piece(f"{origin(s)} + {within.text}", (s,), INT, self.walked[s])
        return self.scopes.named(key, made, inside(s))

    def within(self, s: sympy.Symbol) -> Piece:
        """0, 1, ... along a rank's dimension."""
        key = ("within", s)
        made = Piece(f"tl.arange(0, {self.blocks.length(s)})", (s,), INT, 0)
        return self.scopes.known.get(key) or self.scopes.named(key, made, f"a_{s.name}")

    def size(self, name: str) -> Piece:
        """A rank's size or a named constant: an argument of the kernel, or a number where arrays hold all of a rank."""
        return Piece(self.size_text(name), (), INT, 0)

    def size_text(self, name: str) -> str:
        own = dict((rank.name, other.name) for rank, other in self.blocks.program.alias).get(name, name)
        return size_name(own) if self.blocks.is_argument(own) else str(self.blocks.sizes[own])

    def tail(self, s: sympy.Symbol) -> Piece:
        """Which of a tile's coordinates are below the rank's size."""
        key = ("tail", s)
        at = self.symbol(s)
        made = Piece(f"{at.text} < {self.size_text(s.name)}", (s,), BOOL, at.depth)
        return self.scopes.known.get(key) or self.scopes.named(key, made, f"k_{s.name}")

    # Arithmetic -------------------------------------------------------------------------------------------------------

    def _sum(self, e: sympy.Expr, frame: tuple[sympy.Symbol, ...]) -> Piece:
        """Terms that are known further out, or have fewer dimensions, are added up first."""
        terms = [(self.piece(-t, frame), True) if _negative(t) else (self.piece(t, frame), False) for t in e.args]
        if any(term.kind != INT for term, _ in terms):
            terms = [(self.as_float(term), negative) for term, negative in terms]
        kind = terms[0][0].kind
        groups: dict[tuple[int, tuple[sympy.Symbol, ...]], list[tuple[Piece, bool]]] = {}
        for term, negative in terms:
            groups.setdefault((term.depth, term.dims), []).append((term, negative))
        sums: list[tuple[Piece, bool]] = []
        for members in groups.values():
            members.sort(key=lambda member: member[1])
            total, sign = members[0]
            for term, negative in members[1:]:
                form = "({0} + {1})" if negative == sign else "({0} - {1})"
                total = self.combined(form, [total, term], kind)
            sums.append((total, sign))
        sums.sort(key=lambda member: (len(member[0].dims), member[0].depth, member[1]))
        total, sign = sums[-1]
        # Innermost first, so that a product with it becomes one fused operation.
        rest = sums[:-1]
        if sign and any(not negative for _, negative in rest):
            at = next(k for k, (_, negative) in enumerate(rest) if not negative)
            first, _ = rest.pop(at)
            total, sign = self.combined("({0} - {1})", [first, total], kind), False
        for term, negative in reversed(rest):
            total = self.combined("({0} - {1})" if negative != sign else "({0} + {1})", [total, term], kind)
        return self.combined("(-{0})", [total], kind) if sign else total

    def _product(self, e: sympy.Expr, frame: tuple[sympy.Symbol, ...]) -> Piece:
        if all(self._is_condition(part, frame) for part in e.args):
            parts = [self.piece(part, frame) for part in e.args]
            return self._folded(parts, "({0} & {1})", BOOL)
        over, under = [], []
        for factor in e.args:
            if factor.is_Pow and factor.args[1].is_Integer and factor.args[1] < 0:
                under.append(factor.args[0] ** -factor.args[1])
            else:
                over.append(factor)
        parts = [self.piece(factor, frame) for factor in over]
        plain = not under and all(part.kind == INT for part in parts) and sum(not f.is_Integer for f in over) <= 1
        if plain:
            return self._folded(parts, "({0} * {1})", INT)
        total = self._folded([self.as_float(part) for part in parts] or [Piece("1.0", (), FLOAT, 0)], "({0} * {1})")
        for factor in under:
            part = self.number(factor, frame)
            if len(part.dims) < len(total.dims):
                # One division a row; a product for each element of it.
                total = self.combined("({0} * {1})", [total, self.combined("(1.0 / {0})", [part], FLOAT)], FLOAT)
            else:
                total = self.combined("({0} / {1})", [total, part], FLOAT)
        return total

    def _folded(self, parts: list[Piece], form: str, kind: str = FLOAT) -> Piece:
        """All parts joined, those known further out and with fewer dimensions first."""
        waiting = sorted(parts, key=lambda part: (part.depth, len(part.dims)))
        total = waiting[0]
        for part in waiting[1:]:
            total = self.combined(form, [total, part], kind)
        return total

    def _power(self, base: sympy.Expr, exponent: sympy.Expr, frame: tuple[sympy.Symbol, ...]) -> Piece:
        if exponent == sympy.Rational(1, 2):
            return self.combined("tl.sqrt({0})", [self.number(base, frame)], FLOAT)
        if exponent == sympy.Rational(-1, 2):
            return self.combined("tl.rsqrt({0})", [self.number(base, frame)], FLOAT)
        if exponent.is_Integer and 0 < abs(exponent) <= 8:
            x = self.number(base, frame)
            if not x.is_plain:
                x = self.scopes.named((base, x.dims, "base"), x)
            text = " * ".join(["{0}"] * abs(int(exponent)))
            return self.combined(f"({text})" if exponent > 0 else f"(1.0 / ({text}))", [x], FLOAT)
        if is_literal(base) and base > 0:
            logarithm = sympy.log(base, 2).evalf(20)
            return self.combined("tl.exp2({0})", [self.number(scaled(exponent, logarithm), frame)], FLOAT)
        parts = [self.number(base, frame), self.number(exponent, frame)]
        return self.combined("power({0}, {1})", parts, FLOAT)

    # Reading ----------------------------------------------------------------------------------------------------------

    def read(self, item: AppliedUndef, frame: tuple[sympy.Symbol, ...]) -> Piece:
        """A value of the program, in the order of its own dimensions, or what lies in memory, in the frame's."""
        if not self.blocks.is_value(item):
            return self.memory.load(item, tuple(s for s in frame if s in ranks_of(item)))
        return self.held(item)

    def held(self, item: AppliedUndef) -> Piece:
        name = tensor_name(item)
        kind, dtype = self.kinds[name]
        depth = self.scopes.depth_of(name, self.made[name])
        return Piece(value(name), tuple(item.args), kind, depth, frozenset({name}), dtype)

    def integer(self, e: sympy.Expr) -> Piece | None:
        """A scalar integer; None if the expression is none."""
        if any(not self.blocks.is_point(s) for s in ranks_of(e)):
            return None
        if any(self.blocks.is_value(item) for item in accesses(e)):
            return None
        found = self.piece(e, ())
        return found if found.kind == INT else None


def _negative(e: sympy.Expr) -> bool:
    return bool(e.as_coeff_Mul()[0].is_negative)
