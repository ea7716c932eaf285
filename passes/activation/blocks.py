"""The layers of a model as blocks of the forward: the unit in which choices are mixed, and classes of equal blocks."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .problem import JointProblem

#: Without module paths the forward is cut into about this many pieces.
PIECES = 16


@dataclass(frozen=True)
class Block:
    """Ops of one layer, in order. Blocks of one ``kind`` have equal ops and sizes; ``position`` is that in the
    forward."""

    name: str
    kind: str
    ops: tuple[int, ...]
    values: tuple[int, ...]
    position: int


def blocks_of(problem: JointProblem) -> tuple[Block, ...]:
    """Blocks of the forward in order; every value that the forward makes is in one."""
    forward = [op for op in problem.ops if op.forward]
    labels = _labels([op.module for op in forward])
    groups: dict[str, list[int]] = {}
    for op, label in zip(forward, labels, strict=True):
        groups.setdefault(label, []).append(op.index)
    ordered = sorted(groups.items(), key=lambda item: item[1][0])
    return tuple(
        Block(
            name=label,
            kind=_kind(problem, ops),
            ops=tuple(ops),
            values=tuple(v for index in ops for v in problem.ops[index].writes),
            position=position,
        )
        for position, (label, ops) in enumerate(ordered)
    )


def crossing_values(problem: JointProblem, blocks: Sequence[Block]) -> frozenset[int]:
    """Values of the forward that ops of a later block read, such as the residual stream."""
    owner = {index: block.position for block in blocks for index in block.ops}
    found = set()
    for block in blocks:
        for v in block.values:
            users = [owner[u] for u in problem.users.get(v, ()) if u in owner]
            if any(u > block.position for u in users):
                found.add(v)
    return frozenset(found)


def _labels(modules: Sequence[str]) -> list[str]:
    """For each op the layer it belongs to: its module path up to the number that tells the most layers apart."""
    prefixes: dict[str, Counter[str]] = {}
    for module in modules:
        parts = module.split(".")
        for end, part in enumerate(parts, 1):
            if part.isdigit():
                pattern = ".".join("*" if piece.isdigit() else piece for piece in parts[:end])
                prefixes.setdefault(pattern, Counter())[".".join(parts[:end])] += 1
    good = {pattern: sum(found.values()) for pattern, found in prefixes.items() if len(found) > 1}
    if not good:
        size = max(1, -(-len(modules) // PIECES))
        return [f"part {index // size}" for index in range(len(modules))]
    most = max(good.values())
    chosen = max((p for p, ops in good.items() if ops >= 0.8 * most), key=lambda p: (len(prefixes[p]), good[p]))
    layers = set(prefixes[chosen])
    depth = chosen.count(".") + 1
    labels: list[str] = []
    last = ""
    for module in modules:
        prefix = ".".join(module.split(".")[:depth])
        if prefix in layers:
            last = prefix
            labels.append(prefix)
        else:
            labels.append(f"after {last}" if last else "before the layers")
    return labels


def _kind(problem: JointProblem, ops: Sequence[int]) -> str:
    """Structural hash of a block: its ops, sizes, and which op reads which."""
    place = {index: position for position, index in enumerate(ops)}
    lines = []
    for index in ops:
        op = problem.ops[index]
        reads = [str(place.get(problem.values[v].op, "outside")) for v in op.reads]
        sizes = [str(problem.values[v].bytes) for v in op.writes]
        lines.append(f"{op.op}({','.join(reads)})->{','.join(sizes)}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
