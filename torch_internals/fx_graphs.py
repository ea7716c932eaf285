"""FX graphs, their fake values, and calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def has_bodies(gm: torch.fx.GraphModule) -> bool:
    """Whether an op of the graph runs graphs of its own (``cond``, ``scan``)."""
    return any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in gm.graph.nodes)


def is_invoke_subgraph(node: torch.fx.Node) -> bool:
    return node.op == "call_function" and node.target is torch.ops.higher_order.invoke_subgraph


def fake_mode_of(gm: torch.fx.GraphModule) -> Any:
    """The fake tensor mode that the graph was traced with."""
    from torch._guards import detect_fake_mode

    values = [node.meta.get("val") for node in gm.graph.nodes if node.op == "placeholder"]
    return detect_fake_mode(values)


def refresh_values(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Bring the graph's fake values up to date with its inputs. A backward is traced before the strides of what the
    forward really saves are known (a convolution may save channels-last); AOTAutograd then says so in the example
    inputs alone. Views of what has moved become reshapes, as Inductor makes them."""
    from torch._inductor.compile_fx import fake_tensor_prop
    from torch._inductor.fx_passes.post_grad import view_to_reshape

    def moved(value: Any, example: Any) -> bool:
        return (
            isinstance(value, torch.Tensor)
            and isinstance(example, torch.Tensor)
            and value.layout == example.layout == torch.strided
            # As texts: comparing symbolic strides would add guards.
            and [str(step) for step in value.stride()] != [str(step) for step in example.stride()]
        )

    placeholders = gm.graph.find_nodes(op="placeholder")
    if any(moved(node.meta.get("val"), example) for node, example in zip(placeholders, example_inputs, strict=True)):
        view_to_reshape(gm)
        with torch.no_grad():
            fake_tensor_prop(gm, list(example_inputs), force_allow_non_fake_inputs=True)


def fake_result(op: Any, value: Any) -> Any:
    """What an op returns for a fake tensor, as a fake tensor of the same mode."""
    with value.fake_mode:
        return op(value)


def boxed(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as AOTAutograd wants a compiled graph: it takes its arguments in a list that it may empty."""

    def call(args: list[Any]) -> Any:
        return function(*args)

    call._boxed_call = True
    return call
