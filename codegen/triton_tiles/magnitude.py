"""Which numbers of a program may be so large that multiplying them by log2(e) overflows.

Masks are often written as the least finite number. ``exp(S - M)`` is then a difference of two such numbers, and may not
become ``exp2(S*log2(e) - M*log2(e))``, a difference of infinities. Sums of products of numbers in memory are taken to
be moderate, numbers in memory by themselves are not.
"""

from __future__ import annotations

import sympy

from ...ir.cascade import Sigmoid, accesses, tensor_name
from ...ir.tile import MAKERS, Dot, Load, walk
from ..tiles.facts import Facts

#: Above this a literal counts as large.
_LARGE = 1e30
#: Functions whose results are small, or 0, 1 and infinite.
_BOUNDED = (sympy.exp, sympy.tanh, Sigmoid)


class Magnitudes:
    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.large: frozenset[str] = frozenset()
        bodies = [
            (tensor_name(item.target), item.source if isinstance(item, Load) else item.body)
            for item in walk(facts.program.body)
            if isinstance(item, MAKERS) and not isinstance(item, Dot)
        ]
        while True:
            found = frozenset(name for name, body in bodies if self.may_be_large(body))
            if found == self.large:
                break
            self.large = found

    def may_be_large(self, e: sympy.Expr) -> bool:
        plain = e.replace(lambda part: isinstance(part, _BOUNDED), lambda part: sympy.Integer(1))
        if any(number.is_finite and abs(number) > _LARGE for number in plain.atoms(sympy.Number)):
            return True
        return any(tensor_name(item) in self.large or not self.facts.is_value(item) for item in accesses(plain))

    def cancels(self, e: sympy.Expr) -> bool:
        """Whether a sum may be the difference of large numbers."""
        signs = {bool(term.as_coeff_Mul()[0].is_negative) for term in sympy.Add.make_args(e) if self.may_be_large(term)}
        return len(signs) > 1
