"""Exact liveness of a step for a given set of saved values: what is materialized when, at which op memory peaks.

The forward runs in the joint graph's order. The backward does too, and what it needs of the forward but was not saved
is recomputed right before its first use, once. Results of ops that are inlined into generated kernels take no memory
where only generated kernels read them; what they read then lives until those kernels have run.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from .host_link import Copy, HostLink, copy_windows
from .phase import Phase
from .problem import JointProblem, Op
from .token_shares import Shares, rows_away

#: How many simulations are remembered.
REMEMBERED = 256


class Entry(NamedTuple):
    """One run of an op. ``again``: it runs for the second time, or (``fetched``) its result comes from the host."""

    op: int
    backward: bool
    again: bool
    fetched: bool = False


@dataclass(frozen=True)
class Simulation:
    """``memory[i]`` are the bytes in use while ``entries[i]`` runs, everything counted. ``recomputed``: ops that run
    twice, generated ones included. ``saved``: values kept that the backward really uses. ``at``: for each op of the
    backward, the most memory from the end of the op before it to its own end."""

    entries: tuple[Entry, ...]
    memory: tuple[int, ...]
    peak: int
    peak_entry: int
    extra_seconds: float
    recomputed: frozenset[int]
    saved: frozenset[int]
    swapped: frozenset[int]
    at: tuple[int, ...]
    #: (value, first and last entry at which it is in memory).
    lives: tuple[tuple[int, int, int], ...]
    #: Seconds that the step waits for copies, or makes them.
    stall: float = 0.0
    #: (value, entry at whose beginning its copy from the host begins), by the time of the copies.
    issued: tuple[tuple[int, int], ...] = ()
    #: Op -> share of its rows that run again, where it is not all of them.
    portions: Mapping[int, float] = field(default_factory=dict)
    #: Swapped values of which only some rows are on the host, and the quarters of the rows that are.
    shares: Shares = frozenset()

    def portion(self, op: int) -> float:
        """Share of an op that runs again."""
        return self.portions.get(op, 1.0 if op in self.recomputed else 0.0)

    def live_at(self, position: int) -> tuple[int, ...]:
        """Values in memory while ``entries[position]`` runs."""
        return tuple(value for value, begin, end in self.lives if begin <= position <= end)

    @property
    def live_at_peak(self) -> tuple[int, ...]:
        return self.live_at(self.peak_entry)

    @property
    def forward_peak(self) -> int:
        return max((m for e, m in zip(self.entries, self.memory, strict=True) if not e.backward), default=0)


class Simulator:
    """``link``: the way to the host; None: values that are swapped leave and come back in no time."""

    def __init__(self, problem: JointProblem, link: HostLink | None = None) -> None:
        self.problem, self.link = problem, link
        self.forward_ops = [op for op in problem.ops if op.forward]
        self.backward_ops = [op for op in problem.ops if not op.forward]
        self.made_forward = {v for op in self.forward_ops for v in op.writes}
        self.outputs = frozenset(problem.forward_outputs) | frozenset(problem.backward_outputs)
        #: What the caller is given by the forward is in memory in any case: keeping it for the backward is free.
        self.handed_out = frozenset(problem.forward_outputs) & self.made_forward
        #: Values of the forward that the backward reads or hands out.
        read = [v for op in self.backward_ops for v in op.reads]
        self.asked = [v for v in dict.fromkeys([*read, *problem.backward_outputs]) if v in self.made_forward]
        #: Ops whose results must be kept if they are needed, by their place.
        self._fixed = [op.banned or not problem.overwritten.isdisjoint(op.reads) for op in problem.ops]
        self._bytes = [value.bytes for value in problem.values]
        self.given = problem.primals | problem.tangents | {v.id for v in problem.values if v.op < 0}
        #: By value: the op of the forward that makes it, or -1; and whether it is kept wherever it is needed.
        self._maker = [value.op if value.id in self.made_forward else -1 for value in problem.values]
        self._held = [
            maker >= 0 and (value.id in self.handed_out or self._fixed[maker])
            for value, maker in zip(problem.values, self._maker, strict=True)
        ]
        self._untouchable = self.given | self.outputs
        #: For each op its entries: of the forward, of the backward, run again, and with its result fetched.
        self._entries = [
            (Entry(i, False, False), Entry(i, True, False), Entry(i, True, True), Entry(i, True, True, True))
            for i in range(len(problem.ops))
        ]
        #: What the forward runs whatever is saved.
        acting = [op for op in self.forward_ops if not op.writes]
        self._always = {op.index for op in acting}
        self._extend(self._always, [*problem.forward_outputs, *(v for op in acting for v in op.reads)])
        #: The last choices that were simulated: several searches ask for the same ones.
        self._known: OrderedDict[tuple[frozenset[int], frozenset[int], Shares], Simulation] = OrderedDict()

    def closure(self, saved: frozenset[int]) -> tuple[frozenset[int], frozenset[int]]:
        """Ops of the forward that the backward runs again if ``saved`` is kept, and the kept values that it reads.

        A value whose op must not run again is kept whether or not it is in ``saved``, and so is what the caller holds.
        """
        again, used = self.portions(saved, {})
        return frozenset(again), used

    def portions(self, saved: frozenset[int], split: Mapping[int, float]) -> tuple[dict[int, float], frozenset[int]]:
        """Share of each op's rows that runs again where of the values in ``split`` that share of the rows is not kept,
        and the kept values that are read."""
        if not split:
            return self._whole(saved)
        problem = self.problem
        again: dict[int, float] = {}
        used: set[int] = set()
        waiting = [(v, 1.0) for v in self.asked]
        seen: dict[int, float] = {}
        while waiting:
            value, share = waiting.pop()
            if seen.get(value, 0.0) >= share:
                continue
            seen[value] = share
            if value not in self.made_forward:
                continue
            maker = problem.values[value].op
            if (value in saved and value not in split) or value in self.handed_out or self._fixed[maker]:
                used.add(value)
                continue
            share = split.get(value, share) if maker in problem.row_reads else 1.0
            if again.get(maker, 0.0) < share:
                again[maker] = share
                by_rows = problem.row_reads.get(maker, ())
                waiting += [(v, share if v in by_rows else 1.0) for v in problem.ops[maker].reads]
        return again, frozenset(used)

    def _whole(self, saved: frozenset[int]) -> tuple[dict[int, float], frozenset[int]]:
        """``portions`` where nothing is split."""
        ops, makers, held = self.problem.ops, self._maker, self._held
        again: dict[int, float] = {}
        used: set[int] = set()
        seen: set[int] = set()
        waiting = [*self.asked]
        while waiting:
            value = waiting.pop()
            if value in seen:
                continue
            seen.add(value)
            maker = makers[value]
            if maker < 0:
                continue
            if value in saved or held[value]:
                used.add(value)
            elif maker not in again:
                again[maker] = 1.0
                waiting += ops[maker].reads
        return again, frozenset(used)

    def fixed(self, op: Op) -> bool:
        """Whether the op's results must be kept if they are needed."""
        return self._fixed[op.index]

    def run(
        self, saved: frozenset[int], swapped: frozenset[int] = frozenset(), shares: Shares = frozenset()
    ) -> Simulation:
        """The step if ``saved`` is kept, and ``swapped`` spends the time between its uses on the host; of those in
        ``shares`` only some rows do, and the others are computed again."""
        key = saved, swapped, shares
        found = self._known.pop(key, None)
        self._known[key] = found = found or self._simulated(*key)
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return found

    def _simulated(self, saved: frozenset[int], swapped: frozenset[int], shares: Shares) -> Simulation:
        problem = self.problem
        again, used, split = self._split(saved | swapped, dict(shares))
        away = used & swapped
        needed_forward = self._needed(used | set(split))
        entries: list[Entry] = []
        touched: list[tuple[int, ...]] = []
        written: list[tuple[int, ...]] = []
        ops, kinds = problem.ops, self._entries
        # Forward.
        keep = used | frozenset(problem.forward_outputs) | frozenset(split)
        forward = Phase(problem, [op for op in self.forward_ops if op.index in needed_forward], keep, self.given)
        for op in forward.ops:
            index = op.index
            if forward.stored[index]:
                entries.append(kinds[index][0])
                touched.append(forward.sources[index])
                written.append(op.writes)
        # Backward: the order of its ops, with recomputation at first need.
        ready = set(used - away) | self.given
        order = [ops[index] for index in sorted(again)]
        kept = frozenset(problem.backward_outputs) | frozenset(split)
        backward = Phase(problem, [*order, *self.backward_ops], kept, self.given | used)
        done: set[int] = set()
        marks: list[int] = []
        for op in self.backward_ops:
            index = op.index
            if not backward.stored[index]:
                continue
            sources = backward.sources[index]
            if not ready.issuperset(sources):
                for maker, fetched in self._missing(sources, ready, done, backward, away):
                    entries.append(kinds[maker][2 if fetched is None else 3])
                    touched.append(backward.sources[maker] if fetched is None else ())
                    written.append(ops[maker].writes if fetched is None else (fetched,))
            marks.append(len(entries))
            entries.append(kinds[index][1])
            touched.append(sources)
            written.append(op.writes)
            ready.update(op.writes)
        found = self._measure(entries, touched, written, marks, again, used - away, away, split)
        return replace(found, shares=frozenset((v, q) for v, q in shares if v in split)) if shares else found

    def _split(
        self, kept: frozenset[int], quarters: dict[int, int]
    ) -> tuple[dict[int, float], frozenset[int], dict[int, int]]:
        """What runs again, what is read of the kept values, and the bytes of each split value that go to the host. A
        value is split only where nothing makes its op run again whole."""
        tokens = self.problem.tokens
        rows = {v: rows_away(tokens, q) for v, q in quarters.items() if v in kept and v in self.problem.divisible}
        rest = {v: 1.0 - count / tokens for v, count in rows.items()}
        again, used = self.portions(kept, rest)
        while whole := [v for v in rest if again.get(self.problem.values[v].op, 0.0) not in (0.0, rest[v])]:
            rest = {v: share for v, share in rest.items() if v not in whole}
            again, used = self.portions(kept, rest)
        made = {v for v in rest if self.problem.values[v].op in again}
        return again, used, {v: self.problem.values[v].bytes // tokens * rows[v] for v in made}

    def _missing(
        self, sources: Iterable[int], ready: set[int], done: set[int], phase: Phase, away: frozenset[int]
    ) -> list[tuple[int, int | None]]:
        """Ops to run again, in order, so that ``sources`` are at hand; with a value: that is fetched instead."""
        found: list[tuple[int, int | None]] = []
        stack = [(v, False) for v in reversed([*sources])]
        while stack:
            value, opened = stack.pop()
            if value in ready:
                continue
            maker = self.problem.values[value].op
            if value in away:
                found.append((maker, value))
                ready.add(value)
                continue
            if opened:
                if maker not in done:
                    done.add(maker)
                    found.append((maker, None))
                ready.update(self.problem.ops[maker].writes)
                continue
            stack.append((value, True))
            stack += [(v, False) for v in reversed(phase.sources[maker]) if v not in ready]
        return found

    def _needed(self, used: frozenset[int]) -> set[int]:
        """Ops that the forward runs: for its outputs, for what is saved, and those that act."""
        needed = set(self._always)
        self._extend(needed, [*used])
        return needed

    def _extend(self, needed: set[int], waiting: list[int]) -> None:
        """Add the ops of the forward that make the values in ``waiting``, and what those read."""
        ops, makers = self.problem.ops, self._maker
        while waiting:
            maker = makers[waiting.pop()]
            if maker >= 0 and maker not in needed:
                needed.add(maker)
                waiting += ops[maker].reads

    def _measure(
        self,
        entries: list[Entry],
        touched: list[tuple[int, ...]],
        written: list[tuple[int, ...]],
        marks: list[int],
        again: dict[int, float],
        used: frozenset[int],
        away: frozenset[int],
        split: dict[int, int],
    ) -> Simulation:
        problem, values = self.problem, self.problem.values
        # Of what runs again for some rows, and is not put together with others, there is only so much.
        partly = [(op, share) for op, share in again.items() if share < 1.0]
        sizes = {v: int(values[v].bytes * s) for op, s in partly for v in problem.ops[op].writes if v not in split}

        count, many = len(entries), len(values)
        first_backward = next((i for i, e in enumerate(entries) if e.backward), count)
        # Each (value, run) has one interval, at value and (in the backward) at value + many; -1: it has none. A
        # recomputed value has one in the forward and one in the backward. ``runs``: those that have one.
        begin, end = [-1] * (2 * many), [-1] * (2 * many)
        runs: list[int] = []
        primals, tangents = problem.primals, problem.tangents
        for position, (entry, reads, writes) in enumerate(zip(entries, touched, written, strict=True)):
            base = many if entry.backward else 0
            for v in writes:
                key = v + base
                if begin[key] < 0:
                    begin[key] = position
                    runs.append(key)
                end[key] = position
            for v in reads:
                if v in primals:
                    continue
                key = v + base
                if begin[key] < 0:
                    if begin[v] >= 0:
                        key = v
                    else:  # a tangent: given when the backward begins
                        begin[key] = first_backward if v in tangents else position
                        runs.append(key)
                end[key] = position
        for v in used:
            if begin[v] >= 0:
                end[v] = max(end[v], first_backward - 1)
        for v in self.outputs:
            for key in (v, v + many):
                if begin[key] >= 0:
                    end[key] = count - 1
                    break
        joined = {v: begin[v + many] for v in split if begin[v + many] >= 0}
        stall, issued = self._copies(entries, again, away, split, first_backward, begin, end)
        change = [0] * (count + 1)
        # Bytes of each run.
        size = self._bytes * 2
        for v, held in sizes.items():
            size[v + many] = held
        reuse = self._reuse(entries, touched, written, end, used, size)
        for v, position in joined.items():  # the rows that come back, then the others too, and then both in one
            change[begin[v + many]] += split[v]
            begin[v + many] = position
            change[position] += values[v].bytes - split[v]
            change[position + 1] -= values[v].bytes
        for key in runs:
            change[begin[key]] += size[key]
            change[end[key] + 1] -= size[key]
        change[0] += problem.constant
        memory = [live - saving for live, saving in zip(itertools.accumulate(change[:count]), reuse, strict=True)]
        peak = max(memory, default=problem.constant)
        where = memory.index(peak) if memory else 0
        at: list[int] = []
        previous = first_backward
        for mark in marks:
            at.append(max(memory[previous : mark + 1]))
            previous = mark + 1
        return Simulation(
            entries=tuple(entries),
            memory=tuple(memory),
            peak=peak,
            peak_entry=where,
            extra_seconds=sum(problem.ops[index].seconds * share for index, share in again.items()),
            recomputed=frozenset(again),
            saved=used,
            swapped=away | frozenset(split),
            at=tuple(at),
            lives=tuple([(key if key < many else key - many, begin[key], end[key]) for key in runs]),
            stall=stall,
            issued=issued,
            portions={index: share for index, share in again.items() if share < 1.0},
        )

    def _copies(
        self,
        entries: list[Entry],
        again: dict[int, float],
        away: frozenset[int],
        split: dict[int, int],
        backward: int,
        begin: list[int],
        end: list[int],
    ) -> tuple[float, tuple[tuple[int, int], ...]]:
        """Seconds that copies take from the step, and when values come back. Their lives are set accordingly."""
        values, many = self.problem.values, len(self.problem.values)
        fetched = {v: begin[v + many] for v in (*away, *split) if begin[v + many] >= 0}
        if self.link is None or not fetched:
            return 0.0, ()
        share = [0.0 if e.fetched else again.get(e.op, 1.0) if e.again else 1.0 for e in entries]
        seconds = [self.problem.ops[entry.op].seconds * part for entry, part in zip(entries, share, strict=True)]
        moved = {v: split.get(v, values[v].bytes) for v in fetched}
        copies = [Copy(v, moved[v], begin[v], used) for v, used in sorted(fetched.items())]
        windows = copy_windows(seconds, backward, copies, self.link)
        for copy in copies:
            begin[copy.value + many] = windows.issued[copy.value]
            end[copy.value] = max(end[copy.value], windows.released[copy.value])
        return windows.stall, tuple(sorted(windows.issued.items(), key=lambda item: fetched[item[0]]))

    def _reuse(
        self,
        entries: list[Entry],
        touched: list[tuple[int, ...]],
        written: list[tuple[int, ...]],
        end: list[int],
        used: frozenset[int],
        size: list[int],
    ) -> list[int]:
        """Bytes by which each op needs less, because it writes over an equally large value that it is the last to
        read. Generated kernels do that, save with what their graph is lent: inputs, and gradients of the outputs. What
        the forward has kept is the backward's own: autograd gives it up as it calls it."""
        ops, many, untouchable = self.problem.ops, len(size) // 2, self._untouchable
        saving = [0] * len(entries)
        for position, entry in enumerate(entries):
            if not ops[entry.op].fused:
                continue
            base = many if entry.backward else 0
            dying: list[int] = []
            for v in touched[position]:
                again, first = end[v + many], end[v]
                if (again if again > first else first) != position or v in untouchable:
                    continue
                if base and again >= 0:
                    dying.append(size[v + many])
                elif not base or v in used:
                    dying.append(size[v])
            if not dying:
                continue
            for v in written[position]:
                room = size[v + base]
                if room in dying:
                    dying.remove(room)
                    saving[position] += room
        return saving
