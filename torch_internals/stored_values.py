"""Which values Inductor stores and which it computes again in every kernel that reads them: its own heuristics, and a
function of ours for what those would compute again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from .scheduling import marked


class ReadValue(NamedTuple):
    """A pointwise value that Inductor would compute wherever it is read. ``bytes``: of it, if stored; ``ops``: how many
    make an element of it, from what is in memory; ``functions``: those of them with names; ``reads``: how many
    are computed for each result that reads it, and ``read_bytes`` the bytes of the largest of these."""

    elements: int
    bytes: int
    boolean: bool
    ops: int
    functions: frozenset[str]
    reads: tuple[int, ...]
    read_bytes: int


@contextlib.contextmanager
def values_stored(choose: Callable[[ReadValue], bool], name: str) -> Iterator[None]:
    """Inside, a value of a region on the processor is also stored where ``choose`` says so. ``name`` is part of the
    code cache's keys."""
    from torch._inductor.graph import GraphLowering

    plain, plain_wrapper = GraphLowering.run_node, GraphLowering.init_wrapper_code
    stored: dict[Any, list[str]] = {}

    def run_node(graph: Any, node: torch.fx.Node) -> Any:
        result = plain(graph, node)
        value = _read_value(node, result)
        if value is not None and choose(value):
            result.realize()
            stored.setdefault(graph, []).append(f"{node.name} ({value.bytes} bytes, {len(value.reads)} readers)")
        return result

    def init_wrapper_code(graph: Any, *args: Any, **kwargs: Any) -> None:
        plain_wrapper(graph, *args, **kwargs)
        for text in stored.pop(graph, ()):
            graph.wrapper_code.header.writeline(f"# stored, not computed for each reader: {text}")

    GraphLowering.run_node, GraphLowering.init_wrapper_code = run_node, init_wrapper_code
    try:
        with marked(name):
            yield
    finally:
        GraphLowering.run_node, GraphLowering.init_wrapper_code = plain, plain_wrapper


def _read_value(node: torch.fx.Node, result: Any) -> ReadValue | None:
    """None of what is in memory anyway, is no pointwise value, or has sizes that are not known."""
    from torch._inductor import ir

    if node.op != "call_function" or not isinstance(result, ir.TensorBox):
        return None
    box = result.data
    while not isinstance(box, ir.StorageBox) and isinstance(box, ir.BaseView | ir.MutableBox):
        box = box.data
    pointwise = box.data if isinstance(box, ir.StorageBox) else None
    if not isinstance(pointwise, ir.Pointwise) or not ir.is_cpu(pointwise):
        return None
    elements = _product(pointwise.get_size())
    readers = [(user, user.meta.get("val")) for user in node.users]
    tensors = [value for _, value in readers if isinstance(value, torch.Tensor)]
    own = node.meta.get("val")
    if elements is None or not tensors or not isinstance(own, torch.Tensor) or not all(map(_known, [own, *tensors])):
        return None
    counted = pointwise.inner_fn_opcount()
    return ReadValue(
        elements,
        elements * pointwise.get_dtype().itemsize,
        pointwise.get_dtype() == torch.bool,
        counted.num_ops,
        frozenset(counted.used_ops),
        tuple(_evaluations(own, user, value) for user, value in readers if isinstance(value, torch.Tensor)),
        max(each.numel() * each.element_size() for each in tensors),
    )


def _evaluations(own: torch.Tensor, user: torch.fx.Node, result: torch.Tensor) -> int:
    """How often an element of ``own`` is computed for a result: once, but where the result has more dimensions. A row's
    number is computed once for the row."""
    target = user.target
    broadcasts = isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.pointwise in target.tags or target is torch.ops.aten.expand.default
    )
    if not broadcasts:
        return own.numel()
    rows = own.dim() == 0 or own.shape[-1] == 1 or own.stride(-1) == 0
    return result.numel() // max(1, result.shape[-1]) if rows and result.dim() else result.numel()


def _known(value: torch.Tensor) -> bool:
    return all(isinstance(size, int) for size in value.shape)


def _product(sizes: Any) -> int | None:
    total = 1
    for size in sizes:
        if not getattr(size, "is_number", isinstance(size, int)):
            return None
        total *= int(size)
    return total
