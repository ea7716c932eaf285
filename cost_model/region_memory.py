"""What happens inside a compiled region: its kernels in order, and the memory they use.

Either read from the code a compiler generated, or estimated here from the ops.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ..ir.graph import Graph, Node, references
from .devices import Device
from .estimated_order import in_order
from .fusion import Kernel, group_kernels
from .generated_loops import Nest
from .op_classes import ATTENTION_BACKWARD, ATTENTION_FORWARD, FUSABLE, GEMM, packet
from .storages import StorageTable
from .tensors import TensorTable
from .workspace import workspace_bytes


class RegionKernel(msgspec.Struct, frozen=True, kw_only=True):
    """One launch. ``kind`` is ``kernel`` (generated) or ``library``; ``ops`` are the graph's nodes that it computes,
    as far as known; ``nests`` the loops of its code, where that was read; ``seconds`` a measured time, if there is one.
    """

    name: str
    kind: str = "kernel"
    ops: tuple[str, ...] = ()
    nests: tuple[Nest, ...] = ()
    seconds: float | None = None


class RegionBuffer(msgspec.Struct, frozen=True, kw_only=True):
    """Memory in use from the start of kernel ``first`` to the end of kernel ``last`` (counted in the region's order).

    ``values`` are the region's inputs and outputs that lie in it (none for internal memory; an input and an output
    share a buffer where the region overwrites its input); ``name#i`` is tensor i of a value that holds several.
    Memory that a kernel takes over from another is one buffer with the union of both ranges.
    Outputs live on after ``last``, inputs existed before ``first``. ``between``: all kernels that use it, and
    ``changed``: those that write into it, as far as known.
    """

    name: str
    bytes: int
    first: int
    last: int
    values: tuple[str, ...] = ()
    between: tuple[int, ...] = ()
    changed: tuple[int, ...] = ()


class KernelOrder(msgspec.Struct, frozen=True, kw_only=True):
    """How the order of a region's kernels was chosen: bytes held at once in it, in Inductor's own order (``given``),
    and in no order less than ``bound``. ``windows``: how often CP-SAT was asked. ``otherwise``: what the given order
    is."""

    peak: int
    given: int
    bound: int
    kernels: int
    windows: int = 0
    otherwise: str = "as Inductor orders them"


class RegionMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Kernels and buffers of one region; ``order`` where their order was chosen."""

    kernels: tuple[RegionKernel, ...]
    buffers: tuple[RegionBuffer, ...]
    order: KernelOrder | None = None

    def problems(self) -> list[str]:
        """What makes the answer unusable; empty if nothing does."""
        count = len(self.kernels)
        found = [f"buffer {b.name!r} has negative size {b.bytes}" for b in self.buffers if b.bytes < 0]
        found += [
            f"buffer {b.name!r} is used by kernels {b.first} to {b.last} of {count}"
            for b in self.buffers
            if not 0 <= b.first <= b.last < count or not all(b.first <= use <= b.last for use in b.between)
        ]
        return found


def estimate(
    nodes: Sequence[Node],
    graph: Graph,
    table: TensorTable,
    storages: StorageTable,
    kept: set[int],
    device: Device,
) -> tuple[RegionMemory, tuple[Kernel, ...]]:
    """Kernels and memory of a region as a fusing compiler would make them.

    A generated kernel writes into an internal buffer of equal size that it is the last to read, as Inductor does. Their
    order is that which needs least memory. ``kept`` are the storages used after the region.
    """
    kernels, order = in_order(group_kernels(nodes, graph, table, storages, kept), table, storages, kept)
    inside = {node.name for node in nodes}
    used: dict[int, list[int]] = {}
    made: dict[int, list[int]] = {}
    for position, kernel in enumerate(kernels):
        for s in (*kernel.reads, *kernel.writes):
            used.setdefault(s, []).append(position)
            made.setdefault(s, [])
        for s in kernel.writes:
            made[s].append(position)
    first = {s: positions[0] for s, positions in used.items()}
    last = {s: positions[-1] for s, positions in used.items()}
    internal = {s for s in first if storages.storages[s].node in inside and s not in kept}
    members: dict[int, list[int]] = {}
    for s, root in _taken_over(kernels, storages, internal, last).items():
        members.setdefault(root, []).append(s)
    buffers = tuple(
        RegionBuffer(
            name=_value_name(root, storages),
            bytes=storages.storages[root].bytes,
            first=min(first[s] for s in shared),
            last=max(last[s] for s in shared),
            values=tuple(_value_name(s, storages) for s in shared if s not in internal),
            between=tuple(sorted({position for s in shared for position in used[s]})),
            changed=tuple(sorted({position for s in shared for position in made[s]})),
        )
        for root, shared in members.items()
    )
    buffers += tuple(
        RegionBuffer(name=f"{kernel.nodes[0].name} workspace", bytes=size, first=position, last=position)
        for position, kernel in enumerate(kernels)
        if len(kernel.nodes) == 1 and (size := workspace_bytes(kernel.nodes[0], table, device))
    )
    launches = tuple(
        RegionKernel(
            name="+".join(dict.fromkeys(packet(node.op).partition(".")[2] for node in kernel.nodes)) or kernel.kind,
            kind="kernel" if kernel.kind in FUSABLE else "library",
            ops=tuple(node.name for node in kernel.nodes),
        )
        for kernel in kernels
    )
    chosen = None
    if len(kernels) > 1:
        chosen = KernelOrder(
            peak=order.peak, given=order.given, bound=order.bound, kernels=len(kernels), windows=order.windows,
            otherwise="as the ops stand",
        )  # fmt: skip
    return RegionMemory(kernels=launches, buffers=buffers, order=chosen), kernels


def with_attention_workspaces(
    memory: RegionMemory, nodes: Sequence[Node], table: TensorTable, device: Device
) -> RegionMemory:
    """Memory read from generated code, and what a library's attention holds for itself, which the code does not say."""
    by_name = {node.name: node for node in nodes}
    found = []
    for position, kernel in enumerate(memory.kernels):
        node = by_name.get(kernel.ops[-1]) if kernel.kind == "library" and kernel.ops else None
        if node is not None and packet(node.op) in ATTENTION_FORWARD | ATTENTION_BACKWARD:
            size = workspace_bytes(node, table, device)
            found.append(RegionBuffer(name=f"{node.name} workspace", bytes=size, first=position, last=position))
    return msgspec.structs.replace(memory, buffers=(*memory.buffers, *found)) if found else memory


def with_absorbed_products(memory: RegionMemory, nodes: Sequence[Node]) -> RegionMemory:
    """Memory read from generated code, and the products that library kernels compute besides the op they are named
    for: Inductor calls ``addmm`` for the sum of an ``mm`` and a matrix, and names only the sum."""
    named = {name for kernel in memory.kernels for name in kernel.ops}
    lost = {node.name for node in nodes if packet(node.op) in GEMM and node.name not in named}
    if not lost:
        return memory
    read = {node.name: tuple(name for name in references(node.args) if name in lost) for node in nodes}
    found = []
    for kernel in memory.kernels:
        absorbed = tuple(name for op in kernel.ops for name in read.get(op, ())) if kernel.kind == "library" else ()
        found.append(msgspec.structs.replace(kernel, ops=(*dict.fromkeys(absorbed), *kernel.ops)))
    return msgspec.structs.replace(memory, kernels=tuple(found))


def _taken_over(
    kernels: Sequence[Kernel], storages: StorageTable, internal: set[int], last: dict[int, int]
) -> dict[int, int]:
    """Storage -> the storage whose memory it uses (itself, where it has memory of its own)."""
    root: dict[int, int] = {}
    for position, kernel in enumerate(kernels):
        for s in (*kernel.reads, *kernel.writes):
            root.setdefault(s, s)
        if kernel.kind not in ("pointwise", "reduction"):
            continue
        dying = [s for s in kernel.reads if s in internal and last[s] == position]
        for written in kernel.writes:
            size = storages.storages[written].bytes
            taken = next((s for s in dying if storages.storages[s].bytes == size and s != written), None)
            if taken is not None and root[written] == written:
                dying.remove(taken)
                root[written] = root[taken]
    return root


def _value_name(storage: int, storages: StorageTable) -> str:
    entry = storages.storages[storage]
    return entry.node if len(storages.of[entry.node]) == 1 else f"{entry.node}#{entry.index}"


def storages_named(value: str, storages: StorageTable) -> tuple[int, ...]:
    """Storages of a value of a ``RegionBuffer``: ``%name``'s, or with ``name#i`` its i-th tensor's."""
    name, _, index = value.partition("#")
    found = storages.of.get(name, ())
    return found[int(index) : int(index) + 1] if index.isdecimal() else found
