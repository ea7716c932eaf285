"""Kernels and memory of a region in the order of its ops, by the rules that the simulator of a step goes by.

``cost_model.region_memory.estimate`` groups ops by what can be fused, wherever they stand, and so brings recomputation
forward to the beginning of a region. Here a kernel stands where the op stands whose result it stores.
"""

from __future__ import annotations

from ...cost_model.devices import Device
from ...cost_model.op_classes import packet
from ...cost_model.region_memory import RegionBuffer, RegionKernel, RegionMemory
from ...cost_model.tensors import Bindings, TensorTable
from ...cost_model.workspace import workspace_bytes
from ...errors import ShapeError
from ...ir.graph import Graph
from .phase import Phase
from .problem import JointProblem, Op, joint_problem


def ordered_memory(region: Graph, device: Device, bindings: Bindings | None = None) -> RegionMemory | None:
    """What the region does inside; None for sizes without a value and for regions that call others."""
    if any(node.op == "call" for node in region.nodes):
        return None
    try:
        problem = joint_problem(region, device, len(region.outputs), bindings=bindings)
        table = TensorTable(region, bindings)
    except ShapeError:
        return None
    ops = list(problem.ops)
    given = frozenset(v.id for v in problem.values if v.op < 0)
    phase = Phase(problem, ops, frozenset(problem.forward_outputs), given)
    stored = [op for op in ops if phase.stored[op.index]]
    members = _members(problem, ops, phase)
    kernels = tuple(
        RegionKernel(
            name=packet(op.op).partition(".")[2] or op.op,
            kind="kernel" if op.fused else "library",
            ops=tuple(problem.ops[index].name for index in sorted(members.get(op.index, set()) | {op.index})),
        )
        for op in stored
    )
    if not kernels:
        return RegionMemory(kernels=(), buffers=())
    buffers = _buffers(problem, stored, phase)
    nodes = region.by_name()
    for position, op in enumerate(stored):
        size = workspace_bytes(nodes[op.name], table, device)
        if size:
            buffers.append(RegionBuffer(name=f"{op.name} workspace", bytes=size, first=position, last=position))
    return RegionMemory(kernels=kernels, buffers=tuple(buffers))


def _members(problem: JointProblem, ops: list[Op], phase: Phase) -> dict[int, set[int]]:
    """Stored op -> the inlined ops that run in its kernel; those with several readers are named where they run
    first."""
    members: dict[int, set[int]] = {}
    taken: set[int] = set()
    present = {op.index for op in ops}
    for op in ops:
        if not phase.stored[op.index]:
            continue
        waiting = list(op.reads)
        found: set[int] = set()
        while waiting:
            maker = problem.values[waiting.pop()].op
            if maker in present and maker not in taken and not phase.stored[maker]:
                taken.add(maker)
                found.add(maker)
                waiting.extend(problem.ops[maker].reads)
        members[op.index] = found
    return members


def _buffers(problem: JointProblem, stored: list[Op], phase: Phase) -> list[RegionBuffer]:
    used: dict[int, list[int]] = {}
    made: dict[int, int] = {}
    for position, op in enumerate(stored):
        for v in (*phase.sources[op.index], *op.writes):
            used.setdefault(v, []).append(position)
        made.update(dict.fromkeys(op.writes, position))
    first = {v: positions[0] for v, positions in used.items()}
    last = {v: positions[-1] for v, positions in used.items()}
    outputs = set(problem.forward_outputs)
    root = {v: v for v in first}
    for position, op in enumerate(stored):
        if not op.fused:
            continue
        dying = [
            v
            for v in phase.sources[op.index]
            if last[v] == position and v not in outputs and problem.values[v].op >= 0 and v not in op.writes
        ]
        for v in op.writes:
            taken = next((u for u in dying if problem.values[u].bytes == problem.values[v].bytes), None)
            if taken is not None and root[v] == v:
                dying.remove(taken)
                root[v] = root[taken]
    groups: dict[int, list[int]] = {}
    for v, own in root.items():
        groups.setdefault(own, []).append(v)
    parts: dict[str, int] = {}
    for value in problem.values:
        parts[value.node] = parts.get(value.node, 0) + 1

    def label(v: int) -> str:
        entry = problem.values[v]
        return entry.node if parts[entry.node] == 1 else f"{entry.node}#{entry.part}"

    return [
        RegionBuffer(
            name=label(own),
            bytes=problem.values[own].bytes,
            first=min(first[v] for v in shared),
            last=max(last[v] for v in shared),
            values=tuple(label(v) for v in shared if v in outputs or problem.values[v].op < 0),
            between=tuple(sorted({position for v in shared for position in used[v]})),
            changed=tuple(sorted({made[v] for v in shared if v in made})),
        )
        for own, shared in groups.items()
    ]
