"""Where a process stands in a mesh of replicas: its place in its own replica, and who has that place in the others.

Ranks that share a sequence (axis ``cp``) have the same parameters and other tokens: for gradients and losses they are
replicas too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..errors import EffccError


@dataclass(frozen=True)
class MeshLayout:
    """``rows[d][p]``: the process at place p of replica d. ``rank`` and ``replica`` are this process's. Replicas
    ``k * parts`` to ``(k + 1) * parts - 1`` share their sequences."""

    rows: tuple[tuple[int, ...], ...]
    rank: int
    replica: int
    parts: int = 1

    @classmethod
    def of(cls, mesh: DeviceMesh | None, axis: str, error: type[EffccError]) -> MeshLayout:
        """The layout of a mesh with ``axis`` (the places of a replica) and perhaps ``dp`` (replicas) and ``cp`` (ranks
        that share a sequence), made by ``init_device_mesh`` over all processes; without a mesh, all processes are one
        replica. Raises ``error`` for other meshes."""
        me, world = dist.get_rank(), dist.get_world_size()
        if mesh is None:
            return cls((tuple(range(world)),), me, 0)
        names = mesh.mesh_dim_names or ()
        other = [name for name in names if name not in (axis, "dp", "cp")]
        if other or axis not in names or mesh.size() != world:
            wrong = (
                f"axis {other[0]!r}" if other else f"no axis {axis!r}" if axis not in names else f"{mesh.size()} ranks"
            )
            raise error(
                f"a mesh with {wrong} for {axis} of {world} processes", where=f"rank {me}",
                remedy=f"init_device_mesh(device, (places, replicas), mesh_dim_names=({axis!r}, 'dp')) over all",
            )  # fmt: skip
        order = [names.index(name) for name in ("dp", "cp", axis) if name in names]
        ranks = mesh.mesh.permute(order).reshape(-1, mesh.size(names.index(axis)))
        table = tuple(tuple(int(rank) for rank in row) for row in ranks.tolist())
        replica, rank = next((d, row.index(me)) for d, row in enumerate(table) if me in row)
        return cls(table, rank, replica, mesh.size(names.index("cp")) if "cp" in names else 1)

    @property
    def ranks(self) -> int:
        return len(self.rows[0])

    @property
    def replicas(self) -> int:
        return len(self.rows)

    @property
    def name(self) -> str:
        """This process as messages call it."""
        place = f" (place {self.rank} of replica {self.replica})" if self.replicas > 1 else ""
        return f"rank {self.rows[self.replica][self.rank]}{place}"

    def row_group(self, timeout: timedelta, places: Sequence[int] | None = None) -> dist.ProcessGroup | None:
        """A new group of these places (all, if None) of this process's replica; None if it is not among them. All
        processes call this together."""
        chosen = range(self.ranks) if places is None else places
        return _group([[row[place] for place in chosen] for row in self.rows], timeout)

    def replica_group(self, timeout: timedelta) -> dist.ProcessGroup:
        """A new group of the processes that have this one's place in their replicas."""
        found = _group([list(column) for column in zip(*self.rows, strict=True)], timeout)
        assert found is not None
        return found

    def sequence_group(self, timeout: timedelta) -> dist.ProcessGroup:
        """A new group of the processes that share this one's sequences, in the order of their tokens."""
        found = _group(
            [
                [self.rows[first + part][place] for part in range(self.parts)]
                for first in range(0, self.replicas, self.parts)
                for place in range(self.ranks)
            ],
            timeout,
        )
        assert found is not None
        return found


def timed_mesh(device: str, shape: Sequence[int], names: Sequence[str], timeout: timedelta) -> DeviceMesh:
    """``init_device_mesh``, but its groups' collectives wait ``timeout`` and not half an hour. All processes call this
    together."""
    places = torch.arange(math.prod(shape)).reshape(tuple(shape))
    groups = []
    for axis, size in enumerate(shape):
        found = _group(places.movedim(axis, -1).reshape(-1, size).tolist(), timeout)
        assert found is not None
        groups.append(found)
    return DeviceMesh.from_group(groups, device, places, mesh_dim_names=tuple(names))


def _group(partition: list[list[int]], timeout: timedelta) -> dist.ProcessGroup | None:
    new_groups: Any = dist.new_subgroups_by_enumeration  # torch has no types for it
    found: dist.ProcessGroup | None = new_groups(partition, timeout=timeout)[0]
    return found


def summed(value: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """``value``, added up in place over a group."""
    dist.all_reduce(value, group=group)
    return value
