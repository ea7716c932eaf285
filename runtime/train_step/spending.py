"""What the bytes between the least that a step needs and its budget are spent on.

Each way to spend them makes the step hold at most so many bytes more, at any moment, than the least; so any choice of
ways whose bytes together are within the difference keeps the budget. They are taken by seconds saved per byte.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ...formatting import bytes_text
from .replay import Block
from .residency import Home

#: Bytes a second of a tier that nothing has been measured of.
USUAL_BANDWIDTH = 1e9
#: Share of the difference that copies in flight may hold at most, and how many of the largest tensor are worth while.
WINDOW_SHARE, WINDOW_TENSORS = 0.25, 4


@dataclass(frozen=True)
class Rehearsed:
    """The step with the least memory. Bytes: ``floor`` is its peak, everything counted; ``saved`` and
    ``replay_saved`` what it saves for the backward outside of replays and, at most, within one. ``holders``: what
    holds the peak, in words."""

    floor: int
    saved: int
    replay_saved: int
    bandwidth: float
    holders: str


@dataclass
class Spending:
    """What a step does under its budget. None for a room: all may stay."""

    floor: int = 0
    kept: list[Home] = field(default_factory=list)
    replayed: list[Block] = field(default_factory=list)
    room: int | None = None
    replay_room: int | None = None
    window: int = 0

    def __str__(self) -> str:
        kept = sum(home.bytes for home in self.kept)
        words = [f"the least that works is {bytes_text(self.floor)}"] if self.floor else []
        words.append(f"{bytes_text(kept)} of parameters and optimizer state stay in memory")
        if self.replayed:
            words.append(f"{len(self.replayed)} blocks run again in the backward")
        if self.room is not None:
            words.append(f"{bytes_text(self.room)} of saved values stay")
        if self.window:
            words.append(f"copies run ahead within {bytes_text(self.window)}")
        return ", ".join(words)


def least(blocks: Iterable[Block], swap: bool) -> Spending:
    """Everything that can leave does, and every block runs again."""
    rooms = (0, 0) if swap else (None, None)
    return Spending(replayed=list(blocks), room=rooms[0], replay_room=rooms[1])


def spend(budget: int, rehearsed: Rehearsed, blocks: list[Block], homes: list[Home], swap: bool) -> Spending:
    """The best use of ``budget`` bytes, at least the floor."""
    left = budget - rehearsed.floor
    chosen = least(blocks, swap)
    chosen.floor = rehearsed.floor
    if swap:
        largest = max((home.bytes for home in homes), default=0)
        # Values within a replay are all but free to keep: every block uses the same room in turn.
        chosen.replay_room = min(left, rehearsed.replay_saved)
        left -= chosen.replay_room
        chosen.window = min(int(left * WINDOW_SHARE), WINDOW_TENSORS * largest)
        left -= chosen.window
    for _, size, item in sorted(_ways(rehearsed, blocks, homes, swap), key=lambda way: -way[0]):
        if isinstance(item, Block) and size <= left:
            chosen.replayed.remove(item)
            if chosen.room is not None:
                chosen.room += size
            left -= size
        elif isinstance(item, Home) and size <= left:
            chosen.kept.append(item)
            left -= size
        elif item is None and chosen.room is not None:
            chosen.room += min(size, left)
            left -= min(size, left)
    return chosen


def _ways(
    rehearsed: Rehearsed, blocks: list[Block], homes: list[Home], swap: bool
) -> Iterable[tuple[float, int, Block | Home | None]]:
    """(seconds saved per byte, bytes, what stays). A replay costs its forward; a parameter is read for the forward,
    the replay and the backward and written after its update; a state is read and written; a saved value likewise."""
    for block in blocks:
        if block.saved_bytes:
            yield block.seconds / block.saved_bytes, block.saved_bytes, block
    if swap:
        for home in homes:
            yield (2 if home.is_state else 4) / rehearsed.bandwidth, home.bytes, home
        yield 2 / rehearsed.bandwidth, rehearsed.saved, None
