"""Where a loop over tiles begins and ends because a condition holds nowhere else, and between which tiles it holds
everywhere.

Conditions are those of the program's ``skip`` and ``if all``: affine in ranks, with whole coefficients. What bounds say
nothing about may hold anywhere and holds for certain nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import sympy

from ...ir.cascade import COMPARISONS, Maximum, accesses, ranks_of
from ...ir.tile import Cases, Loop, Skip
from ..tiles.facts import comparison_text
from ..tiles.names import origin
from .expressions import Emitter

_FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}


@dataclass(frozen=True)
class Span:
    """Coordinates from ``lower`` up to but not including ``upper``, as texts; None: as far as the loop goes."""

    lower: str | None = None
    upper: str | None = None
    empty: bool = False


#: (factor, text) of integers that are added up.
Terms: TypeAlias = "list[tuple[int, str]]"
EVERYWHERE, NOWHERE = Span(), Span(empty=True)


class Ranges:
    """What conditions say of one loop's rank, whatever the coordinates of the tile's other ranks."""

    def __init__(self, emitter: Emitter, rank: sympy.Symbol) -> None:
        self.emitter, self.rank = emitter, rank

    def possible(self, condition: sympy.Expr) -> Span:
        """No coordinate outside of it meets the condition."""
        if condition.is_Mul:
            return _both([self.possible(part) for part in condition.args])
        if isinstance(condition, Maximum):
            return _either([self.possible(part) for part in condition.args])
        return self._comparison(condition, certain=False)

    def certain(self, condition: sympy.Expr) -> Span:
        """Every coordinate in it meets the condition."""
        if condition.is_Mul:
            return _both([self.certain(part) for part in condition.args])
        if isinstance(condition, Maximum):
            return _any([self.certain(part) for part in condition.args])
        return self._comparison(condition, certain=True)

    def _comparison(self, condition: sympy.Expr, certain: bool) -> Span:
        unknown = NOWHERE if certain else EVERYWHERE
        text = comparison_text(condition)
        if type(condition) not in COMPARISONS.values():
            return unknown
        difference = sympy.expand(condition.args[0] - condition.args[1])
        slope = difference.coeff(self.rank)
        if difference.has(sympy.oo, sympy.nan) or slope not in (1, -1) or text == "!=":
            return unknown
        if slope == -1:
            text, difference = _FLIPPED[text], sympy.expand(-difference)
        ends = self.ends(sympy.expand(difference - self.rank))
        if ends is None:
            return unknown
        # rank (text) -rest, where the rest is anywhere between its ends.
        least, most = ends
        if text in ("<", "<="):
            return Span(upper=_negated(most if certain else least, int(text == "<=")))
        if text in (">", ">="):
            return Span(lower=_negated(least if certain else most, int(text == ">")))
        return NOWHERE if certain else Span(_negated(most, 0), _negated(least, 1))

    def ends(self, e: sympy.Expr) -> tuple[Terms, Terms] | None:
        """(least, greatest) value in the tile of an integer expression; None if it is none."""
        blocks = self.emitter.blocks
        inside = {s for item in accesses(e) for s in ranks_of(item)}
        own = [s for s in sorted(ranks_of(e), key=str) if not blocks.is_point(s)]
        if inside & set(own) or any(not e.coeff(s).is_Integer for s in own):
            return None
        rest = sympy.expand(e - sum(e.coeff(s) * s for s in own))
        if ranks_of(rest) & set(own):
            return None
        low: Terms = []
        for term in sympy.Add.make_args(rest):
            factor, named = term.as_coeff_Mul()
            scalar = self.emitter.integer(named)
            if scalar is None or not factor.is_Integer:
                return None
            low.append((int(factor), "1" if named == 1 else scalar.text))
        high = list(low)
        for s in own:
            slope = int(e.coeff(s))
            first = origin(s) if s in self.emitter.walked else "0"
            size = self.emitter.size_text(s.name)
            last = f"tl.minimum({first} + {blocks.length(s)}, {size})" if s in self.emitter.walked else size
            ends = [(slope, first)], [(slope, last), (-slope, "1")]
            low, high = low + ends[slope < 0], high + ends[slope > 0]
        return low, high


@dataclass(frozen=True)
class Stretch:
    """Tiles from ``first`` up to ``last``. ``whole``: none reaches beyond the rank's end, and the program's condition
    holds everywhere in them."""

    first: str
    last: str
    whole: bool


def stretches(emitter: Emitter, loop: Loop) -> list[Stretch]:
    """The parts that a sequential loop is printed in; lines that compute their ends are written before it."""
    scopes, blocks = emitter.scopes, emitter.blocks
    rank, step = loop.rank, blocks.length(loop.rank) if not blocks.is_point(loop.rank) else 1
    size = emitter.size_text(rank.name)
    ranges = Ranges(emitter, rank)
    skips = [item.condition for item in loop.body if isinstance(item, Skip) and item.holds is None]
    cases = [item.condition for item in loop.body if isinstance(item, Cases)]
    first, last = "0", size
    name = rank.name

    def define(hint: str, text: str) -> str:
        label = f"{hint}_{name}_{scopes.fresh()}"
        scopes.write(f"{label} = {text}")
        return label

    if loop.part is not None:
        first = define("first", f"{origin(loop.part)} * {loop.length}")
        last = define("last", f"tl.minimum({size}, {first} + {loop.length})")
    possible = _both([ranges.possible(condition) for condition in skips])
    if possible.lower is not None:
        lower = f"tl.maximum({possible.lower}, {first})"
        first = define("first", f"{lower} // {step} * {step}" if step > 1 else lower)
    if possible.upper is not None:
        last = define("last", f"tl.minimum({possible.upper}, {last})")
    if step == 1:
        return [Stretch(first, last, False)]
    uneven = blocks.is_uneven(rank)
    if not cases and not uneven:
        return [Stretch(first, last, True)]
    certain = _both([ranges.certain(condition) for condition in cases])
    if certain.empty:
        return [Stretch(first, last, False)]
    found: list[Stretch] = []
    begin = first
    if certain.lower is not None:
        up = f"(tl.maximum({certain.lower}, 0) + {step - 1}) // {step} * {step}"
        begin = define("begin", f"tl.minimum(tl.maximum({up}, {first}), tl.maximum({last}, {first}))")
        # The first of these loops must not stop within a tile.
        begin = define("begin", f"{first} + ({begin} - {first} + {step - 1}) // {step} * {step}")
        found.append(Stretch(first, begin, False))
    ends = [each for each in (certain.upper,) if each is not None]
    if uneven:
        ends.append(size)
    if not ends:
        return [*found, Stretch(begin, last, True)]
    least = ends[0] if len(ends) == 1 else f"tl.minimum({ends[0]}, {ends[1]})"
    end = f"tl.minimum({least}, {last})" if least != last else last
    if begin == "0":
        end = define("end", f"tl.maximum({end} // {step} * {step}, 0)")
    else:
        end = define("end", f"tl.maximum({begin} + ({end} - {begin}) // {step} * {step}, {begin})")
    return [*found, Stretch(begin, end, True), Stretch(end, last, False)]


def _negated(terms: Terms, more: int) -> str:
    """``more`` minus a sum."""
    constant = more - sum(factor * int(text) for factor, text in terms if text.isdigit())
    added = [(-factor, text) for factor, text in terms if not text.isdigit()]
    added.sort(key=lambda term: term[0] < 0)
    found = str(constant) if constant > 0 or not added or added[0][0] < 0 else ""
    for factor, text in added:
        size = text if abs(factor) == 1 else f"{abs(factor)} * {text}"
        found = f"{found} {'-' if factor < 0 else '+'} {size}" if found else size
    if constant < 0 and added and added[0][0] > 0:
        found += f" - {-constant}"
    return found if len(added) == 1 and found == added[0][1] else f"({found})"


def _join(texts: Sequence[str | None], function: str) -> str | None:
    given = list(dict.fromkeys(text for text in texts if text is not None))
    if not given:
        return None
    found = given[0]
    for text in given[1:]:
        found = f"{function}({found}, {text})"
    return found


def _both(spans: Sequence[Span]) -> Span:
    """What lies in all spans."""
    if any(span.empty for span in spans):
        return NOWHERE
    return Span(
        _join([span.lower for span in spans], "tl.maximum"), _join([span.upper for span in spans], "tl.minimum")
    )


def _either(spans: Sequence[Span]) -> Span:
    """A span that holds all spans."""
    lowers, uppers = [span.lower for span in spans], [span.upper for span in spans]
    return Span(
        None if None in lowers else _join(lowers, "tl.minimum"), None if None in uppers else _join(uppers, "tl.maximum")
    )


def _any(spans: Sequence[Span]) -> Span:
    """A span inside the union of spans, as long as can be said."""
    given = [span for span in spans if not span.empty]
    if not given:
        return NOWHERE
    if all(span.lower is None for span in given) or all(span.upper is None for span in given):
        return _either(given)
    return given[0]
