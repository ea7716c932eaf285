"""The cost of an op, a fused kernel, a region: operations, bytes and seconds by the roofline.

``seconds = max(flop / rate, bytes / bandwidth) + launch`` (Williams et al., Roofline, CACM 2009), with the rate and the
bandwidth scaled by the device's efficiency for that class of work, a matrix product's rate by how evenly its tiles fill
the units, and the bandwidth by the cache the working set fits in. Measured matrix products are preferred where the
device was calibrated, and the learned kernel-time model where it applies (``kernel_seconds.py``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..ir.graph import Graph, Node
from . import op_classes
from .calibrate import calibration_folder
from .cascade_cost import kernel_seconds, map_seconds
from .devices import Device, GemmMeasurement
from .flops import FORMULAS, Call, contraction_flop, executed_fraction
from .fusion import Kernel, group_kernels
from .generated_loops import Nest, issued_seconds
from .grouped_products import GROUPED, LOOPS, grouped_shapes
from .kernel_seconds import learned_seconds
from .library_laws import law_seconds
from .op_additions import added_seconds
from .op_classes import kind_of, packet
from .product_cost import chosen_library, laws_of, timed_product
from .random_draws import OPERATIONS, drawn
from .storages import StorageTable, storage_table
from .tensors import Bindings, TensorTable, called, evaluate
from .this_machine import machine


@dataclass(frozen=True)
class Cost:
    """``flop`` counts everything, ``matmul_flop`` the part in matrix products, convolutions and attention; ``bytes`` is
    memory traffic; ``bound`` says what the time is made of: compute, memory, launch or none (views)."""

    flop: int = 0
    bytes: int = 0
    seconds: float = 0.0
    bound: str = "none"
    matmul_flop: int = 0


FREE = Cost()

#: Operations an element beyond the plain one: exp, rsqrt and the several sweeps of norms.
_FLOP_PER_ELEMENT = {**dict.fromkeys(op_classes.SOFTMAX, 5), **dict.fromkeys(op_classes.NORM, 7)}
#: Buffers of so many bytes come fresh from the system each time, for the C library gives them back when they are freed
#: (smaller ones are kept, see ``runtime.freed_memory``).
FRESH = 32 << 20
#: Tile of a GPU matrix product and the least depth worth splitting over idle units.
_TILE_ROWS, _TILE_COLUMNS, _SPLIT_DEPTH = 128, 128, 256


def op_cost(
    node: Node, graph: Graph, device: Device, bindings: Bindings | None = None, table: TensorTable | None = None
) -> Cost:
    """Cost of one op run as a kernel of its own; a ``call`` costs the sum of its subgraph's ops.

    ``table`` saves rebuilding the graph's sizes when many ops are asked for. Raises ShapeError for a symbolic size
    without a binding.
    """
    if table is None:
        table = TensorTable(graph, bindings)
    if node.op == "call":
        subgraph = called(node, graph)
        return graph_cost(subgraph, device, table.bindings) if subgraph is not None else FREE
    kind = kind_of(node.op)
    if kind in ("structural", "view"):
        return FREE
    moved = _op_bytes(node, table)
    written = [tensor.bytes for tensor in table.of(node.name)]
    return _kernel_cost(kind, [node], moved, table, device, written)


def fused_seconds(node: Node, graph: Graph, device: Device, table: TensorTable, share: float) -> float:
    """Seconds of an op of a generated kernel that has that ``share`` of the traffic that the op would have alone: no
    launch, but all of its own work, functions and random numbers, which costs the same in any kernel."""
    alone = max(0.0, op_cost(node, graph, device, table=table).seconds - device.launch.value)
    if device.added:
        work = min(alone, added_seconds(node, table, device.added))
        return work + share * (alone - work)
    return max(share * alone, _draw_seconds([node], table, device))


def graph_cost(graph: Graph, device: Device, bindings: Bindings | None = None) -> Cost:
    """Sum of the costs of all ops of a graph, one kernel each (what eager execution does)."""
    table = TensorTable(graph, bindings)
    return total(op_cost(node, graph, device, table=table) for node in graph.nodes)


def region_cost(
    nodes: Sequence[Node],
    graph: Graph,
    device: Device,
    bindings: Bindings | None = None,
    table: TensorTable | None = None,
) -> Cost:
    """Cost of a region compiled as fused kernels: flop of all ops, bytes of what kernels read and write."""
    if table is None:
        table = TensorTable(graph, bindings)
    storages = storage_table(graph, table)
    kernels = group_kernels(nodes, graph, table, storages)
    return total(kernel_cost(kernel, graph, device, table, storages) for kernel in kernels)


def kernel_cost(
    kernel: Kernel,
    graph: Graph,
    device: Device,
    table: TensorTable,
    storages: StorageTable,
    nests: Sequence[Nest] = (),
) -> Cost:
    """Cost of one fused kernel: its inputs are read once, its outputs written once, whatever happens inside; on a
    calibrated CPU that of its loops (``nests``), where its code was read."""
    if nests and "statement" in device.added:
        written = [storages.storages[s].bytes for s in kernel.writes]
        return _loops_cost(nests, kernel.nodes, table, device, written)
    if kernel.kind in ("call", "structural"):
        return total(op_cost(node, graph, device, table=table) for node in kernel.nodes)
    if len(kernel.nodes) == 1:
        return op_cost(kernel.nodes[0], graph, device, table=table)
    moved = sum(storages.storages[s].bytes for s in (*kernel.reads, *kernel.writes))
    for node in kernel.nodes:  # what an indexing op touches is not its whole operand
        if packet(node.op) in op_classes.GATHER:
            whole = [storages.storages[s].bytes for s in storages.read(node)[:1] if s in kernel.reads]
            moved -= max(0, sum(whole) - sum(tensor.bytes for tensor in table.of(node.name)))
    written = [storages.storages[s].bytes for s in kernel.writes]
    return _kernel_cost(kernel.kind, list(kernel.nodes), max(moved, 0), table, device, written)


def total(costs: Iterable[Cost]) -> Cost:
    """Costs one after another; bound by what takes the most time."""
    flop = moved = matmul = 0
    seconds = 0.0
    shares: dict[str, float] = {}
    for cost in costs:
        flop, moved, matmul = flop + cost.flop, moved + cost.bytes, matmul + cost.matmul_flop
        seconds += cost.seconds
        shares[cost.bound] = shares.get(cost.bound, 0.0) + cost.seconds
    bound = max(shares, key=lambda name: (shares[name], name)) if seconds > 0 else "none"
    return Cost(flop, moved, seconds, bound, matmul)


def _op_bytes(node: Node, table: TensorTable) -> int:
    """Bytes an op moves when it runs alone."""
    base = packet(node.op)
    read = [tensor.bytes for tensor in table.read(node)]
    written = [tensor.bytes for tensor in table.of(node.name)]
    if base in op_classes.UNWRITTEN:
        return 0
    if base in op_classes.GATHER:  # rows that are picked, their indices, the result
        return sum(read[1:]) + 2 * sum(written)
    if base == "aten.embedding_dense_backward":  # zeroes the table, then adds each row
        return sum(read) + sum(written) + read[0]
    if base in op_classes.SCATTER:  # copy of the base, then a read and a write of what is added
        base_bytes = 0 if node.op.split(".")[1].endswith("_") else sum(written) + (read[0] if read else 0)
        return base_bytes + 3 * sum(read[1:])
    if base == "aten.copy_":
        return sum(read[1:]) + sum(written)
    return sum(read) + sum(written)


def _kernel_cost(
    kind: str, nodes: list[Node], moved: int, table: TensorTable, device: Device, written: Sequence[int] = ()
) -> Cost:
    if device.added:
        return _calibrated_cost(kind, nodes, moved, table, device, written)
    matmul, other, executed = 0, 0, 0.0
    for node in nodes:
        contraction = contraction_flop(node, table)
        matmul += contraction
        executed += contraction * executed_fraction(node, table)
        other += _vector_flop(node, table)
    dtype = _dtype(nodes, table)
    shape = gemm_shape(nodes[0], table) if kind == "gemm" and len(nodes) == 1 else (1, 1, 1, 1)
    if kind == "gemm" and len(nodes) == 1:
        compute = gemm_seconds(*shape, dtype, device, executed)
    elif matmul:
        grouped = packet(nodes[0].op) in GROUPED
        compute = executed / (device.matrix_rate(dtype) * device.efficiency_of("gemm" if grouped else kind))
    else:
        compute = 0.0
    draws = _draw_seconds(nodes, table, device)
    compute += other / device.vector_rate(dtype) + draws
    memory = moved / bandwidth(moved, kind, device)
    calls = sum(shape[0] for shape in grouped_shapes(nodes[0], table)) if packet(nodes[0].op) in LOOPS else 1
    launch = device.launch.value * max(1, calls)
    bound = "launch" if launch >= max(compute, memory) else "compute" if compute >= memory else "memory"
    learned = learned_seconds(nodes[0], shape, table, device) if len(nodes) == 1 and not draws else None
    seconds = learned.seconds if learned is not None else max(compute, memory)
    return Cost(matmul + other, moved, seconds + launch, bound, matmul)


def _calibrated_cost(
    kind: str, nodes: list[Node], moved: int, table: TensorTable, device: Device, written: Sequence[int]
) -> Cost:
    """On a CPU whose kernels were measured: bytes and what the ops add, one after the other; a product beside its
    bytes, for the measured ones include theirs."""
    matmul = other = 0
    compute = product = 0.0
    dtype = _dtype(nodes, table)
    for node in nodes:
        contraction = contraction_flop(node, table)
        matmul += contraction
        other += _vector_flop(node, table)
        compute += added_seconds(node, table, device.added)
        if shapes := grouped_shapes(node, table):
            product += grouped_seconds(shapes, dtype, device)
        elif contraction and kind_of(node.op) == "gemm":
            product += product_seconds(node, dtype, table, device)
        elif (law := law_seconds(node, table, device.added)) is not None:
            product += law
        elif (priced := _priced(node, table, device)) is not None:
            product += priced
        elif contraction:
            work = contraction * executed_fraction(node, table)
            part = kind_of(node.op)
            back = f"{part}_backward" if "backward" in node.op else part
            rate = device.matrix_rate(dtype) * device.efficiency_of(back if back in device.efficiency else part)
            product += work / rate
            fused = table.cascade(node) if part == "cascade" else None
            if fused is not None:
                ranks = {name: evaluate(size, table.bindings) for name, size in fused.sizes.items()}
                product += map_seconds(fused.cascade, ranks, device.added, device.vector_lanes) / device.thread_count
    library = kind in ("gemm", "convolution", "attention", "opaque", "sort") or product > 0
    launch = (device.library_call or device.launch).value if library else device.launch.value
    # The rung is that of one loop: a generated kernel may be several loops, one after the other.
    sizes = [tensor.bytes for node in nodes for tensor in (*table.read(node), *table.of(node.name))]
    memory = moved / bandwidth(min(moved, 3 * max(sizes, default=0)), kind, device)
    if device.fresh is not None:
        compute += device.fresh.value * sum(size for size in written if size >= FRESH)
    seconds = max(product, memory) + compute if product else memory + compute
    parts = {"launch": launch, "compute": product + compute, "memory": memory}
    return Cost(matmul + other, moved, seconds + launch, max(parts, key=parts.__getitem__), matmul)


def _draw_seconds(nodes: Iterable[Node], table: TensorTable, device: Device) -> float:
    """Seconds of the random numbers that ops draw, on the vector units at their peak rate."""
    numbers = sum(found[1] for node in nodes if (found := drawn(node, table)) is not None)
    return numbers * OPERATIONS / device.vector_rate("f32")


def _priced(node: Node, table: TensorTable, device: Device) -> float | None:
    fused = table.cascade(node) if kind_of(node.op) == "cascade" else None
    return kernel_seconds(fused, device) if fused is not None else None


def _loops_cost(
    nests: Sequence[Nest], nodes: Sequence[Node], table: TensorTable, device: Device, written: Sequence[int]
) -> Cost:
    """One loop nest after another, each its bytes, its statements and the functions that they call."""
    memory = sum(nest.bytes / bandwidth(nest.bytes, "memory", device) for nest in nests if nest.bytes)
    issued = sum(issued_seconds(nest, device.added) for nest in nests)
    fresh = device.fresh.value if device.fresh is not None else 0.0
    issued += fresh * sum(size for size in written if size >= FRESH)
    parts = {"launch": device.launch.value, "compute": issued, "memory": memory}
    flop, moved = sum(_vector_flop(node, table) for node in nodes), sum(nest.bytes for nest in nests)
    return Cost(flop, moved, sum(parts.values()), max(parts, key=parts.__getitem__), 0)


def product_seconds(node: Node, dtype: str, table: TensorTable, device: Device) -> float:
    """A product on a calibrated CPU, without its call, with what is added to it."""
    seconds, added = product_parts(node, dtype, table, device)
    return seconds + added / bandwidth(added, "memory", device) if added else seconds


def product_parts(node: Node, dtype: str, table: TensorTable, device: Device) -> tuple[float, int]:
    """Seconds of a product by itself, and the bytes that an addend moves: it is copied to the result first, which is
    then read and written once more."""
    batch, m, k, n = gemm_shape(node, table)
    here = batch == 1 and dtype == "f32" and device.machine == machine()
    timed = timed_product(calibration_folder(), m, k, n, device.library) if here else None
    if timed is not None:
        library, seconds = timed
    else:
        chosen = chosen_library(device, dtype, batch, m, k, n)
        library, seconds = chosen or ("blas", gemm_seconds(batch, m, k, n, dtype, device))
    adds = packet(node.op) in ("aten.addmm", "aten.baddbmm") and library == "blas"
    return seconds, 3 * sum(tensor.bytes for tensor in table.of(node.name)) if adds else 0


def grouped_seconds(shapes: Sequence[tuple[int, int, int, int]], dtype: str, device: Device) -> float:
    """Grouped products on a calibrated CPU: a loop of calls, for each result is filled with zeros first."""
    seconds = 0.0
    turn = device.added["turn"].value if "turn" in device.added else device.launch.value
    for groups, m, k, n in shapes:
        law = laws_of(device, dtype).get("blas")
        one = law.seconds(1, m, k, n) if law is not None else gemm_seconds(1, m, k, n, dtype, device)
        zeros = 2 * groups * m * n * 4  # each line is read before it is written
        seconds += groups * (one + turn)
        seconds += zeros / bandwidth(zeros, "", device)
    return seconds


def bandwidth(moved: int, kind: str, device: Device) -> float:
    """Bytes a second that a kernel of this class reaches when it moves that many bytes."""
    if device.ladder:
        return _on_ladder(moved, device)
    efficiency = device.efficiency_of(kind if kind in ("reduction", "index") else "memory")
    for cache in sorted(device.caches, key=lambda cache: cache.bytes.value):
        if moved <= cache.bytes.value:
            return max(cache.bandwidth.value, device.bandwidth) * efficiency
    return device.bandwidth * efficiency


def _on_ladder(moved: int, device: Device) -> float:
    """Between two rungs of a calibrated device's ladder, both on logarithmic scales."""
    rungs = device.ladder
    if moved <= rungs[0].bytes.value:
        return rungs[0].bandwidth.value
    for low, high in itertools.pairwise(rungs):
        if moved <= high.bytes.value:
            share = math.log(moved / low.bytes.value) / math.log(high.bytes.value / low.bytes.value)
            return math.exp(
                (1 - share) * math.log(low.bandwidth.value) + share * math.log(high.bandwidth.value)
            )  # fmt: skip
    return rungs[-1].bandwidth.value


def gemm_shape(node: Node, table: TensorTable) -> tuple[int, int, int, int]:
    """(batch, m, k, n) of a matrix product, batch 1 for a plain one."""
    call = Call(node, table)
    first = 1 if packet(node.op) in ("aten.addmm", "aten.baddbmm", "aten.addbmm", "aten.addmv") else 0
    left, out = call.shape(first), call.outputs()
    if not left or not out or not out[0].shape:
        return 1, 1, max(1, math.prod(left)), 1
    shape = out[0].shape
    if packet(node.op) in ("aten.bmm", "aten.baddbmm"):
        return shape[0], shape[1], left[-1], shape[2]
    return 1, max(1, math.prod(shape[:-1])), left[-1], shape[-1]


def gemm_seconds(batch: int, m: int, k: int, n: int, dtype: str, device: Device, flop: float | None = None) -> float:
    """Seconds of ``batch`` products (m, k) @ (k, n), without memory traffic and launch.

    A measured rate of the nearest shape is used where there is one; else peak, efficiency and how full the tiles keep
    the units: ``tiles / (ceil(tiles / units) · units)``, with deep products split over idle units.
    """
    work = float(2 * batch * m * k * n) if flop is None else flop
    measured = nearest(device.gemm, dtype, m, k, n)
    if measured is not None:
        return work / measured.rate
    rate = device.matrix_rate(dtype) * device.efficiency_of("gemm")
    if device.kind in ("cuda", "rocm"):
        units = int(device.units.value)
        tiles = batch * math.ceil(m / _TILE_ROWS) * math.ceil(n / _TILE_COLUMNS)
        if tiles < units:
            tiles *= max(1, min(units // tiles, k // _SPLIT_DEPTH))
        rate *= tiles / (math.ceil(tiles / units) * units)
    return work / rate


def nearest(
    measurements: Iterable[GemmMeasurement], dtype: str, m: int, k: int, n: int, layout: str = ""
) -> GemmMeasurement | None:
    """The fastest library's measurement of the shape class nearest in log size (and of the layout, if given)."""
    best: tuple[float, float, GemmMeasurement] | None = None
    for entry in measurements:
        if entry.dtype != dtype or entry.batch > 1 or (layout and entry.layout != layout):
            continue
        distance = sum(
            abs(math.log2(max(1, have)) - math.log2(max(1, want)))
            for have, want in ((entry.m, m), (entry.k, k), (entry.n, n))
        )
        key = (round(distance, 6), -entry.rate, entry)
        if best is None or key[:2] < best[:2]:
            best = key
    return best[2] if best is not None else None


def _vector_flop(node: Node, table: TensorTable) -> int:
    """Operations outside of matrix products: one an element for pointwise ops and reductions (of their input)."""
    kind = kind_of(node.op)
    outputs = table.of(node.name)
    largest = max((tensor.elements for tensor in outputs), default=0)
    if kind == "pointwise":
        return largest
    if kind == "reduction":
        read = max((tensor.elements for tensor in table.read(node)), default=0)
        return max(read, largest) * _FLOP_PER_ELEMENT.get(packet(node.op), 1)
    if kind == "sort":
        read = max((tensor.elements for tensor in table.read(node)), default=0)
        return read * max(1, math.ceil(math.log2(max(2, read))))
    if kind == "attention":  # exp, maximum and rescale of each score
        shape = Call(node, table).shape(1 if "backward" in node.op else 0)
        keys = Call(node, table).shape(2 if "backward" in node.op else 1)
        return 4 * math.prod(shape[:-1]) * keys[-2] if len(keys) >= 2 and shape else 0
    if kind == "cascade":  # each point of a map or of a sum without a product
        fused = table.cascade(node)
        sizes = {name: evaluate(size, table.bindings) for name, size in fused.sizes.items()} if fused else {}
        einsums = fused.cascade.einsums if fused else ()
        return sum(
            math.prod(sizes[symbol.name] for symbol in einsum.space)
            for einsum in einsums
            if einsum.reduction != "sum" or len(einsum.reads) == 1
        )
    if kind == "index":
        return sum(tensor.elements for tensor in table.read(node)[1:]) if packet(node.op) in op_classes.SCATTER else 0
    return 0


def _dtype(nodes: list[Node], table: TensorTable) -> str:
    """The dtype that decides the rate: of the largest operand of the matrix products (a mask or an index is none), else
    of the largest tensor."""
    operands = [tensor for node in nodes if packet(node.op) in FORMULAS for tensor in table.read(node)]
    floating = [tensor for tensor in operands if tensor.dtype.startswith(("f", "bf"))]
    every = floating or [tensor for node in nodes for tensor in (*table.read(node), *table.of(node.name))]
    return max(every, key=lambda tensor: tensor.elements).dtype if every else "f32"
