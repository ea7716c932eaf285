"""Tile programs as text, one statement a line. ``parse_program(print_program(p)) == p``."""

from __future__ import annotations

import sympy

from .cascade_printer import print_expression
from .tile import Carry, Cases, Dot, Load, Loop, Map, Program, Reduce, Skip, State, Statement, Store

_INDENT = "  "


def print_program(program: Program) -> str:
    """The program as text, ending in a newline."""
    lines = [f"program {program.name} in {program.compute}"]
    for tensor in program.tensors:
        unit = "" if tensor.unit is None else f" unit {tensor.ranks[tensor.unit].name}"
        lines.append(f"{tensor.role} {tensor.name}[{_names(tensor.ranks)}]: {tensor.dtype}{unit}")
    lines += [f"size {rank.name} = {other.name}" for rank, other in program.alias]
    _print_body(program.body, 0, lines)
    return "\n".join(lines) + "\n"


def _print_body(body: tuple[Statement, ...], depth: int, lines: list[str]) -> None:
    for item in body:
        if isinstance(item, Loop):
            lines.append(f"{_INDENT * depth}{print_head(item)} {{")
            _print_body(item.body, depth + 1, lines)
            lines.append(f"{_INDENT * depth}}}")
        elif isinstance(item, Cases):
            lines.append(f"{_INDENT * depth}if all {print_expression(item.condition)} {{")
            _print_body(item.full, depth + 1, lines)
            lines.append(f"{_INDENT * depth}}} else {{")
            _print_body(item.partial, depth + 1, lines)
            lines.append(f"{_INDENT * depth}}}")
        else:
            lines.append(_INDENT * depth + print_statement(item))


def print_head(item: Loop) -> str:
    """``for n step 256``."""
    part = "" if item.part is None else f" part {item.part.name} of {item.length}"
    return f"{item.kind} {item.rank.name} step {item.step}{part}"


def print_statement(item: Statement) -> str:
    """One line for a statement that holds no others."""
    if isinstance(item, Skip):
        holds = "" if item.holds is None else f" while {print_expression(item.holds)}"
        return f"skip unless {print_expression(item.condition)}{holds}"
    assert not isinstance(item, Loop | Cases)
    target = print_expression(item.target)
    if isinstance(item, Load):
        return f"load {target} = {print_expression(item.source)}"
    if isinstance(item, Dot):
        sign = "sum=" if item.accumulate else "="
        product = f"{print_expression(item.left)} * {print_expression(item.right)}"
        return f"dot {target} {sign} sum[{_names(item.reduced)}] {product}"
    if isinstance(item, Reduce):
        sign = f"{item.reduction}=" if item.accumulate else "="
        return f"reduce {target} {sign} {item.reduction}[{_names(item.reduced)}] {print_expression(item.body)}"
    word = {Map: "map", State: "state", Carry: "carry", Store: "store"}[type(item)]
    return f"{word} {target} = {print_expression(item.body)}"


def _names(ranks: tuple[sympy.Symbol, ...]) -> str:
    return ",".join(rank.name for rank in ranks)
