"""Exact liveness of a step for a given set of saved values: what is materialized when, at which op memory peaks.

The forward runs in the joint graph's order. The backward does too, and what it needs of the forward but was not saved
is recomputed right before its first use, once. Results of ops that are inlined into generated kernels take no memory
where only generated kernels read them; what they read then lives until those kernels have run.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
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
        # Forward.
        keep = used | frozenset(problem.forward_outputs) | frozenset(split)
        forward = Phase(problem, [op for op in self.forward_ops if op.index in needed_forward], keep, self.given)
        for op in forward.ops:
            if forward.stored[op.index]:
                entries.append(Entry(op.index, False, False))
                touched.append(forward.sources[op.index])
                written.append(op.writes)
        # Backward: the order of its ops, with recomputation at first need.
        ready = set(used - away) | self.given
        order = [op for op in problem.ops if op.index in again]
        kept = frozenset(problem.backward_outputs) | frozenset(split)
        backward = Phase(problem, [*order, *self.backward_ops], kept, self.given | used)
        done: set[int] = set()
        marks: list[int] = []
        for op in self.backward_ops:
            if not backward.stored[op.index]:
                continue
            sources = backward.sources[op.index]
            if not ready.issuperset(sources):
                for maker, fetched in self._missing(sources, ready, done, backward, away):
                    entries.append(Entry(maker, True, True, fetched is not None))
                    touched.append(backward.sources[maker] if fetched is None else ())
                    written.append(problem.ops[maker].writes if fetched is None else (fetched,))
            entries.append(Entry(op.index, True, False))
            touched.append(sources)
            written.append(op.writes)
            ready.update(op.writes)
            marks.append(len(entries) - 1)
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
        problem = self.problem
        waiting = [*problem.forward_outputs, *used]
        waiting += [v for op in self.forward_ops if not op.writes for v in op.reads]
        needed = {op.index for op in self.forward_ops if not op.writes}
        seen: set[int] = set()
        while waiting:
            value = waiting.pop()
            if value in seen:
                continue
            seen.add(value)
            maker = problem.values[value].op
            if maker >= 0 and maker not in needed and problem.ops[maker].forward:
                needed.add(maker)
                waiting.extend(problem.ops[maker].reads)
        return needed

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

        whole = self._bytes

        def size(key: tuple[int, bool]) -> int:
            return sizes.get(key[0], whole[key[0]]) if sizes and key[1] else whole[key[0]]

        count = len(entries)
        first_backward = next((i for i, e in enumerate(entries) if e.backward), count)
        # Each (value, run) has one interval; a recomputed value has one in the forward and one in the backward.
        begin: dict[tuple[int, bool], int] = {}
        end: dict[tuple[int, bool], int] = {}
        primals = problem.primals
        for position, (entry, reads, writes) in enumerate(zip(entries, touched, written, strict=True)):
            backward = entry.backward
            for v in writes:
                key = (v, backward)
                begin.setdefault(key, position)
                end[key] = position
            for v in reads:
                if v in primals:
                    continue
                key = (v, backward)
                if key not in begin:
                    key = (v, False) if (v, False) in begin else key
                if key not in begin:  # a tangent: given when the backward begins
                    begin[key] = first_backward if v in problem.tangents else position
                end[key] = position
        for v in used:
            if (v, False) in begin:
                end[v, False] = max(end[v, False], first_backward - 1)
        for v in self.outputs:
            for key in ((v, False), (v, True)):
                if key in begin:
                    end[key] = count - 1
                    break
        joined = {v: begin[v, True] for v in split if (v, True) in begin}
        stall, issued = self._copies(entries, again, away, split, first_backward, begin, end)
        change = [0] * (count + 1)
        reuse = self._reuse(entries, touched, written, end, used, size)
        for v, position in joined.items():  # the rows that come back, then the others too, and then both in one
            change[begin[v, True]] += split[v]
            begin[v, True] = position
            change[position] += values[v].bytes - split[v]
            change[position + 1] -= values[v].bytes
        for key, start in begin.items():
            held = size(key)
            change[start] += held
            change[end[key] + 1] -= held
        memory: list[int] = []
        live = problem.constant
        for position in range(count):
            live += change[position]
            memory.append(live - reuse[position])
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
            lives=tuple((key[0], start, end[key]) for key, start in begin.items()),
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
        begin: dict[tuple[int, bool], int],
        end: dict[tuple[int, bool], int],
    ) -> tuple[float, tuple[tuple[int, int], ...]]:
        """Seconds that copies take from the step, and when values come back. Their lives are set accordingly."""
        values = self.problem.values
        fetched = {v: begin[v, True] for v in (*away, *split) if (v, True) in begin}
        if self.link is None or not fetched:
            return 0.0, ()
        share = [0.0 if e.fetched else again.get(e.op, 1.0) if e.again else 1.0 for e in entries]
        seconds = [self.problem.ops[entry.op].seconds * part for entry, part in zip(entries, share, strict=True)]
        moved = {v: split.get(v, values[v].bytes) for v in fetched}
        copies = [Copy(v, moved[v], begin[v, False], used) for v, used in sorted(fetched.items())]
        windows = copy_windows(seconds, backward, copies, self.link)
        for copy in copies:
            begin[copy.value, True] = windows.issued[copy.value]
            end[copy.value, False] = max(end[copy.value, False], windows.released[copy.value])
        return windows.stall, tuple(sorted(windows.issued.items(), key=lambda item: fetched[item[0]]))

    def _reuse(
        self,
        entries: list[Entry],
        touched: list[tuple[int, ...]],
        written: list[tuple[int, ...]],
        end: dict[tuple[int, bool], int],
        used: frozenset[int],
        size: Callable[[tuple[int, bool]], int],
    ) -> list[int]:
        """Bytes by which each op needs less, because it writes over an equally large value that it is the last to
        read. Generated kernels do that, save with what their graph is lent: inputs, and gradients of the outputs. What
        the forward has kept is the backward's own: autograd gives it up as it calls it."""
        problem = self.problem
        saving = [0] * len(entries)
        for position, entry in enumerate(entries):
            if not problem.ops[entry.op].fused:
                continue
            dying = [
                size((v, entry.backward and (v, True) in end))
                for v in touched[position]
                if v not in self.given
                and v not in self.outputs
                and ((v, entry.backward) in end or v in used)
                and max(end.get((v, True), -1), end.get((v, False), -1)) == position
            ]
            for v in written[position]:
                room = size((v, entry.backward))
                if room in dying:
                    dying.remove(room)
                    saving[position] += room
        return saving
