"""Fake values for the types of the IR: tensors without memory, and symbolic sizes of a shape environment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._mode_utils import no_dispatch
from torch.utils._sympy import functions as torch_functions

from ..errors import ExportError
from ..ir import expressions
from ..ir.graph import Graph
from ..ir.types import DTYPES, ScalarType, Size, TensorType, TupleType, Type, contiguous_stride

#: Size that a symbol is given in the shape environment where no hint says otherwise.
DEFAULT_HINT = 8


class FakeValues:
    """Makes fake values. ``hints`` are example sizes of the symbols; ``fake_mode`` and ``shape_env`` may be given."""

    def __init__(
        self,
        hints: Mapping[str, int] | None = None,
        fake_mode: FakeTensorMode | None = None,
        shape_env: ShapeEnv | None = None,
    ) -> None:
        self.hints = dict(hints or {})
        self.shape_env = shape_env or (fake_mode.shape_env if fake_mode is not None else None) or ShapeEnv()
        self.mode = fake_mode or FakeTensorMode(allow_non_fake_inputs=True, shape_env=self.shape_env)
        self.symbols: dict[str, Any] = {}

    def of(self, value_type: Type | None) -> Any:
        """The value of ``meta["val"]`` for a type; None where the type does not say enough."""
        if isinstance(value_type, TensorType):
            return self.tensor(value_type)
        if isinstance(value_type, ScalarType):
            return self.scalar(value_type)
        if isinstance(value_type, TupleType):
            return tuple(self.of(item) for item in value_type.items)
        return None

    def tensor(self, value_type: TensorType) -> FakeTensor:
        shape = [self.size(size) for size in value_type.shape]
        strides = value_type.stride if value_type.stride is not None else contiguous_stride(value_type.shape)
        dtype = getattr(torch, DTYPES[value_type.dtype][0])
        with no_dispatch():  # as torch's own converter makes them; through the mode it takes three times as long
            # Made on meta and relabelled: a torch without that device must be able to do it.
            meta = torch.empty_strided(shape, [self.size(stride) for stride in strides], dtype=dtype, device="meta")
            return FakeTensor(self.mode, meta, torch.device(value_type.device))

    def scalar(self, value_type: ScalarType) -> Any:
        value = value_type.value
        if value is None:
            return {"int": DEFAULT_HINT, "float": 1.0, "bool": True}.get(value_type.kind)
        if isinstance(value, int):
            return value
        if value.is_number:
            return float(value) if value_type.kind == "float" else int(value)
        if value_type.kind == "int":
            return self.size(value)
        expression = self.torch_expression(value)
        if value_type.kind == "bool":
            return self.shape_env.create_symboolnode(expression)
        return self.shape_env.create_symfloatnode(expression, hint=None)

    def size(self, size: Size) -> Any:
        """An int, or a SymInt over this environment's symbols."""
        if isinstance(size, int):
            return size
        if isinstance(size, sympy.Integer):
            return int(size)
        hint = self.hint(size)
        return self.shape_env.create_symintnode(self.torch_expression(size), hint=hint)

    def hint(self, size: sympy.Expr) -> int | None:
        """The expression's value for the hints; None if a symbol is unbacked (``u0``)."""
        names = sorted(symbol.name for symbol in size.free_symbols)
        if any(name.startswith(("u", "zu")) and name not in self.hints for name in names):
            return None
        values = {expressions.symbol(name): self.hints.get(name, DEFAULT_HINT) for name in names}
        result = size.subs(values)
        return int(result) if result.is_number else None

    def symbol(self, name: str) -> Any:
        """The shape environment's own symbol for the IR's symbol ``name``."""
        if name not in self.symbols:
            if name.startswith("u") and name not in self.hints:
                self.symbols[name] = self.shape_env.create_unbacked_symint().node.expr
            else:
                from torch._dynamo.source import ConstantSource

                self.symbols[name] = self.shape_env.create_symbol(
                    self.hints.get(name, DEFAULT_HINT),
                    source=ConstantSource(f"__{name}"),
                    dynamic_dim=DimDynamic.DYNAMIC,
                    constraint_dim=None,
                )
        return self.symbols[name]

    def torch_expression(self, expression: sympy.Basic) -> Any:
        """The IR's expression in torch's own sympy functions and the shape environment's symbols."""
        if isinstance(expression, sympy.Symbol):
            return self.symbol(expression.name)
        arguments = [self.torch_expression(argument) for argument in expression.args]
        name = type(expression).__name__
        if name in expressions.FUNCTIONS:
            function = getattr(torch_functions, name, None)
            if function is None:
                raise ExportError(f"torch has no size function {name}", remedy="use a torch release that has it")
            return function(*arguments)
        return expression.func(*arguments) if arguments else expression


def symbol_names(graph: Graph) -> set[str]:
    """Names of the size symbols of a graph's types and arguments."""
    found: set[str] = set()
    for node in graph.nodes:
        found.update(_type_symbols(node.type))
    return found


def _type_symbols(value_type: Type | None) -> Iterable[str]:
    if isinstance(value_type, TensorType):
        sizes: tuple[Any, ...] = (*value_type.shape, *(value_type.stride or ()))
    elif isinstance(value_type, ScalarType):
        sizes = (value_type.value,)
    elif isinstance(value_type, TupleType):
        return [name for item in value_type.items for name in _type_symbols(item)]
    else:
        return []
    return [symbol.name for size in sizes if isinstance(size, sympy.Basic) for symbol in size.free_symbols]
