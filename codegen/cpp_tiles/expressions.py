"""Expressions of the cascade language as vectors in C++, each part in the outermost loop that knows its ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    is_literal,
    is_rank,
    is_size,
    ranks_of,
    tensor_name,
)
from .frame import Frame
from .lookups import Found, LookedUp
from .names import inside, integer, origin, pointer, size_name, stride, tensor

_COMPARISON_TEXT = {cls: text for text, cls in COMPARISONS.items()}
_FUNCTIONS = {
    sympy.exp: "exponential({0})",
    sympy.log: "({0}).log()",
    sympy.tanh: "hyperbolic_tangent({0})",
    sympy.Abs: "({0}).abs()",
    Sigmoid: "sigmoid({0})",
    Relu: "at::vec::maximum({0}, Vec(scalar_t(0)))",
    Round: "({0}).round()",
    Maximum: "at::vec::maximum({0}, {1})",
    Minimum: "at::vec::minimum({0}, {1})",
}

#: Tables up to this size are looked up in registers.
_SHORT_TABLE = 32


class Emitter:
    """``before[k]`` are the lines at the start of the body inside k loops; values are written there once and named."""

    def __init__(
        self, frame: Frame, loops: Sequence[sympy.Symbol], vector: sympy.Symbol | None, before: list[list[str]]
    ) -> None:
        self.frame, self.loops, self.vector, self.before = frame, tuple(loops), vector, before
        self.known: dict[tuple[sympy.Expr, bool], str] = {}
        #: (what is looked up, at which rank) -> the short table that holds it.
        self.tables: dict[tuple[sympy.Expr, sympy.Symbol], str] = {}

    # Places -----------------------------------------------------------------------------------------------------------

    def depth(self, e: sympy.Expr) -> int:
        """Inside how many loops all of an expression's ranks are known."""
        ranks = ranks_of(e)
        return max([self.loops.index(s) + 1 for s in ranks if s in self.loops], default=0)

    def remember(self, target: AppliedUndef, value: str) -> None:
        """The value just written can be read again from its register; what was computed from the old one cannot."""
        for key in [key for key in self.known if key[0].has(target) or key[0] == target]:
            del self.known[key]
        if self.depth(target) == len(self.loops):
            self.known[target, False] = value

    def named(self, e: sympy.Expr, text: str, condition: bool = False) -> str:
        name = f"x{sum(len(lines) for lines in self.before)}"
        self.before[self.depth(e)].append(f"const Vec {name} = {text};")
        self.known[e, condition] = name
        return name

    # Values -----------------------------------------------------------------------------------------------------------

    def value(self, e: sympy.Expr) -> str:
        """The expression as a vector (of equal lanes, if the vector rank is not in it)."""
        if (e, False) in self.known:
            return self.known[e, False]
        if is_literal(e):
            return f"Vec(scalar_t({_number(e)}))"
        return self.named(e, self._text(e))

    def condition(self, e: sympy.Expr) -> str:
        """The expression as a mask: all bits of a lane set where it is not 0."""
        if (e, True) in self.known:
            return self.known[e, True]
        if is_literal(e):
            value = bool(e != 0)
            return f"(Vec(scalar_t(0)) {'==' if value else '!='} Vec(scalar_t(0)))"
        if type(e) in _COMPARISON_TEXT:
            left, right = (self.value(side) for side in e.args)
            text = f"{left} {_COMPARISON_TEXT[type(e)]} {right}"
        elif isinstance(e, Found):
            text = f"within({self.value(e.args[1])}, {', '.join(self.stretch(e.args[0]))})"
        elif e.is_Mul and all(_is_condition(part) for part in e.args):
            text = " & ".join(self.condition(part) for part in e.args)
        elif isinstance(e, Maximum) and all(_is_condition(part) for part in e.args):
            text = " | ".join(self.condition(part) for part in e.args)
        else:
            text = f"{self.value(e)} != Vec(scalar_t(0))"
        return self.named(e, text, condition=True)

    def _text(self, e: sympy.Expr) -> str:
        if isinstance(e, AppliedUndef):
            return self.read(e)
        if isinstance(e, LookedUp):
            return self._looked_up(*e.args)
        if e.is_Symbol:
            return self._symbol(e)
        if e.is_Add:
            return self._sum(e)
        if e.is_Mul:
            return self._product(e)
        if e.is_Pow:
            return self._power(*e.args)
        if isinstance(e, Where):
            return f"choose({self.condition(e.args[0])}, {self.value(e.args[1])}, {self.value(e.args[2])})"
        if type(e) in _COMPARISON_TEXT or isinstance(e, Found):
            return f"number({self.condition(e)})"
        return _FUNCTIONS[e.func].format(*(self.value(argument) for argument in e.args))

    def _symbol(self, e: sympy.Symbol) -> str:
        if is_size(e):
            return f"Vec(scalar_t({size_name(e.name.strip('|'))}))"
        if not is_rank(e):
            return f"Vec(scalar_t({size_name(e.name)}))"
        at = f"scalar_t({self.frame.coordinate(e)})"
        return f"counting({at})" if e == self.vector else f"Vec({at})"

    def _sum(self, e: sympy.Expr) -> str:
        """Terms in order, products fused into the addition."""
        text = ""
        terms = sorted(e.args, key=lambda term: (term.is_Mul and not term.is_number, _negative(term)))
        for term in terms:
            negative = _negative(term)
            factors = sympy.Mul.make_args(-term if negative else term)
            if not text:
                text = self.value(term)
            elif len(factors) == 2 and not any(f.is_Pow for f in factors) and not term.is_number:
                a, b = (self.value(factor) for factor in factors)
                text = f"at::vec::fmadd({f'({a}).neg()' if negative else a}, {b}, {text})"
            elif negative:
                text = f"({text}) - {self.value(-term)}"
            else:
                text = f"({text}) + {self.value(term)}"
        return text

    def _product(self, e: sympy.Expr) -> str:
        over, under = [], []
        for factor in sorted(e.args, key=self.depth):
            if factor.is_Pow and factor.args[1].is_Integer and factor.args[1] < 0:
                under.append(factor.args[0] ** -factor.args[1])
            else:
                over.append(factor)
        text = " * ".join(self._partial(over)) if over else "Vec(scalar_t(1))"
        for part in under:
            text = f"({text}) / {self.value(part)}"
        return text

    def _partial(self, factors: list[sympy.Expr]) -> list[str]:
        """Factors that are known further out, as one product there."""
        innermost = max((self.depth(factor) for factor in factors), default=0)
        outer = [factor for factor in factors if self.depth(factor) < innermost]
        if len(outer) > 1:
            rest = [factor for factor in factors if self.depth(factor) == innermost]
            return [self.value(sympy.Mul(*outer)), *(self.value(factor) for factor in rest)]
        return [self.value(factor) for factor in factors]

    def _power(self, base: sympy.Expr, exponent: sympy.Expr) -> str:
        if exponent == sympy.Rational(1, 2):
            return f"({self.value(base)}).sqrt()"
        if exponent == sympy.Rational(-1, 2):
            return f"Vec(scalar_t(1)) / ({self.value(base)}).sqrt()"
        if exponent.is_Integer and 0 < abs(exponent) <= 8:
            x, text = self.value(base), ""
            text = " * ".join([x] * abs(int(exponent)))
            return text if exponent > 0 else f"Vec(scalar_t(1)) / ({text})"
        return f"({self.value(base)}).pow({self.value(exponent)})"

    # Memory -----------------------------------------------------------------------------------------------------------

    def address(self, item: AppliedUndef, in_memory: bool) -> tuple[str, str]:
        """(pointer to the element at the start of a vector, elements between its lanes)."""
        coordinates = {s: self.frame.coordinate(s) for s in ranks_of(item)}
        return self._pointer(item, in_memory, coordinates, {}), self._along(item, in_memory, self.vector)

    def place(self, item: AppliedUndef, rank: sympy.Symbol, in_memory: bool) -> tuple[str, str, str]:
        """(pointer to the element at the tile's first coordinate of a rank, elements between lanes, elements between
        the rank's coordinates)."""
        first, _ = self.stretch(rank)
        coordinates = {s: self.frame.coordinate(s) for s in ranks_of(item)} | {rank: first}
        within = {rank: first if self.frame.is_part(tensor_name(item), rank) else "0"} if not in_memory else {}
        lanes = self._along(item, in_memory, self.vector) if self.vector != rank else "0"
        return self._pointer(item, in_memory, coordinates, within), lanes, self._along(item, in_memory, rank)

    def stretch(self, rank: sympy.Symbol) -> tuple[str, str]:
        """(first coordinate, number of coordinates) of a rank's tile."""
        return origin(rank) if rank in self.frame.walked else "0", self.frame.length(rank)

    def _pointer(
        self,
        item: AppliedUndef,
        in_memory: bool,
        coordinates: Mapping[sympy.Symbol, str],
        within: Mapping[sympy.Symbol, str],
    ) -> str:
        """``within``: coordinates in a value, where they are not those of the loops."""
        name = tensor_name(item)
        terms = []
        if not in_memory and name in self.frame.values:
            for rank, step in zip(self.frame.values[name], self.frame.strides(name), strict=True):
                i = self.frame.coordinate(rank) if self.frame.is_part(name, rank) else inside(rank)
                i = within.get(rank, i)
                terms.append(i if step == "1" else f"{i} * ({step})")
            return " + ".join([pointer(name), *terms])
        for position, index in enumerate(item.args):
            step = self._step(name, position)
            at = integer(index, coordinates)
            terms.append(at if step == "1" else f"{at} * {step}")
        return " + ".join([tensor(name), *terms])

    def _along(self, item: AppliedUndef, in_memory: bool, rank: sympy.Symbol | None) -> str:
        """Elements between neighbouring coordinates of a rank."""
        name = tensor_name(item)
        if not in_memory and name in self.frame.values:
            along = dict(zip(self.frame.values[name], self.frame.strides(name), strict=True)).get(rank, "0")
            return f"({along})" if along not in ("0", "1") else along
        found = []
        for position, index in enumerate(item.args):
            if rank is not None and rank in ranks_of(index):
                step, slope = self._step(name, position), integer(sympy.expand(index).coeff(rank), {})
                found.append(step if slope == "1" else slope if step == "1" else f"{slope} * {step}")
        return found[0] if len(found) == 1 else f"({' + '.join(found) or '0'})"

    def _step(self, name: str, position: int) -> str:
        return "1" if position == self.frame.tensors[name].unit else stride(name, position)

    def _looked_up(self, item: AppliedUndef, rank: sympy.Symbol, index: sympy.Expr) -> str:
        at, along, step = self.place(item, rank, not self.frame.is_value(item))
        stretch = ", ".join(self.stretch(rank))
        where = f"{self.value(index)}, {stretch}"
        others = ranks_of(item) - {rank}
        if self.vector not in others and (self.frame.steps.get(rank) or self.frame.size(rank)) <= _SHORT_TABLE:
            if (item, rank) not in self.tables:
                name = self.tables[item, rank] = f"table_{len(self.tables)}"
                depth = max([self.loops.index(s) + 1 for s in others if s in self.loops], default=0)
                self.before[depth].append(f"const ShortTable {name}({at}, {step}, {self.stretch(rank)[1]});")
            return f"{self.tables[item, rank]}.at({where})"
        if self.vector is None or self.vector not in ranks_of(index) | others:
            return f"looked_up<true>({at}, {step}, 0, {where}, VL)"
        if self.vector not in ranks_of(index) and along == "1":
            return f"looked_up_row<full>({at}, {step}, {where}, w)"
        return f"looked_up<full>({at}, {step}, {along}, {where}, w)"

    def read(self, item: AppliedUndef) -> str:
        name = tensor_name(item)
        value = name in self.frame.values and tuple(item.args) == self.frame.values[name]
        if not value and self.frame.can_leave(item):
            return self._checked(item)
        at, step = self.address(item, not value)
        if self.vector is None or self.vector not in ranks_of(item):
            return f"Vec(static_cast<scalar_t>(*({at})))"
        if step == "1":
            ahead = self._along(item, not value, self._row) if not value and self._row is not None else "0"
            return f"load<full>({at}, w)" if ahead == "(0)" or ahead == "0" else f"load_ahead<full>({at}, {ahead}, w)"
        return f"lanes_of<full>(w, [&](int64_t k) {{ return ({at})[k * {step}]; }})"

    @property
    def _row(self) -> sympy.Symbol | None:
        """The loop around the one along vectors."""
        at = self.loops.index(self.vector) if self.vector in self.loops else 0
        return self.loops[at - 1] if at else None

    def _checked(self, item: AppliedUndef) -> str:
        """Reading outside the tensor gives NaN."""
        name = tensor_name(item)
        coordinates = {s: self.frame.coordinate(s) for s in ranks_of(item)}
        lane = "k" if self.vector is not None and self.vector in ranks_of(item) else ""
        if lane:
            coordinates[self.vector] = f"({coordinates[self.vector]} + k)"
        parts, inside_all, at = [], [], [tensor(name)]
        for position, index in enumerate(item.args):
            parts.append(f"const int64_t a{position} = {integer(index, coordinates)};")
            extent = size_name(self.frame.tensors[name].ranks[position].name)
            inside_all.append(f"a{position} >= 0 && a{position} < {extent}")
            step = "1" if position == self.frame.tensors[name].unit else stride(name, position)
            at.append(f"a{position}" if step == "1" else f"a{position} * {step}")
        element = f"{' && '.join(inside_all)} ? static_cast<scalar_t>(*({' + '.join(at)})) : NOT_A_NUMBER"
        code = f"[&](int64_t k) {{ {' '.join(parts)} return {element}; }}"
        return f"lanes_of<full>(w, {code})" if lane else f"Vec(({code})(0))"


def _is_condition(e: sympy.Expr) -> bool:
    if type(e) in _COMPARISON_TEXT or isinstance(e, Found):
        return True
    return (e.is_Mul or isinstance(e, Maximum)) and all(_is_condition(part) for part in e.args)


def _negative(e: sympy.Expr) -> bool:
    return bool(e.as_coeff_Mul()[0].is_negative)


def _number(e: sympy.Expr) -> str:
    if e is sympy.oo:
        return "INF"
    if e == -sympy.oo:
        return "-INF"
    if e is sympy.nan:
        return "NOT_A_NUMBER"
    return repr(float(e))
