"""The order in which Inductor's kernels run, chosen by a function of ours in place of Inductor's heuristics, and how
far apart what is put into one kernel may have been."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple


class KernelValue(NamedTuple):
    """A buffer: ``made`` by a kernel (-1: an input that may be freed), ``used`` by kernels, ``kept``: an output."""

    bytes: int
    made: int
    used: tuple[int, ...]
    kept: bool


#: (kernels that must run before each, buffers, order that Inductor's heuristics chose) -> order, and a line of text
#: that is put into the generated code.
Choose = Callable[
    [tuple[tuple[int, ...], ...], tuple[KernelValue, ...], tuple[int, ...]], tuple[Sequence[int], str]
]  # fmt: skip


@contextlib.contextmanager
def kernel_order(choose: Choose, name: str) -> Iterator[None]:
    """Inside, kernels of regions run in the order that ``choose`` gives. ``name`` is part of the code cache's keys."""
    from torch._inductor import memory

    plain = memory.reorder_for_peak_memory

    def reorder(nodes: list[Any], name_to_buf: Any, fused: Any, inputs: Any, outputs: Any, *args: Any) -> list[Any]:
        ordered = plain(nodes, name_to_buf, fused, inputs, outputs, *args)
        found, text = choose(*_problem(nodes, ordered, inputs, outputs))
        _note(text)
        return [nodes[index] for index in found]

    memory.reorder_for_peak_memory = reorder
    try:
        with _marked(name):
            yield
    finally:
        memory.reorder_for_peak_memory = plain


@contextlib.contextmanager
def fusions_within(distance: int) -> Iterator[None]:
    """Inside, ops of a region that need nothing of each other become one kernel only if in its graph no more than
    ``distance`` buffers lie between them (64 is Inductor's own limit)."""
    from torch._inductor.scheduler import Scheduler

    plain = Scheduler.are_long_distant_nodes

    def far(_: Any, one: Any, other: Any) -> bool:
        return bool(max(abs(one.min_order - other.max_order), abs(other.min_order - one.max_order)) > distance)

    Scheduler.are_long_distant_nodes = far
    try:
        with _marked(f"effcc fusions within {distance}"):
            yield
    finally:
        Scheduler.are_long_distant_nodes = plain


@contextlib.contextmanager
def _marked(name: str) -> Iterator[None]:
    """Inside, ``name`` is part of the code cache's keys."""
    from torch._inductor import config

    before = getattr(config._pre_fusion_custom_pass, "uuid", lambda: "")()
    marker = _marker(f"{before} {name}" if before else name)
    with config.patch({"_pre_fusion_custom_pass": marker} if marker is not None else {}):
        yield


def _problem(
    nodes: list[Any], ordered: list[Any], inputs: Any, outputs: Any
) -> tuple[tuple[tuple[int, ...], ...], tuple[KernelValue, ...], tuple[int, ...]]:
    """What Inductor knows of its kernels once it has ordered them; kernels are numbered as in ``nodes``."""
    from torch._inductor.memory import get_freeable_input_buf

    number = {node: index for index, node in enumerate(nodes)}
    before = tuple(tuple(sorted(number[each] for each in node.mpi_node.pred_nodes)) for node in nodes)
    values = [
        KernelValue(
            entry.mpi_buffer.size_free,
            -1,
            tuple(sorted(number[each] for each in entry.mpi_buffer.succ_nodes)),
            name in outputs,
        )
        for name, entry in get_freeable_input_buf(nodes, inputs).items()
    ]
    for index, node in enumerate(nodes):
        for buffer in node.get_outputs():
            info = buffer.mpi_buffer
            if not info.size_free:
                continue
            maker, used = index, {number[each] for each in info.succ_nodes}
            if not info.size_alloc:  # one of several results: its memory came with the op that made them all
                whole = [b for b in node.mpi_node.pred_buffers if b.mpi_buffer.size_alloc > b.mpi_buffer.size_free]
                makers = [number[each] for b in whole for each in node.mpi_node.pred_nodes if b in each.get_outputs()]
                maker, used = (makers[0] if makers else index), used | {index}
            values.append(KernelValue(info.size_free, maker, tuple(sorted(used)), buffer.get_name() in outputs))
    return before, tuple(values), tuple(number[node] for node in ordered)


def _note(text: str) -> None:
    """Put a comment into the wrapper that is being generated, where whoever finds the code in the cache reads it."""
    from torch._inductor.virtualized import V

    header = getattr(getattr(V.graph, "wrapper_code", None), "header", None)
    if text and header is not None:
        header.writeline(f"# {text}")


def _marker(name: str) -> Any:
    """A pass that does nothing, whose identity is part of the code cache's key; None where torch has no such passes."""
    try:
        from torch._inductor.custom_graph_pass import CustomSchedulerPass
    except ImportError:  # torch 2.11
        return None

    class Marker(CustomSchedulerPass):  # type: ignore[misc,unused-ignore]
        def __call__(self, nodes: list[Any]) -> list[Any]:
            return nodes

        def uuid(self) -> str:
            return name

    return Marker()
