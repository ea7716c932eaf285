"""Python and torch objects of an FX graph -> arguments, types and names of the IR."""

from __future__ import annotations

import operator
from typing import Any, cast

import sympy
import torch

from ..ir.expressions import canonical
from ..ir.graph import Argument, Symbol
from ..ir.types import SHORT_DTYPE, NoneType, OpaqueType, ScalarType, Size, TensorType, TupleType, Type

# Arguments -----------------------------------------------------------------------------------------------------------


def import_argument(value: Any) -> Argument:
    """A plain constant argument. Raises TypeError for a class that has no form in the IR."""
    if value is None or isinstance(value, bool | str):
        return value
    if type(value) is int:
        return value
    if isinstance(value, float):
        return float(value)
    if isinstance(value, complex):
        return complex(value)
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return _symbolic(value)
    if isinstance(value, sympy.Basic):
        return canonical(value)
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return Symbol(str(value))
    if isinstance(value, torch.device):
        return Symbol(f"device({value})")
    if value is Ellipsis:
        return Symbol("...")
    if isinstance(value, type):
        return Symbol(f"class {value.__module__}.{value.__qualname__}")
    if isinstance(value, torch.Generator):
        return Symbol(f"generator({value.device})")
    if isinstance(value, int):
        # An IntEnum or a bool-like subclass, such as torch's reduction and backend enumerations.
        return int(value)
    if callable(value) and hasattr(value, "__name__"):
        return Symbol(f"function {qualified_name(value)}")
    if hasattr(value, "__name__") or hasattr(value, "__class__"):
        return Symbol(f"object {type(value).__module__}.{type(value).__qualname__}")
    raise TypeError(f"class {type(value).__name__}")


def _symbolic(value: Any) -> Any:
    """A SymInt, SymFloat or SymBool as a number or a canonical expression."""
    constant = value.node.maybe_as_int() if isinstance(value, torch.SymInt) else None
    return constant if constant is not None else canonical(value.node.expr)


# Types ---------------------------------------------------------------------------------------------------------------


def value_type(value: Any) -> Type:
    """Type of a fake (or real) value: tensors, numbers, tuples of these, None; anything else is opaque."""
    if isinstance(value, torch.Tensor):
        return _tensor_type(value)
    if isinstance(value, bool):
        return ScalarType("bool")
    if isinstance(value, int):
        return ScalarType("int", int(value))
    if isinstance(value, float):
        return ScalarType("float", sympy.Float(value))
    if isinstance(value, torch.SymInt):
        return ScalarType("int", _symbolic(value))
    if isinstance(value, torch.SymFloat):
        return ScalarType("float", _float_expression(value))
    if isinstance(value, torch.SymBool):
        return ScalarType("bool", _float_expression(value))
    if isinstance(value, tuple | list):
        return TupleType(tuple(value_type(item) for item in value))
    if value is None:
        return NoneType()
    return OpaqueType(f"{type(value).__module__}.{type(value).__qualname__}")


def _float_expression(value: Any) -> Size | None:
    expression = canonical(value.node.expr)
    return sympy.Float(expression) if isinstance(expression, float) else expression


def _tensor_type(tensor: torch.Tensor) -> Type:
    dtype = SHORT_DTYPE.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None or tensor.layout != torch.strided:
        return OpaqueType(f"torch.Tensor({str(tensor.dtype).removeprefix('torch.')}, {tensor.layout})")
    shape = tuple(_size(size) for size in tensor.shape)
    return TensorType(dtype, shape, str(tensor.device), tuple(_size(stride) for stride in tensor.stride()))


def _size(size: Any) -> Size:
    if type(size) is int:
        return size
    return cast(Size, _symbolic(size))


# Names ---------------------------------------------------------------------------------------------------------------


def qualified_name(target: Any) -> str:
    """``module.name`` of a function; torch's built-ins, which do not say their module, are looked up."""
    name = getattr(target, "__qualname__", None) or getattr(target, "__name__", type(target).__name__)
    name = str(name).rsplit(".", 1)[-1].replace("<lambda>", "lambda")
    module = getattr(target, "__module__", None)
    if isinstance(module, str) and module:
        return f"{module}.{name}"
    owners: tuple[tuple[Any, str], ...] = ((torch, "torch"), (torch.Tensor, "torch.Tensor"), (operator, "_operator"))
    for owner, prefix in owners:
        if getattr(owner, name, None) is target:
            return f"{prefix}.{name}"
    return f"unknown.{name}"
