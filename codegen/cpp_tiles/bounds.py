"""What the bounds of a tile say of a condition, as C++: holds everywhere, may hold somewhere; and where a loop can
begin and end because a condition holds nowhere beyond.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sympy
from sympy.core.function import AppliedUndef

from ...ir.cascade import COMPARISONS, LessEqual, Maximum, accesses, is_rank, is_size, ranks_of, tensor_name
from ...ir.tile import Loop, Skip
from ..tiles.facts import comparison_text
from ..tiles.predicates import is_line
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
    # What must hold of the difference's ends: certainly, and possibly. Of ends that are NaN nothing is certain, and
    # all is possible.
    table = {
        "<": (f"{high} < 0", f"!({low} >= 0)"),
        "<=": (f"{high} <= 0", f"!({low} > 0)"),
        ">": (f"{low} > 0", f"!({high} <= 0)"),
        ">=": (f"{low} >= 0", f"!({high} < 0)"),
        "==": (f"{low} == 0 && {high} == 0", f"!({low} > 0 || {high} < 0)"),
        "!=": (f"{low} > 0 || {high} < 0", f"!({low} == 0 && {high} == 0)"),
    }
    return table[comparison_text(condition)][0 if certain else 1]


@dataclass(frozen=True)
class Ends:
    """Where a loop begins and ends, and the lines that compute it. ``left_out``: the stretches before and after that
    are walked only where the states ask for it."""

    first: str
    last: str
    lines: list[str]
    left_out: tuple[tuple[str, str], ...] = ()


def loop_ends(frame: Frame, loop: Loop) -> Ends:
    """The ends of a sequential loop: outside, what it skips holds nowhere."""
    rank = loop.rank
    skips = [item for item in loop.body if isinstance(item, Skip)]
    first, last, lines = "0", size_name(rank.name), []
    if loop.part is not None:
        first, last = f"begin_{rank.name}", f"end_{rank.name}"
        lines.append(f"const int64_t {first} = {origin(loop.part)} * {loop.length};")
        lines.append(f"const int64_t {last} = std::min<int64_t>({size_name(rank.name)}, {first} + {loop.length});")
    first, last = _narrowed(frame, rank, [item for item in skips if item.holds is None], (first, last), "", lines)
    late = [item for item in skips if item.holds is not None]
    if not late:
        return Ends(first, last, lines)
    inner_first, inner_last = _narrowed(frame, rank, late, (first, last), "late_", lines)
    if (inner_first, inner_last) == (first, last):
        return Ends(first, last, lines)
    # Nothing between the ends: all is left out, after the last.
    low, high = f"low_{rank.name}", f"high_{rank.name}"
    lines.append(f"const int64_t {low} = {inner_first} < {inner_last} ? {inner_first} : {first};")
    lines.append(f"const int64_t {high} = {inner_first} < {inner_last} ? {inner_last} : {first};")
    return Ends(low, high, lines, ((first, low), (high, last)))


def _narrowed(
    frame: Frame, rank: sympy.Symbol, skips: Iterable[Skip], ends: tuple[str, str], prefix: str, lines: list[str]
) -> tuple[str, str]:
    """Ends within ``ends``, outside of which a skip's condition holds nowhere."""
    lower: list[str] = []
    upper: list[str] = []
    for item in skips:
        for part in sympy.Mul.make_args(item.condition):
            _narrow(frame, rank, part, lower, upper)
    first, last = ends
    if lower:
        least = f"std::max<double>({{static_cast<double>({first}), {', '.join(lower)}}})"
        opened, rounded = f"{prefix}open_{rank.name}", f"{prefix}first_{rank.name}"
        lines.append(f"const int64_t {opened} = static_cast<int64_t>({least});")
        # Rounded down, but not below where the loop would begin.
        lines.append(f"const int64_t {rounded} = {first} + ({opened} - {first}) / {_ROUNDING} * {_ROUNDING};")
        first = rounded
    if upper:
        most = f"std::min<double>({{static_cast<double>({last}), {', '.join(upper)}}})"
        closed, rounded = f"{prefix}close_{rank.name}", f"{prefix}last_{rank.name}"
        lines.append(f"const int64_t {closed} = std::max<int64_t>(0, static_cast<int64_t>({most}));")
        up = f"({closed} + {_ROUNDING - 1}) / {_ROUNDING} * {_ROUNDING}"
        lines.append(f"const int64_t {rounded} = std::min<int64_t>({last}, {up});")
        last = rounded
    return first, last


def _narrow(frame: Frame, rank: sympy.Symbol, condition: sympy.Expr, lower: list[str], upper: list[str]) -> None:
    """Add what a comparison says of the loop's rank, whatever the coordinates of the other ranks of the tile."""
    if isinstance(condition, Maximum):
        for part, other in (condition.args, condition.args[::-1]):
            never = _nowhere(frame, rank, other)
            if never is not None:
                own: tuple[list[str], list[str]] = [], []
                for each in sympy.Mul.make_args(part):
                    _narrow(frame, rank, each, *own)
                lower += [f"({never} ? {end} : -std::numeric_limits<double>::infinity())" for end in own[0]]
                upper += [f"({never} ? {end} : std::numeric_limits<double>::infinity())" for end in own[1]]
        return
    difference, ranges = _difference(frame, condition)
    if difference is None or rank not in ranges or abs(difference.coeff(rank)) != 1 or _lines(difference, ranges):
        return
    slope = difference.coeff(rank)
    rest = sympy.expand(difference - slope * rank)
    low, high = _ends(frame, rest, [s for s in ranges if s != rank])
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


def _nowhere(frame: Frame, rank: sympy.Symbol, condition: sympy.Expr) -> str | None:
    """True if a statistic in memory is above a number in the whole loop; None if the condition is no such."""
    item = condition.args[0] if isinstance(condition, LessEqual) else None
    if not isinstance(item, AppliedUndef) or not condition.args[1].is_number:
        return None
    if rank not in ranks_of(item):
        return f"!({bound(frame, condition, certain=False)})"
    if not is_line(item, frozenset(s for s in ranks_of(item) if not frame.is_point(s))):
        return None
    frame.walked.discard(rank)
    found = _line(frame, item, [rank], "lowest")
    frame.walked.add(rank)
    return f"({found} > {float(condition.args[1])!r})"


def _difference(frame: Frame, condition: sympy.Expr) -> tuple[sympy.Expr | None, list[sympy.Symbol]]:
    """(left minus right, its ranks of which a tile has a range); None if bounds say nothing of the comparison."""
    if type(condition) not in COMPARISONS.values():
        return None, []
    difference: sympy.Expr = sympy.expand(condition.args[0] - condition.args[1])
    own = [s for s in ranks_of(difference) if s in frame.walked and not frame.is_point(s)]
    if not own or any(s not in frame.walked for s in ranks_of(difference)):
        return None, []
    lines = _lines(difference, own)
    if not all(is_line(item, frozenset(own)) and difference.coeff(item).is_number for item in lines):
        return None, []
    if any(not difference.coeff(s).is_number for s in own):
        return None, []
    return difference, own


def _lines(e: sympy.Expr, own: Sequence[sympy.Symbol]) -> list[AppliedUndef]:
    """The accesses that have several elements in the tile."""
    return [item for item in accesses(e) if ranks_of(item) & set(own)]


def _ends(frame: Frame, e: sympy.Expr, own: list[sympy.Symbol]) -> tuple[str, str]:
    """(least, greatest) value of an affine expression in the tile."""
    low: list[str] = []
    high: list[str] = []
    rest = e
    for item in _lines(e, own):
        slope = e.coeff(item)
        rest = rest - slope * item
        ends = [_line(frame, item, own, which) for which in ("lowest", "highest")]
        for found, end in zip((low, high), ends if slope > 0 else ends[::-1], strict=True):
            found.append(f"{float(slope)!r} * {end}")
    for s in own:
        slope = e.coeff(s)
        rest = rest - slope * s
        first, last = origin(s), f"({origin(s)} + {count(s)} - 1)"
        factor = repr(float(slope))
        low.append(f"{factor} * {first if slope > 0 else last}")
        high.append(f"{factor} * {last if slope > 0 else first}")
    scalar = _scalar(frame, sympy.expand(rest))
    return f"({' + '.join([scalar, *low])})", f"({' + '.join([scalar, *high])})"


def _line(frame: Frame, item: AppliedUndef, own: Sequence[sympy.Symbol], which: str) -> str:
    """The least or greatest of a tensor's elements along the tile's one rank that it has."""
    position = next(p for p, index in enumerate(item.args) if index in own)
    name = tensor_name(item)
    apart = "1" if position == frame.tensors[name].unit else stride(name, position)
    return f"{which}({base(frame, item)}, {frame.length(item.args[position])}, {apart})"


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
