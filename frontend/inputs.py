"""The example inputs of a model: what is accepted, their conversion, and how a plan names them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import keystr, tree_leaves_with_path, tree_map

from ..errors import CaptureError
from ..ir.types import TensorType
from .fx_values import value_type

__all__ = ["InputSpec", "check_inputs", "convert", "input_specs"]


@dataclass(frozen=True)
class InputSpec:
    """One input of the model as the file gave it: a tensor by its type, anything else by its value."""

    name: str
    type: TensorType | None
    value: object = None


def check_inputs(name: str, inputs: Any) -> None:
    """Raises CaptureError for tensors whose memory the planner cannot describe: sparse, nested, quantized, subclasses
    that hold other tensors."""
    for path, leaf in tree_leaves_with_path(inputs):
        if not isinstance(leaf, torch.Tensor):
            continue
        kind = ""
        if leaf.is_nested:
            kind = "a nested tensor"
        elif leaf.layout != torch.strided:
            kind = f"a sparse tensor ({leaf.layout})"
        elif leaf.is_quantized:
            kind = f"a quantized tensor ({leaf.dtype})"
        elif hasattr(type(leaf), "__tensor_flatten__"):
            kind = f"a tensor subclass ({type(leaf).__name__})"
        if kind:
            raise CaptureError(
                f"input {keystr(path[1:])} of {name} is {kind}",
                remedy="A plan counts plain strided tensors; give the parts of this one as inputs of their own.",
            )


def convert(tree: Any, dtype: torch.dtype) -> Any:
    """The inputs with floating-point tensors in ``dtype``."""

    def one(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    return tree_map(one, tree)


def input_specs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[InputSpec]:
    """Every leaf of the inputs, by its path (``[0]``, ``['input_ids']``)."""
    for path, leaf in tree_leaves_with_path((args, kwargs)):
        name = keystr(path[1:])
        if isinstance(leaf, torch.Tensor):
            found = value_type(leaf)
            yield InputSpec(name, found if isinstance(found, TensorType) else None)
        else:
            yield InputSpec(name, None, leaf)
