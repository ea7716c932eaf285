"""The order in which Inductor's kernels run, chosen by a function of ours in place of Inductor's heuristics, and how
far apart what is put into one kernel may have been."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

from . import written_over


class KernelValue(NamedTuple):
    """A buffer: ``made`` by a kernel (-1: an input that may be freed), ``used`` by kernels, ``kept``: an output;
    ``over``: places of the buffers that its kernel writes it over, where that is the last to read them. ``lent``: a
    gradient that a backward was given: Inductor takes it to stay, but it is freed like others. These come last."""

    bytes: int
    made: int
    used: tuple[int, ...]
    kept: bool
    over: tuple[int, ...] = ()
    lent: bool = False


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
        with marked(name):
            yield
    finally:
        memory.reorder_for_peak_memory = plain


@contextlib.contextmanager
def fusions_within(distance: int, between_calls: bool = False) -> Iterator[None]:
    """Inside, ops of a region that need nothing of each other become one kernel only if in its graph no more than
    ``distance`` buffers lie between them (64 is Inductor's own limit); with ``between_calls`` also no call of a
    library: what that makes and frees is then not held beside all that both read and write."""
    from torch._inductor.scheduler import Scheduler

    plain = Scheduler.are_long_distant_nodes
    calls: list[tuple[Any, list[int]]] = []

    def far(scheduler: Any, one: Any, other: Any) -> bool:
        if max(abs(one.min_order - other.max_order), abs(other.min_order - one.max_order)) > distance:
            return True
        if not between_calls:
            return False
        if not calls or calls[-1][0] is not scheduler:
            calls.append((scheduler, [node.min_order for node in scheduler.nodes if node.is_extern()]))
        low, high = min(one.min_order, other.min_order), max(one.max_order, other.max_order)
        return any(low < place < high for place in calls[-1][1])

    Scheduler.are_long_distant_nodes = far
    try:
        with marked(f"effcc fusions within {distance}{' between calls' if between_calls else ''}"):
            yield
    finally:
        Scheduler.are_long_distant_nodes = plain


@contextlib.contextmanager
def inlined_random() -> Iterator[None]:
    """Inside, random numbers are made by each kernel that reads them (from seed and place: the same ones), not stored
    for all."""
    from torch._inductor import inductor_prims, ir
    from torch._inductor.lowering import lowerings

    plain = lowerings[inductor_prims.random]

    def lower(*args: Any, **kwargs: Any) -> Any:
        realize = ir.StorageBox.realize
        ir.StorageBox.realize = lambda _: None
        try:
            return plain(*args, **kwargs)
        finally:
            ir.StorageBox.realize = realize

    lowerings[inductor_prims.random] = lower
    try:
        with marked("effcc inlined random"):
            yield
    finally:
        lowerings[inductor_prims.random] = plain


@contextlib.contextmanager
def written_over_through_rows() -> Iterator[None]:
    """Inside, a C++ kernel's result may also take the memory of an operand that it reads only by way of other results
    of the kernel. Inductor holds such a result (a softmax's exponentials) a row at a time, in no buffer of its own, and
    then finds nothing that the softmax could be written over."""
    from torch._inductor.scheduler import BaseSchedulerNode
    from torch._inductor.virtualized import V

    plain = BaseSchedulerNode.decide_inplace_update

    def decide(node: Any) -> None:
        plain(node)
        if not hasattr(V.kernel, "args") or not _in_cpp(node):
            return
        taken, wrapper = V.kernel.inplace_update_buffers, V.graph.wrapper_code
        for result, read in written_over.indirect(node.scheduler.get_fused_node(node), node):
            fresh = not (result in taken or result in V.graph.removed_buffers or result in wrapper.allocated)
            operand = written_over.buffer_of(node, read)
            if fresh and wrapper.can_reuse(operand, node) and not written_over.read_later(node, operand):
                V.kernel.args.make_inplace(read, result)
                taken[result] = read

    token = _through_rows.set(True)
    BaseSchedulerNode.decide_inplace_update = decide
    try:
        with marked("effcc written over through rows"):
            yield
    finally:
        BaseSchedulerNode.decide_inplace_update = plain
        _through_rows.reset(token)


_through_rows: ContextVar[bool] = ContextVar("through_rows", default=False)


def _in_cpp(node: Any) -> bool:
    """Whether a node becomes part of a C++ kernel."""
    from torch._inductor.scheduler import SchedulerNode

    device = node.get_device() if isinstance(node, SchedulerNode) else None
    return device is not None and device.type == "cpu"


@contextlib.contextmanager
def products_within(distance: int) -> Iterator[None]:
    """Inside, a product that is added to something later becomes one call with the addition only if no more than
    ``distance`` ops of the graph lie between them: its operands are held until that call."""
    from torch._inductor.fx_passes import post_grad

    plain = post_grad.should_prefer_unfused_addmm

    def apart(match: Any) -> bool:
        if plain(match):
            return True
        last = match.output_node()
        node = next(node for node in match.nodes if node is not last)
        for _ in range(distance + 1):
            node = node.next
            if node is last:
                return False
        return True

    post_grad.should_prefer_unfused_addmm = apart
    try:
        with marked(f"effcc products within {distance}"):
            yield
    finally:
        post_grad.should_prefer_unfused_addmm = plain


@contextlib.contextmanager
def marked(name: str) -> Iterator[None]:
    """Inside, ``name`` is part of the code cache's keys: code is generated otherwise than without."""
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
    given = get_freeable_input_buf(nodes, inputs)
    values = [
        KernelValue(
            entry.mpi_buffer.size_free,
            -1,
            tuple(sorted(number[each] for each in entry.mpi_buffer.succ_nodes)),
            name in outputs,
        )
        for name, entry in given.items()
    ]
    names = list(given)
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
            names.append(buffer.get_name())
    values += _gradients_given(nodes, inputs, outputs)
    place = {name: index for index, name in enumerate(names)}
    for node in nodes:
        for written, read in _written_over(node):
            if written in place and read in place:
                value = values[place[written]]
                values[place[written]] = value._replace(over=(*value.over, place[read]))
    return before, tuple(values), tuple(number[node] for node in ordered)


def _gradients_given(nodes: list[Any], inputs: Any, outputs: Any) -> list[KernelValue]:
    from torch._inductor.virtualized import V

    used: dict[str, dict[int, None]] = {}
    size: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for read in node.read_writes.reads:
            if read.name in inputs and read.name.startswith("tangents"):
                used.setdefault(read.name, {})[index] = None
                size[read.name] = max(size.get(read.name, 0), V.graph.get_dep_size_hint(read))
    return [KernelValue(size[name], -1, tuple(of), name in outputs, lent=True) for name, of in used.items()]


def _written_over(kernel: Any) -> Iterator[tuple[str, str]]:
    """(result, operand) where the result takes the operand's memory if its kernel is the last to read that."""
    yield from written_over.direct(kernel)
    if _through_rows.get():
        for node in kernel.get_nodes():
            if _in_cpp(node):
                yield from written_over.indirect(kernel, node)


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
