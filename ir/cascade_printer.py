"""Cascades as text: one Einsum a line. ``parse_cascade(print_cascade(c)) == c``."""

from __future__ import annotations

import sympy
from sympy.core.function import AppliedUndef

from .cascade import COMPARISONS, Cascade, Einsum, Maximum, Minimum, Relu, Round, Sigmoid, Where, tensor_name

_COMPARISON_TEXT = {cls: text for text, cls in COMPARISONS.items()}
_FUNCTION_TEXT = {
    Where: "where",
    Maximum: "max",
    Minimum: "min",
    Relu: "relu",
    Sigmoid: "sigmoid",
    Round: "round",
    sympy.exp: "exp",
    sympy.log: "log",
    sympy.tanh: "tanh",
    sympy.Abs: "abs",
}

# Binding strength of what is printed; a weaker operand is put in parentheses.
_COMPARE, _ADD, _MULTIPLY, _NEGATE, _POWER, _ATOM = range(6)


def print_cascade(cascade: Cascade) -> str:
    """The cascade as text, one line an Einsum, ending in a newline."""
    return "".join(print_einsum(einsum) + "\n" for einsum in cascade.einsums)


def print_einsum(einsum: Einsum) -> str:
    """One line, such as ``GM[m] = max[n] QK[m,n]``."""
    reduction = ""
    if einsum.reduction:
        reduction = f"{einsum.reduction}[{','.join(symbol.name for symbol in einsum.reduced)}] "
    return f"{einsum.output}{_indices(einsum.indices)} = {reduction}{print_expression(einsum.body)}"


def print_expression(expression: sympy.Expr) -> str:
    """An expression in the cascade language."""
    return _render(expression)[0]


def _indices(indices: tuple[sympy.Expr, ...]) -> str:
    return f"[{','.join(print_expression(index).replace(' ', '') for index in indices)}]"


def _wrap(expression: sympy.Expr, strength: int) -> str:
    text, own = _render(expression)
    return text if own >= strength else f"({text})"


def _render(e: sympy.Expr) -> tuple[str, int]:
    if isinstance(e, AppliedUndef):
        return f"{tensor_name(e)}{_indices(e.args)}", _ATOM
    if e is sympy.oo:
        return "inf", _ATOM
    if e is -sympy.oo:
        return "-inf", _NEGATE
    if e is sympy.nan:
        return "nan", _ATOM
    if e is sympy.E:
        return "exp(1)", _ATOM
    if e.is_Integer:
        return str(e), _ATOM if e >= 0 else _NEGATE
    if e.is_Rational:
        return f"{e.p}/{e.q}", _MULTIPLY if e > 0 else _NEGATE
    if e.is_Symbol:
        return str(e.name), _ATOM
    if e.is_Add:
        return _render_sum(e), _ADD
    if e.is_Mul:
        return _render_product(e)
    if e.is_Pow:
        return _render_power(e)
    if type(e) in _COMPARISON_TEXT:
        left, right = e.args
        return f"{_wrap(left, _ADD)} {_COMPARISON_TEXT[type(e)]} {_wrap(right, _ADD)}", _COMPARE
    if type(e) in _FUNCTION_TEXT:
        return f"{_FUNCTION_TEXT[type(e)]}({', '.join(print_expression(a) for a in e.args)})", _ATOM
    raise TypeError(f"no text form for {type(e).__name__}: {e}")


def _render_sum(e: sympy.Expr) -> str:
    text = ""
    # Terms with a minus sign go last, so that a sum starts with a plain term where it has one.
    terms = sorted(e.as_ordered_terms(), key=lambda term: term.could_extract_minus_sign())
    for position, term in enumerate(terms):
        negative = bool(term.could_extract_minus_sign())
        body = _wrap(-term if negative else term, _MULTIPLY)
        if position == 0:
            text = f"-{_wrap(-term, _NEGATE)}" if negative else body
        else:
            text += f" - {body}" if negative else f" + {body}"
    return text


def _render_product(e: sympy.Expr) -> tuple[str, int]:
    coefficient, rest = e.as_coeff_Mul()
    if coefficient.is_negative:
        text, own = _render(-e)
        return f"-{text if own >= _MULTIPLY else f'({text})'}", _NEGATE
    numerator: list[str] = []
    denominator: list[str] = []
    if coefficient.is_Rational:
        if coefficient.p != 1:
            numerator.append(str(coefficient.p))
        if coefficient.q != 1:
            denominator.append(str(coefficient.q))
    elif coefficient != 1:
        numerator.append(_wrap(coefficient, _POWER))
    for factor in sympy.Mul.make_args(rest):
        base, exponent = factor.as_base_exp() if factor.is_Pow else (factor, sympy.Integer(1))
        if exponent.is_Integer and exponent.is_negative:
            denominator.append(_wrap(base ** (-exponent), _POWER))
        else:
            numerator.append(_wrap(factor, _POWER))
    text = "*".join(numerator) or "1"
    for part in denominator:
        text += f"/{part}"
    return text, _MULTIPLY


def _render_power(e: sympy.Expr) -> tuple[str, int]:
    base, exponent = e.args
    if exponent == sympy.Rational(1, 2):
        return f"sqrt({print_expression(base)})", _ATOM
    if exponent == sympy.Rational(-1, 2):
        return f"rsqrt({print_expression(base)})", _ATOM
    if exponent.is_Integer and exponent.is_negative:
        return f"1/{_wrap(base ** (-exponent), _POWER)}", _MULTIPLY
    return f"{_wrap(base, _ATOM)}**{_wrap(exponent, _ATOM)}", _POWER
