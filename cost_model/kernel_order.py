"""The order of kernels that needs the least memory at once, as a model for CP-SAT.

Sets
    i in kernels, with those that must run before each;  t in positions 0 .. n-1
    v in values: bytes, the kernel that makes it (or: there from the start), the kernels that read it, whether it stays
Variables
    done[i,t] in {0,1}    kernel i runs at position t or before;  done[i,t] <= done[i,t+1]
    freed[v,t] in {0,1}   v is not held any more after position t
    peak >= 0             bytes held at once
Constraints
    sum_i done[i,t] = t + 1                                           one kernel at a time
    done[j,t] <= done[i,t-1]             i must run before j
    freed[v,t] <= done[u,t]              u reads v, or makes it;  freed[v,t] = 0 for what stays
    sum_v bytes[v] (done[maker(v),t] - freed[v,t-1]) <= peak
Objective
    least peak

Whole graphs are too long for it; they are improved in windows around their peak, each solved with what lies outside it
fixed (large-neighbourhood search). Bound: while a kernel runs, all is held that it or what must run before it made and
that it or what must run after it reads; the model's own bound where the whole graph is one window.

A linear program of this form with sizes in place of kernels is due to Kayaaslan et al. 2018 for trees; the windows are
ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

#: Kernels of a window, windows that are tried, and CP-SAT's deterministic seconds for each.
WINDOW, WINDOWS, EFFORT = 32, 4, 0.5
#: An order is exchanged for one that needs less by this share at least; one so near the bound is not improved.
WORTHWHILE = 0.002
#: Graphs that are left as they are: longer, or smaller in bytes.
LONGEST, SMALLEST = 4000, 1 << 20


@dataclass(frozen=True)
class Value:
    """``made``: the kernel that makes it, -1 for what is there at the start. ``kept``: it stays to the end. ``over``:
    values that it is written over, each if its maker is the last to read that one: it then needs no memory besides."""

    bytes: int
    made: int
    used: tuple[int, ...]
    kept: bool = False
    over: tuple[int, ...] = ()


@dataclass(frozen=True)
class OrderProblem:
    """Kernels 0 .. ``count`` - 1; ``before[i]`` must run before kernel i."""

    count: int
    before: tuple[tuple[int, ...], ...]
    values: tuple[Value, ...]


@dataclass(frozen=True)
class OrderAnswer:
    """``peak`` of the chosen order and ``given`` of the one that was there before; no order needs less than ``bound``.
    All are bytes. ``windows``: how often CP-SAT was asked."""

    order: tuple[int, ...]
    peak: int
    given: int
    bound: int
    windows: int = 0

    @property
    def gap(self) -> float:
        return (self.peak - self.bound) / self.peak if self.peak else 0.0


def use_over(problem: OrderProblem, order: Sequence[int]) -> list[int]:
    """Bytes held while each kernel of ``order`` runs, by position."""
    position = {kernel: at for at, kernel in enumerate(order)}
    change = [0] * (len(order) + 1)
    ends: list[int] = []
    for value in problem.values:
        first = position[value.made] if value.made >= 0 else 0
        change[first] += value.bytes
        ends.append(len(order))
        if not value.kept:
            ends[-1] = max([first, *(position[kernel] for kernel in value.used)])
            change[ends[-1] + 1] -= value.bytes
    for value in problem.values:
        for other in value.over:
            if ends[other] == position[value.made]:
                change[ends[other]] -= problem.values[other].bytes
                change[ends[other] + 1] += problem.values[other].bytes
                ends[other] = -1  # once only
                break
    held, running = [], 0
    for each in change[:-1]:
        running += each
        held.append(running)
    return held


def peak_of(problem: OrderProblem, order: Sequence[int]) -> int:
    return max(use_over(problem, order), default=0)


def lower_bound(problem: OrderProblem) -> int:
    """Bytes that every order holds at some moment."""
    earlier = _closure(problem.before)
    after: list[list[int]] = [[] for _ in range(problem.count)]
    for kernel, needed in enumerate(problem.before):
        for each in needed:
            after[each].append(kernel)
    # Bit sets: which kernels' results may be alive, and which kernels are still to come.
    best = sum(v.bytes for v in problem.values if v.made < 0)
    stays = sum(v.bytes for v in problem.values if v.kept)
    best = max(best, stays)
    later = _closure(tuple(tuple(each) for each in after))
    makers = [(1 << v.made) if v.made >= 0 else 0 for v in problem.values]
    readers = [sum(1 << u for u in set(v.used)) for v in problem.values]
    for kernel in range(problem.count):
        own = 1 << kernel
        past, future = earlier[kernel] | own, later[kernel] | own
        held = taken = 0
        room: set[int] = set()
        for value, maker, reader in zip(problem.values, makers, readers, strict=True):
            there = not maker or maker & past
            if there and (value.kept or reader & future or maker & own):
                held += value.bytes
            if value.over and maker & own:
                taken += value.bytes
                room.update(value.over)
        best = max(best, held - min(taken, sum(problem.values[other].bytes for other in room)))
    return best


def _closure(direct: Sequence[Sequence[int]]) -> list[int]:
    """Bit set of all that is reached from each kernel; ``direct`` has no circles."""
    found: list[int | None] = [None] * len(direct)
    for start in range(len(direct)):
        stack = [start]
        while stack:
            top = stack[-1]
            if found[top] is not None:
                stack.pop()
                continue
            missing = [each for each in direct[top] if found[each] is None]
            if missing:
                stack += missing
                continue
            total = 0
            for each in direct[top]:
                total |= (1 << each) | (found[each] or 0)
            found[top] = total
            stack.pop()
    return [each or 0 for each in found]


def choose_order(problem: OrderProblem, given: Sequence[int]) -> OrderAnswer:
    """The best order found, ``given`` (which must be a legal one) unless another needs clearly less. The same problem
    gets the same answer on every machine; without OR-Tools it is the given one."""
    held = use_over(problem, given)
    start = max(held, default=0)
    plain = OrderAnswer(tuple(given), start, start, 0)
    if not start >= SMALLEST or problem.count > LONGEST:
        return replace(plain, bound=min(start, lower_bound(problem)) if problem.count <= LONGEST else 0)
    bound = lower_bound(problem)
    order, peak, asked = list(given), start, 0
    tried: set[tuple[int, int]] = set()
    while peak * (1 - WORTHWHILE) > bound and asked < WINDOWS:
        held = use_over(problem, order)
        low = max(0, min(held.index(peak) - WINDOW // 2, problem.count - WINDOW))
        span = (low, min(low + WINDOW, problem.count))
        if span in tried:  # the same window once more would say the same: one that lies further on the other side
            at = held.index(peak)
            others = [(max(0, at - WINDOW + 2), max(0, at - WINDOW + 2) + WINDOW), (at - 1, at - 1 + WINDOW)]
            span = next(
                (
                    (max(0, a), min(b, problem.count))
                    for a, b in others
                    if (max(0, a), min(b, problem.count)) not in tried
                ),
                (0, 0),
            )
            if span == (0, 0):
                break
        answer = solve_window(problem, order, span)
        asked += 1
        if answer is None:
            break
        inside, proven = answer
        if span == (0, problem.count):
            bound = max(bound, proven)
        fresh = [*order[: span[0]], *inside, *order[span[1] :]]
        better = peak_of(problem, fresh)
        if better < peak:
            order, peak = fresh, better
            tried.clear()
        else:
            tried.add(span)
    if peak > start * (1 - WORTHWHILE):
        order, peak = list(given), start
    return OrderAnswer(tuple(order), peak, start, min(bound, peak), asked)


def solve_window(problem: OrderProblem, order: Sequence[int], span: tuple[int, int]) -> tuple[list[int], int] | None:
    """The kernels at positions ``span`` of ``order`` in the best order, all others fixed, and a bound on the peak
    inside; None without OR-Tools."""
    try:
        from ortools.sat.python import cp_model
    except ImportError:
        return None
    low, high = span
    kernels = list(order[low:high])
    length = len(kernels)
    index = {kernel: at for at, kernel in enumerate(kernels)}
    position = {kernel: at for at, kernel in enumerate(order)}
    model = cp_model.CpModel()
    done = [[model.new_bool_var(f"done[{i},{t}]") for t in range(length)] for i in range(length)]
    for i in range(length):
        for t in range(length - 1):
            model.add_implication(done[i][t], done[i][t + 1])
        model.add(done[i][-1] == 1)
        for needed in problem.before[kernels[i]]:
            if needed in index:
                model.add(done[i][0] == 0)
                for t in range(1, length):
                    model.add_implication(done[i][t], done[index[needed]][t - 1])
    for t in range(length):
        model.add(sum(row[t] for row in done) == t + 1)
    constant = 0
    use: list[list[object]] = [[] for _ in range(length)]
    for number, value in enumerate(problem.values):
        maker = index.get(value.made)
        last = max([position[kernel] for kernel in value.used] or [position.get(value.made, 0)])
        if (value.made >= 0 and position[value.made] >= high) or (not value.kept and last < low and maker is None):
            continue
        readers = [index[kernel] for kernel in dict.fromkeys(value.used) if kernel in index]
        ends = not value.kept and last < high
        if not ends and maker is None:
            constant += value.bytes
            continue
        freed = [model.new_bool_var(f"freed[{number},{t}]") for t in range(length)] if ends else []
        for t, variable in enumerate(freed):
            for each in [*readers, *([maker] if maker is not None else [])]:
                model.add_implication(variable, done[each][t])
        for t in range(length):
            use[t].append(value.bytes * (done[maker][t] if maker is not None else 1))
            if ends and t:
                use[t].append(-value.bytes * freed[t - 1])
    before = max(use_over(problem, order)[low:high])
    peak = model.new_int_var(0, before, "peak")
    for t in range(length):
        model.add(constant + sum(use[t]) <= peak)  # type: ignore[arg-type]
    model.minimize(peak)
    for i in range(length):
        for t in range(length):
            model.add_hint(done[i][t], t >= i)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.max_deterministic_time = EFFORT
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return kernels, 0
    begins = [next(t for t in range(length) if solver.value(row[t])) for row in done]
    return [kernels[i] for i in sorted(range(length), key=begins.__getitem__)], int(solver.best_objective_bound)


def size_of_model(problem: OrderProblem) -> dict[str, int]:
    """Variables and constraints of the model, were all kernels one window."""
    n, edges = problem.count, sum(len(each) for each in problem.before)
    ending = [value for value in problem.values if not value.kept]
    reads = sum(len(value.used) + (value.made >= 0) for value in ending)
    return {
        "kernels": n,
        "values": len(problem.values),
        "variables": n * n + len(ending) * n + 1,
        "constraints": n + n * max(n - 1, 0) + edges * n + reads * n + n,
    }
