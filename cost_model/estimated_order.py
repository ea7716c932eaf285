"""The order of a region's estimated kernels: that which needs least memory at once, as the generated code's is chosen
where a region is compiled (``kernel_order``). So a plan made for another machine has the order that will run there.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from .fusion import Kernel
from .kernel_order import OrderAnswer, OrderProblem, Value, choose_order
from .storages import StorageTable
from .tensors import TensorTable

#: Kernels whose order among themselves is kept: other processes, or somebody else's code, may go by it.
_IN_ORDER = frozenset({"collective", "opaque"})
#: Inputs that somebody holds whatever reads them.
_HELD = frozenset({"parameter", "buffer", "input", ""})


def in_order(
    kernels: Sequence[Kernel], table: TensorTable, storages: StorageTable, kept: Set[int]
) -> tuple[tuple[Kernel, ...], OrderAnswer]:
    """The kernels, which are in a legal order, in the chosen one. ``kept``: storages that are used after them."""
    answer = choose_order(_problem(kernels, table, storages, kept), range(len(kernels)))
    return tuple(kernels[index] for index in answer.order), answer


def _problem(kernels: Sequence[Kernel], table: TensorTable, storages: StorageTable, kept: Set[int]) -> OrderProblem:
    before: list[tuple[int, ...]] = []
    writer: dict[int, int] = {}
    readers: dict[int, list[int]] = {}
    users: dict[int, list[int]] = {}
    made: dict[int, int] = {}
    last: int | None = None
    for index, kernel in enumerate(kernels):
        needed = {writer[s] for s in (*kernel.reads, *kernel.writes) if s in writer}
        needed |= {reader for s in kernel.writes for reader in readers.get(s, ())}
        if kernel.kind in _IN_ORDER:
            needed |= {last} if last is not None else set()
            last = index
        before.append(tuple(sorted(needed - {index})))
        inside = {node.name for node in kernel.nodes}
        for s in kernel.reads:
            readers.setdefault(s, []).append(index)
            users.setdefault(s, []).append(index)
        for s in kernel.writes:
            if storages.storages[s].node in inside:
                made.setdefault(s, index)
            writer[s], readers[s] = index, []
            users.setdefault(s, []).append(index)
    values = []
    for s, used in users.items():
        entry = storages.storages[s]
        held = s not in made and table.node(entry.node).role in _HELD
        values.append(Value(entry.bytes, made.get(s, -1), tuple(dict.fromkeys(used)), kept=held or s in kept))
    return OrderProblem(len(kernels), tuple(before), tuple(values))
