"""What a finite mask excludes. ``where(n <= m, 0, -3.4e38)`` added to a score means what -inf there means, in every row
that has a position which is not masked: the weight of the others is 0 to the last bit. In rows that are masked
altogether it means something else, so what is taken as -inf here comes with the conditions for that.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy
from sympy.core.function import AppliedUndef

from ...ir.cascade import Equal, Sigmoid, Where, ranks_of
from .predicates import decided

#: A number at or below this, added to a score, is a mask's stand-in for -inf: scores themselves are far smaller.
ADDED = sympy.Integer(-(10**30))
#: The same for a number that takes the score's place: half of it is still so small that its exponential is 0.
INSTEAD = sympy.Integer(-(10**4))


@dataclass
class Exclusion:
    """Takes what is added to an exponent, or to the elements of a maximum, as -inf where it stands for that.

    ``ranks``: those of a score. ``above``: statistic of a row that is subtracted -> what it must be above for that to
    be right.
    """

    ranks: frozenset[sympy.Symbol]
    above: dict[AppliedUndef, sympy.Expr] = field(default_factory=dict)

    def of(self, e: sympy.Expr) -> sympy.Expr:
        """The expression with every such exponent as it is for -inf."""
        if not e.args or isinstance(e, AppliedUndef):
            return e
        args = [self.of(argument) for argument in e.args]
        if e.func in (sympy.exp, Sigmoid):
            args = [self.lowered(args[0])]
        return decided(e.func, args)

    def of_maximum(self, e: sympy.Expr, state: AppliedUndef) -> sympy.Expr:
        """The same for an element of the maximum that ``state`` holds at the end."""
        found = self.lowered(e)
        if found != e:
            self._note(state, e.as_coeff_Add()[0])
        return found

    def lowered(self, e: sympy.Expr) -> sympy.Expr:
        constant, rest = e.as_coeff_Add()
        scores = [term for term in sympy.Add.make_args(rest) if not isinstance(unguarded(-term), AppliedUndef)]
        statistics = [unguarded(-term) for term in sympy.Add.make_args(rest) if term not in scores]
        scores = [term for term in scores if term != 0]
        if not constant.is_finite or not constant <= (ADDED if scores else INSTEAD):
            return e
        if not all(self.ranks <= ranks_of(term) for term in scores):
            return e
        for item in statistics:
            self._note(item, constant)
        return -sympy.oo

    def _note(self, statistic: AppliedUndef, constant: sympy.Expr) -> None:
        self.above[statistic] = sympy.Max(self.above.get(statistic, -sympy.oo), constant / 2)


def unguarded(e: sympy.Expr) -> sympy.Expr:
    """``X`` for ``where(X == -inf, 0, X)``, which is the same above -inf."""
    if isinstance(e, Where) and e.args[0] == Equal(e.args[2], -sympy.oo) and e.args[1] == 0:
        return e.args[2]
    return e
