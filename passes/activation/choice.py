"""What was chosen for the activations of one graph, and what it costs: for reports, plans and messages."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from .candidates import Candidate
from .problem import JointProblem
from .token_shares import QUARTERS, Shares


@dataclass(frozen=True)
class Row:
    """Values of one origin that meet one fate: ``keep``, ``recompute``, ``swap`` or ``swap 1/4 of`` (the tokens).
    ``what`` is a source line or an op, ``bytes`` their sum."""

    fate: str
    what: str
    module: str
    bytes: int
    count: int
    seconds: float


@dataclass(frozen=True)
class ActivationChoice:
    """``rule``: ``keep`` (as torch saves them) or ``planned``. Peaks are bytes, everything counted; ``seconds`` what
    the choice adds to a step of ``step_seconds``, both predicted; ``bound`` the least that any choice would add."""

    rule: str
    saved: frozenset[int]
    swapped: frozenset[int]
    budget: int | None
    simulated_peak: int
    plain_peak: int
    saved_bytes: int
    swapped_bytes: int
    plain_saved_bytes: int
    seconds: float
    step_seconds: float
    bound: float | None = None
    #: Bytes below which no choice could bring the simulated peak.
    floor_bound: int | None = None
    rows: tuple[Row, ...] = field(default=())
    #: Of ``swapped``, what is swapped for some tokens only, and for how many quarters of them.
    shares: Shares = frozenset()
    #: Names of the ops that run again in the backward.
    recomputed: frozenset[str] = frozenset()

    @property
    def gap(self) -> float | None:
        """How far the time may be from the best possible, as a share of the step."""
        if self.bound is None or not self.step_seconds:
            return None
        return max(0.0, self.seconds - self.bound) / self.step_seconds

    @property
    def price(self) -> float:
        """Predicted extra time as a share of the step."""
        return self.seconds / self.step_seconds if self.step_seconds else 0.0


def describe(
    problem: JointProblem,
    chosen: Candidate,
    plain: Candidate,
    rule: str,
    budget: int | None,
    bound: float | None = None,
    floor_bound: int | None = None,
) -> ActivationChoice:
    """``plain`` is what is kept without a budget; ``bound`` a lower bound on ``chosen.seconds``."""
    size = problem.values
    return ActivationChoice(
        rule=rule,
        saved=chosen.saved,
        swapped=chosen.swapped,
        budget=budget,
        simulated_peak=chosen.peak,
        plain_peak=plain.peak,
        saved_bytes=sum(size[v].bytes for v in chosen.saved),
        shares=chosen.shares,
        swapped_bytes=chosen.bytes_away(size),
        plain_saved_bytes=sum(size[v].bytes for v in plain.saved),
        # Torch's choice may itself be slower than need be; keeping it is what costs nothing.
        seconds=max(0.0, chosen.seconds - plain.seconds),
        step_seconds=problem.seconds + plain.seconds,
        bound=None if bound is None else max(0.0, bound - plain.seconds),
        floor_bound=floor_bound,
        rows=rows_of(problem, chosen, plain),
        recomputed=frozenset(problem.ops[index].name for index in chosen.simulation.recomputed),
    )


def rows_of(problem: JointProblem, chosen: Candidate, plain: Candidate) -> tuple[Row, ...]:
    """What is recomputed that would have been kept, and what is kept, by source line, layers counted together."""
    sums: dict[tuple[str, str, str], list[float]] = {}
    counts: Counter[tuple[str, str, str]] = Counter()
    gone = plain.saved - chosen.saved - chosen.swapped
    parts = {v: f"swap {quarters}/{QUARTERS} of" for v, quarters in chosen.shares}
    for fate_of_all, values in (("recompute", gone), ("swap", chosen.swapped), ("keep", chosen.saved)):
        for v in values:
            fate = parts.get(v, fate_of_all)
            entry = problem.values[v]
            if entry.op < 0 or not entry.bytes:
                continue
            op = problem.ops[entry.op]
            module = ".".join("*" if part.isdigit() else part for part in op.module.split("."))
            key = (fate, op.source or op.name, module)
            total = sums.setdefault(key, [0.0, 0.0])
            total[0] += entry.bytes
            total[1] += op.seconds * chosen.simulation.portion(entry.op) if fate not in ("swap", "keep") else 0.0
            counts[key] += 1
    rows = [
        Row(fate, what, module, int(size), counts[fate, what, module], seconds)
        for (fate, what, module), (size, seconds) in sums.items()
    ]
    return tuple(sorted(rows, key=lambda row: (row.fate == "keep", -row.bytes, row.what)))
