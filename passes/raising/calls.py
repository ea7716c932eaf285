"""One op of the graph as a handler sees it: its arguments as values, numbers and sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from ...ir.graph import Argument, Node, Ref, Symbol
from ...ir.types import ScalarType, Size, TensorType
from .program import NotRaised
from .sizes import in_cascade, known_polynomial, simple
from .steps import Value


@dataclass(frozen=True)
class Call:
    """``values`` holds what is known of earlier graph values: a ``Value``, a tuple of them, or a number."""

    node: Node
    values: Mapping[str, Any]

    @property
    def type(self) -> TensorType:
        found = self.node.type
        if not isinstance(found, TensorType):
            raise NotRaised("the result is not one tensor")
        return found

    def argument(self, position: int, name: str = "", default: Any = None) -> Any:
        """A raw argument by position or name."""
        if 0 <= position < len(self.node.args):
            return self.node.args[position]
        return dict(self.node.kwargs).get(name, default)

    def value(self, position: int, name: str = "") -> Value:
        """A tensor argument."""
        found = self.optional(position, name)
        if found is None:
            raise NotRaised("a tensor argument is missing")
        return found

    def optional(self, position: int, name: str = "") -> Value | None:
        raw = self.argument(position, name)
        if raw is None:
            return None
        found = self.values.get(raw.name) if isinstance(raw, Ref) else None
        if not isinstance(found, Value):
            raise NotRaised("an argument is not a tensor of numbers")
        return found

    def is_value(self, position: int, name: str = "") -> bool:
        raw = self.argument(position, name)
        return isinstance(raw, Ref) and isinstance(self.values.get(raw.name), Value)

    def number(self, position: int, name: str = "", default: Any = None) -> sympy.Expr:
        """A number argument, exactly."""
        return number(self.plain(self.argument(position, name, default)))

    def integer(self, position: int, name: str = "", default: Any = None) -> int:
        found = self.plain(self.argument(position, name, default))
        if isinstance(found, bool) or not isinstance(found, int):
            raise NotRaised("an integer argument is not known")
        return found

    def flag(self, position: int, name: str = "", default: bool = False) -> bool:
        found = self.argument(position, name, default)
        if not isinstance(found, bool):
            raise NotRaised("a flag is not known")
        return found

    def dims(self, position: int, name: str = "dim") -> list[int]:
        """A list of dimensions; a single one is a list as well; none is empty."""
        raw = self.argument(position, name)
        if raw is None:
            return []
        items = raw if isinstance(raw, tuple) else (raw,)
        if not all(isinstance(item, int) for item in items):
            raise NotRaised("dimensions are not known")
        return list(items)

    def sizes(self, position: int, name: str = "size") -> list[Size]:
        raw = self.argument(position, name)
        found = [self.plain(item) for item in (raw if isinstance(raw, tuple) else (raw,))]
        return [simple(size) for size in found]

    def plain(self, raw: Argument) -> Any:
        """A number or size; what a symbolic node stands for."""
        if isinstance(raw, Ref):
            found = self.values.get(raw.name)
            if isinstance(found, ScalarType) and found.value is not None:
                return simple(found.value)
            raise NotRaised("a number is only known when the graph runs")
        if isinstance(raw, Symbol | tuple) or raw is None:
            raise NotRaised("an argument is not a number")
        return simple(raw) if isinstance(raw, sympy.Expr) else raw

    def dtype(self, position: int, name: str = "dtype") -> str | None:
        """A dtype argument by its short name."""
        from ...ir.types import SHORT_DTYPE

        raw = self.argument(position, name)
        if isinstance(raw, Symbol) and raw.text.startswith("torch."):
            return SHORT_DTYPE.get(raw.text.removeprefix("torch."))
        return None


def number(value: Any) -> sympy.Expr:
    """A Python number as an exact sympy one: a float by its shortest decimal form."""
    if isinstance(value, bool):
        return sympy.Integer(int(value))
    if isinstance(value, int):
        return sympy.Integer(value)
    if isinstance(value, float):
        if math.isnan(value):
            return sympy.nan
        if math.isinf(value):
            return sympy.oo if value > 0 else -sympy.oo
        return sympy.Rational(repr(value))
    if isinstance(value, sympy.Expr):
        if not known_polynomial(value):
            raise NotRaised("a size is not a polynomial over size symbols")
        return in_cascade(value)
    raise NotRaised("an argument is not a real number")


def same_shape(first: Sequence[Size], second: Sequence[Size]) -> bool:
    from .sizes import equal

    return len(first) == len(second) and all(equal(a, b) for a, b in zip(first, second, strict=True))
