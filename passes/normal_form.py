"""A normal form of expressions of the cascade language, by which residuals are proven to be 0."""

from __future__ import annotations

import sympy

from ..ir.cascade import Equal, Greater, GreaterEqual, Less, LessEqual, NotEqual, Where

#: A comparison of integers -> the opposite one.
OPPOSITE = {
    Less: GreaterEqual,
    LessEqual: Greater,
    Greater: LessEqual,
    GreaterEqual: Less,
    Equal: NotEqual,
    NotEqual: Equal,
}


def normal_form(e: sympy.Expr) -> sympy.Expr:
    """Expand to a sum of monomials: where() as an indicator, logarithms, powers and abs() split, exponentials joined.

    Two expressions with the same normal form are equal (as functions of finite reals in the bounds of their symbols).
    """
    split = e.replace(
        lambda node: node.func is sympy.Abs and node.args[0].is_Mul,
        lambda node: sympy.Mul(*(sympy.Abs(factor) for factor in node.args[0].args)),
    )
    expanded = sympy.expand(_indicators(split), force=False)
    total: dict[sympy.Expr, sympy.Expr] = {}
    for part in sympy.Add.make_args(expanded):
        coefficient, key = _join_exponentials(part)
        total[key] = total.get(key, sympy.Integer(0)) + coefficient
    return sympy.Add(*(coefficient * key for key, coefficient in total.items()))


def _indicators(e: sympy.Expr) -> sympy.Expr:
    """where(c, a, b) -> I*a + (1 - I)*b with an idempotent symbol I for c, where both branches are finite."""
    if not e.args or not e.has(Where):
        return e
    args = [_indicators(argument) for argument in e.args]
    if isinstance(e, Where):
        condition, a, b = args
        if a.has(sympy.oo, -sympy.oo, sympy.nan) or b.has(sympy.oo, -sympy.oo, sympy.nan):
            return Where(condition, a, b)
        flip = False
        if isinstance(condition, (NotEqual, GreaterEqual, Greater)) and all(
            argument.is_integer for argument in condition.args
        ):
            condition, flip = OPPOSITE[type(condition)](*condition.args), True
        elif isinstance(condition, NotEqual):
            condition, flip = Equal(*condition.args), True
        elif isinstance(condition, Equal) and condition.args[1] == 0 and condition.args[0].is_Function:
            condition, flip = condition.args[0], True
        indicator = sympy.Symbol(f"indicator({condition})", nonnegative=True)
        indicator = 1 - indicator if flip else indicator
        return indicator * a + (1 - indicator) * b
    return e.func(*args)


def _join_exponentials(part: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    coefficient, exponent, factors = sympy.Integer(1), sympy.Integer(0), []
    for factor in sympy.Mul.make_args(part):
        base, power = factor.as_base_exp()
        if factor.is_number and not factor.has(sympy.exp):
            coefficient *= factor
        elif factor.func is sympy.exp:
            exponent += factor.args[0]
        elif factor.is_Pow and base.is_number and base.is_positive:
            exponent += power * sympy.log(base)
        elif base.is_Symbol and base.name.startswith("indicator(") and power.is_Integer and power > 0:
            factors.append(base)
        else:
            factors.append(factor)
    exponent, rest = sympy.Integer(0), sympy.expand(exponent)
    for addend in sympy.Add.make_args(rest):
        logarithms = [f for f in sympy.Mul.make_args(addend) if f.func is sympy.log]
        if len(logarithms) == 1 and (addend / logarithms[0]).is_number:
            factors.append(logarithms[0].args[0] ** (addend / logarithms[0]))
        else:
            exponent += addend
    key = sympy.Mul(*factors) * sympy.exp(exponent)
    return coefficient, key


def is_zero(e: sympy.Expr) -> bool:
    """Proof that an expression is identically 0: its normal form is, or that of its numerator."""
    form = normal_form(e)
    if form == 0:
        return True
    numerator, _ = sympy.fraction(sympy.together(form))
    return bool(normal_form(sympy.expand(numerator)) == 0)
