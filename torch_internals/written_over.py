"""Which operands the results of Inductor's kernels may be written over: what Inductor itself allows, and more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def direct(kernel: Any) -> Iterator[tuple[str, str]]:
    """(result, operand) of a generated kernel where Inductor lets the result take the operand's memory, if nothing
    reads that later. These are the conditions of its ``decide_inplace_update`` that no order changes."""
    from torch._inductor import config
    from torch._inductor.codegen.wrapper import can_match_buffer_size

    if not config.inplace_buffers:
        return
    own = _own(kernel)
    for node in own.values():
        for result in node.get_outputs():
            if not result.node.should_allocate() or result.node.get_mutation_names():
                continue
            for read in node.read_writes.reads:
                operand = buffer_of(node, read.name)
                if operand is None or operand.node is None:
                    continue
                users: list[Any] = [user for user in operand.users if user.node.get_name() in own]
                accesses = {
                    each for u in users for each in u.node.read_writes.reads_and_writes() if each.name == read.name
                }
                last = [user for user in users if user.node.get_name() not in node.ancestors]
                alone = len(accesses) == 1 and [user.node for user in last] == [node] and last[0].can_inplace
                if alone and can_match_buffer_size(operand.node, result.node):
                    yield result.get_name(), read.name


def indirect(kernel: Any, node: Any) -> Iterator[tuple[str, str]]:
    """(result, operand) of a node of a C++ kernel that reads the operand only by way of other nodes of the kernel, and
    may be written over it if nothing reads it later.

    All read the operand place by place, in the order of loops in which the result is written, and what they make of it
    is needed for the result: so each place has been read before it is written, be the loops merged, nested in a common
    outer loop, or one after the other. (Inductor's own rule stands on the same, for what the node reads itself.)
    """
    from torch._inductor import config
    from torch._inductor.codegen.wrapper import can_match_buffer_size

    own = _own(kernel)
    results = list(node.get_outputs())
    writes = [_place(each) for each in node.read_writes.writes]
    if not config.inplace_buffers or len(results) != 1 or len(writes) != 1 or writes[0] is None:
        return
    (result,) = results
    if node.get_name() not in own or node.is_reduction() or node.is_template() or result.get_aliases():
        return
    if not result.node.should_allocate() or result.node.get_mutation_names():
        return
    before = [own[name] for name in own if name in node.ancestors]
    made = {each.get_name() for other in own.values() for each in other.get_outputs()}
    mine = {each.name for each in node.read_writes.reads}
    names = dict.fromkeys(each.name for other in before for each in other.read_writes.reads)
    for name in names:
        operand = buffer_of(node, name)
        if name in made or name in mine or operand is None or operand.node is None or not _owned(operand):
            continue
        users = [user.node.get_name() for user in operand.users if user.node.get_name() in own]
        accesses = {
            _place(each) for user in users for each in own[user].read_writes.reads_and_writes() if each.name == name
        }
        read = node.ancestors.issuperset(users) and accesses == set(writes)
        if read and can_match_buffer_size(operand.node, result.node):
            yield result.get_name(), name


def buffer_of(node: Any, name: str) -> Any:
    """What the scheduler of a node knows of a buffer, inputs that may be freed among them; None of others."""
    donated = getattr(node.scheduler, "name_to_donated_buffer", {})
    return donated.get(name) or node.scheduler.name_to_buf.get(name)


def read_later(node: Any, operand: Any) -> bool:
    """Whether anything reads a buffer that, while ``node`` is generated, has not run."""
    ran = node.ancestors | node.scheduler.completed_operations
    return any(user.node.get_name() not in ran for user in operand.users)


def _own(kernel: Any) -> dict[str, Any]:
    from torch._inductor.scheduler import SchedulerNode

    return {node.get_name(): node for node in kernel.get_nodes() if isinstance(node, SchedulerNode)}


def _place(access: Any) -> Any:
    """What tells apart in which order of its loops a node goes through which places; None where that is not known."""
    from torch._inductor.dependencies import MemoryDep

    if not isinstance(access, MemoryDep) or access.mode is not None or access.is_indirect():
        return None
    normal = access.normalize()
    return normal.index, normal.size


def _owned(operand: Any) -> bool:
    """Whether a buffer is memory of its own that a call of the graph has allocated."""
    from torch._inductor import ir
    from torch._inductor.scheduler import NopKernelSchedulerNode

    others = (ir.NoneLayout, ir.MultiOutputLayout, ir.MutationLayoutSHOULDREMOVE, ir.CommBufferLayout)
    if isinstance(operand.defining_op, NopKernelSchedulerNode) or operand.get_aliases() or operand.get_mutations():
        return False
    if operand.defining_op is not None and isinstance(operand.defining_op.node, ir.FallbackKernel | ir.MultiOutput):
        return False
    return not isinstance(operand.node.get_output_spec(), others)
