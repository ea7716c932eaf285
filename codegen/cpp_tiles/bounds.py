"""What the bounds of a tile say of a condition, as C++: holds everywhere, may hold somewhere; and where a loop can
begin and end because a condition holds nowhere beyond.
"""

from __future__ import annotations

import sympy
from sympy.core.function import AppliedUndef

from ...ir.cascade import COMPARISONS, Maximum, accesses, is_rank, is_size, ranks_of, tensor_name
from ...ir.tile import Loop, Skip
from ..tiles.facts import comparison_text
from .frame import Frame
from .names import count, integer, origin, size_name, stride, tensor

#: Ends of loops are rounded to this many coordinates: matrix products are compiled for each size they are called with.
_ROUNDING = 64


def base(frame: Frame, item: AppliedUndef) -> str:
    """Where the tile that an access reads begins in memory."""
    name = tensor_name(item)
    origins = {s: origin(s) if s in frame.walked else "0" for s in ranks_of(item)}
    terms = [tensor(name)]
    for position, index in enumerate(item.args):
        at = integer(index, origins)
        if at != "0":
            unit = position == frame.tensors[name].unit
            terms.append(at if unit else f"{at} * {stride(name, position)}")
    return " + ".join(terms)


def bound(frame: Frame, condition: sympy.Expr, certain: bool) -> str:
    """True if the condition holds everywhere in a tile (``certain``), or may hold somewhere."""
    if condition.is_Mul:
        return " && ".join(f"({bound(frame, part, certain)})" for part in condition.args)
    if isinstance(condition, Maximum):
        return " || ".join(f"({bound(frame, part, certain)})" for part in condition.args)
    difference, own = _difference(frame, condition)
    if difference is None:
        return "false" if certain else "true"
    low, high = _ends(frame, difference, own)
    # What must hold of the difference's ends: certainly, and possibly.
    table = {
        "<": (f"{high} < 0", f"{low} < 0"),
        "<=": (f"{high} <= 0", f"{low} <= 0"),
        ">": (f"{low} > 0", f"{high} > 0"),
        ">=": (f"{low} >= 0", f"{high} >= 0"),
        "==": (f"{low} == 0 && {high} == 0", f"{low} <= 0 && {high} >= 0"),
        "!=": (f"{low} > 0 || {high} < 0", f"!({low} == 0 && {high} == 0)"),
    }
    return table[comparison_text(condition)][0 if certain else 1]


def loop_ends(frame: Frame, loop: Loop) -> tuple[str, str, list[str]]:
    """(first coordinate, end, lines that compute them) of a sequential loop: outside, what it skips holds nowhere."""
    rank = loop.rank
    size = size_name(rank.name)
    lower: list[str] = []
    upper: list[str] = []
    for item in loop.body:
        if isinstance(item, Skip):
            for part in sympy.Mul.make_args(item.condition):
                _narrow(frame, rank, part, lower, upper)
    first, last, lines = "0", size, []
    if loop.part is not None:
        first, last = f"begin_{rank.name}", f"end_{rank.name}"
        lines.append(f"const int64_t {first} = {origin(loop.part)} * {loop.length};")
        lines.append(f"const int64_t {last} = std::min<int64_t>({size}, {first} + {loop.length});")
    if lower:
        least = f"std::max<double>({{static_cast<double>({first}), {', '.join(lower)}}})"
        lines.append(f"const int64_t open_{rank.name} = static_cast<int64_t>({least});")
        # Rounded down, but not below where the loop would begin.
        rounded = f"{first} + (open_{rank.name} - {first}) / {_ROUNDING} * {_ROUNDING}"
        first = f"first_{rank.name}"
        lines.append(f"const int64_t {first} = {rounded};")
    if upper:
        most = f"std::min<double>({{static_cast<double>({last}), {', '.join(upper)}}})"
        lines.append(f"const int64_t close_{rank.name} = std::max<int64_t>(0, static_cast<int64_t>({most}));")
        rounded = f"(close_{rank.name} + {_ROUNDING - 1}) / {_ROUNDING} * {_ROUNDING}"
        lines.append(f"const int64_t last_{rank.name} = std::min<int64_t>({last}, {rounded});")
        last = f"last_{rank.name}"
    return first, last, lines


def _narrow(frame: Frame, rank: sympy.Symbol, condition: sympy.Expr, lower: list[str], upper: list[str]) -> None:
    """Add what a comparison says of the loop's rank, whatever the coordinates of the other ranks of the tile."""
    difference, own = _difference(frame, condition)
    if difference is None or rank not in own or abs(difference.coeff(rank)) != 1:
        return
    slope = difference.coeff(rank)
    rest = sympy.expand(difference - slope * rank)
    others = [s for s in own if s != rank]
    low, high = _ends(frame, rest, others)
    text = comparison_text(condition)
    # slope * rank + rest (text) 0; the rest is anywhere between its ends.
    below = (text in ("<", "<=") and slope > 0) or (text in (">", ">=") and slope < 0) or text == "=="
    above = (text in ("<", "<=") and slope < 0) or (text in (">", ">=") and slope > 0) or text == "=="
    strict = text in ("<", ">")
    most = f"-{low}" if slope > 0 else high
    least = f"-{high}" if slope > 0 else low
    if below:
        upper.append(f"std::ceil({most})" if strict else f"std::floor({most}) + 1")
    if above:
        lower.append(f"std::floor({least}) + 1" if strict else f"std::ceil({least})")


def _difference(frame: Frame, condition: sympy.Expr) -> tuple[sympy.Expr | None, list[sympy.Symbol]]:
    """(left minus right, its ranks of which a tile has a range); None if bounds say nothing of the comparison."""
    if type(condition) not in COMPARISONS.values():
        return None, []
    difference: sympy.Expr = sympy.expand(condition.args[0] - condition.args[1])
    own = [s for s in ranks_of(difference) if s in frame.walked and not frame.is_point(s)]
    inside = {s for each in accesses(difference) for s in ranks_of(each)}
    if not own or inside & set(own) or any(s not in frame.walked for s in ranks_of(difference)):
        return None, []
    if any(not difference.coeff(s).is_number for s in own):
        return None, []
    return difference, own


def _ends(frame: Frame, e: sympy.Expr, own: list[sympy.Symbol]) -> tuple[str, str]:
    """(least, greatest) value of an affine expression in the tile."""
    low, high = [], []
    rest = e
    for s in own:
        slope = e.coeff(s)
        rest = rest - slope * s
        first, last = origin(s), f"({origin(s)} + {count(s)} - 1)"
        factor = repr(float(slope))
        low.append(f"{factor} * {first if slope > 0 else last}")
        high.append(f"{factor} * {last if slope > 0 else first}")
    scalar = _scalar(frame, sympy.expand(rest))
    return f"({' + '.join([scalar, *low])})", f"({' + '.join([scalar, *high])})"


def _scalar(frame: Frame, e: sympy.Expr) -> str:
    """An expression that is one number in a tile, in double precision."""
    if e.is_number:
        return repr(float(e))
    if isinstance(e, AppliedUndef):
        return f"static_cast<double>(*({base(frame, e)}))"
    if e.is_Symbol:
        name = size_name(e.name.strip("|")) if is_size(e) or not is_rank(e) else origin(e)
        return f"static_cast<double>({name})"
    if e.is_Add or e.is_Mul:
        return "(" + (" + " if e.is_Add else " * ").join(_scalar(frame, part) for part in e.args) + ")"
    raise TypeError(f"no scalar form: {e}")
