"""The published schedules with one or more stages a rank, without vocabulary passes.

Sources: GPipe (Huang et al., 2019); 1F1B (PipeDream-Flush, Narayanan et al., 2021a); interleaved 1F1B (Narayanan et
al., Efficient large-scale language model training, 2021b); ZB-H1 (Qi et al., Zero bubble pipeline parallelism, 2024).
"""

from __future__ import annotations

from ...errors import ScheduleError
from .schedule import Pass, Schedule


def gpipe(ranks: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards, in the order of the microbatches."""
    _check_sizes(ranks, microbatches)
    orders = tuple(
        tuple(Pass(kind, rank, index) for kind in "FB" for index in range(microbatches)) for rank in range(ranks)
    )
    return Schedule("gpipe", microbatches, tuple(range(ranks)), orders)


def one_forward_one_backward(ranks: int, microbatches: int, extra: int = 0) -> Schedule:
    """1F1B: rank r runs ``ranks - r`` forwards (``extra`` more, if wanted), then one backward and one forward in
    turn."""
    _check_sizes(ranks, microbatches)
    orders = []
    for rank in range(ranks):
        warm = min(ranks - rank - 1 + extra, microbatches)
        order = [Pass("F", rank, index) for index in range(warm)]
        for index in range(microbatches):
            if index + warm < microbatches:
                order.append(Pass("F", rank, index + warm))
            order.append(Pass("B", rank, index))
        orders.append(tuple(order))
    return Schedule("1f1b", microbatches, tuple(range(ranks)), tuple(orders))


def interleaved(ranks: int, microbatches: int, chunks: int = 2) -> Schedule:
    """Interleaved 1F1B: rank r has the stages r, r + ranks, ...; microbatches go through in rounds of ``ranks``.

    Raises ScheduleError when the microbatches are not a multiple of the ranks.
    """
    _check_sizes(ranks, microbatches)
    if microbatches % ranks:
        below, above = microbatches // ranks * ranks, (microbatches // ranks + 1) * ranks
        raise ScheduleError(
            f"interleaved 1F1B runs microbatches in rounds of {ranks}; {microbatches} is no multiple of it",
            remedy=f"take {below or above} or {above} microbatches",
        )
    total = microbatches * chunks

    def place(step: int, forward: bool) -> tuple[int, int]:
        """Chunk and microbatch of the step-th forward or backward of a rank."""
        round_, within = divmod(step, ranks * chunks)
        chunk, offset = divmod(within, ranks)
        return (chunk if forward else chunks - 1 - chunk), round_ * ranks + offset

    orders = []
    for rank in range(ranks):
        warm = min((chunks - 1) * ranks + 2 * (ranks - 1 - rank), total)
        order: list[Pass] = []
        for step in range(total + warm):
            if step < total:
                chunk, microbatch = place(step, True)
                order.append(Pass("F", chunk * ranks + rank, microbatch))
            if step >= warm:
                chunk, microbatch = place(step - warm, False)
                order.append(Pass("B", chunk * ranks + rank, microbatch))
        orders.append(tuple(order))
    placement = tuple(stage % ranks for stage in range(ranks * chunks))
    return Schedule("interleaved", microbatches, placement, tuple(orders))


def zero_bubble_h1(ranks: int, microbatches: int) -> Schedule:
    """ZB-H1: 1F1B with backward split; rank r lets r weight gradients wait, which fill its bubble at the end. The live
    microbatches stay at 1F1B's."""
    _check_sizes(ranks, microbatches)
    orders = []
    for rank in range(ranks):
        warm = min(ranks - rank - 1, microbatches)
        order = [Pass("F", rank, index) for index in range(warm)]
        written = 0
        for index in range(microbatches):
            if index + warm < microbatches:
                order.append(Pass("F", rank, index + warm))
            order.append(Pass("I", rank, index))
            if index >= rank:
                order.append(Pass("W", rank, written))
                written += 1
        order += [Pass("W", rank, index) for index in range(written, microbatches)]
        orders.append(tuple(order))
    return Schedule("zb-h1", microbatches, tuple(range(ranks)), tuple(orders))


def _check_sizes(ranks: int, microbatches: int) -> None:
    if ranks < 1 or microbatches < 1:
        raise ScheduleError(
            f"a pipeline of {ranks} ranks and {microbatches} microbatches", remedy="both must be at least 1"
        )
