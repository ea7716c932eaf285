"""Token-wise splits in the simulator, by hand, and in the choice: shares beat whole values where the link is short."""

from __future__ import annotations

from dataclasses import replace

import pytest
from effcc.passes.activation.candidates import evaluate
from effcc.passes.activation.host_link import HostLink
from effcc.passes.activation.problem import JointProblem, Op, Value
from effcc.passes.activation.search import ActivationSearch
from effcc.passes.activation.simulate import Simulator

TOKENS = 8


class Maker:
    """A joint graph op by op; forward ops are row-wise unless told otherwise."""

    def __init__(self) -> None:
        self.values: list[Value] = []
        self.ops: list[Op] = []
        self.rows: set[int] = set()

    def given(self, name: str, size: int) -> int:
        self.values.append(Value(len(self.values), name, 0, size, -1))
        return self.values[-1].id

    def op(
        self, name: str, size: int, reads: tuple[int, ...], seconds: float, forward: bool = True, rows: bool = True
    ) -> int:
        index, made = len(self.ops), len(self.values)
        self.values.append(Value(made, name, 0, size, index))
        layer = name.rpartition(".")[0]
        self.ops.append(Op(index, name, "op", reads, (made,), seconds, forward, False, False, False, module=layer))
        if forward and rows:
            self.rows.add(index)
        return made

    def problem(self, x: int, tangent: int, out: int, results: tuple[int, ...]) -> JointProblem:
        users: dict[int, tuple[int, ...]] = {}
        for op in self.ops:
            for v in op.reads:
                users[v] = (*users.get(v, ()), op.index)
        return JointProblem(
            tuple(self.ops), tuple(self.values), frozenset({x}), frozenset({tangent}), (out,), results,
            frozenset(), self.values[x].bytes, users, {v.node: (v.id,) for v in self.values},
            row_reads={index: frozenset(self.ops[index].reads) for index in self.rows},
            divisible=frozenset(v for index in self.rows for v in self.ops[index].writes),
            tokens=TOKENS,
        )  # fmt: skip


def chain(backward_reads_a: bool = False, rows_of_a: bool = True) -> tuple[JointProblem, dict[str, int]]:
    """x -> a -> b -> out; the backward reads b, and ``a`` if told."""
    m = Maker()
    x, tangent = m.given("x", 40), m.given("tangent", 8)
    a = m.op("a", 400, (x,), 2.0, rows=rows_of_a)
    b = m.op("b", 800, (a,), 4.0)
    out = m.op("out", 8, (b,), 1.0)
    d = m.op("d", 16, (tangent, b), 1.0, forward=False)
    e = m.op("e", 32, (d, a) if backward_reads_a else (d,), 1.0, forward=False)
    return m.problem(x, tangent, out, (e,)), {"a": a, "b": b, "out": out, "e": e}


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_rows_that_are_not_swapped_are_computed_again(quarters: int) -> None:
    problem, at = chain()
    run = evaluate(Simulator(problem), frozenset(), frozenset({at["b"]}), frozenset({(at["b"], quarters)}))
    rest = 1 - quarters / 4
    assert run.simulation.extra_seconds == pytest.approx(rest * (2.0 + 4.0))
    assert run.bytes_away(problem.values) == 200 * quarters
    again = {problem.ops[entry.op].name: i for i, entry in enumerate(run.simulation.entries) if entry.again}
    assert list(again) == ["a", "b"]
    memory = run.simulation.memory
    # x, out, tangent, the rest of a; then both parts of b, and the whole that they are joined in.
    assert memory[again["a"]] == 40 + 8 + 8 + rest * 400
    assert memory[again["b"]] == 40 + 8 + 8 + rest * 400 + 800 + 800
    assert memory[again["b"] + 1] == 40 + 8 + 8 + 800 + 16


def test_what_the_rows_need_whole_is_made_whole() -> None:
    for reads_a, rows_of_a in ((True, True), (False, False)):
        problem, at = chain(reads_a, rows_of_a)
        run = evaluate(Simulator(problem), frozenset(), frozenset({at["b"]}), frozenset({(at["b"], 3)}))
        assert run.simulation.extra_seconds == pytest.approx(2.0 + 0.25 * 4.0)
    problem, at = chain()
    kept = evaluate(Simulator(problem), frozenset({at["a"]}), frozenset({at["b"]}), frozenset({(at["b"], 3)}))
    assert kept.simulation.extra_seconds == pytest.approx(0.25 * 4.0)
    assert kept.saved == {at["a"]}


def test_a_split_costs_what_two_values_would() -> None:
    """The same step with every value cut in two by hand: same seconds, same bytes on the host."""
    problem, at = chain()
    split = evaluate(Simulator(problem), frozenset(), frozenset({at["b"]}), frozenset({(at["b"], 1)}))
    m = Maker()
    x, tangent = m.given("x", 40), m.given("tangent", 8)
    a = [m.op(f"a{i}", int(400 * share), (x,), 2.0 * share) for i, share in enumerate((0.25, 0.75))]
    b = [m.op(f"b{i}", int(800 * share), (a[i],), 4.0 * share) for i, share in enumerate((0.25, 0.75))]
    out = m.op("out", 8, (*b,), 1.0)
    d = m.op("d", 16, (tangent, *b), 1.0, forward=False)
    e = m.op("e", 32, (d,), 1.0, forward=False)
    parts = m.problem(x, tangent, out, (e,))
    by_hand = evaluate(Simulator(parts), frozenset(), frozenset({b[0]}))
    assert split.simulation.extra_seconds == pytest.approx(by_hand.simulation.extra_seconds)
    assert split.bytes_away(problem.values) == by_hand.bytes_away(parts.values)


def layers(count: int) -> JointProblem:
    """Layers that keep one value each, which may go to the host beside the ops, or be computed again."""
    m = Maker()
    x, tangent = m.given("x", 8), m.given("tangent", 8)
    saved: list[tuple[int, int]] = []
    current = x
    for i in range(count):
        wide = m.op(f"layers.{i}.wide", 1 << 20, (current,), 1.0)
        current = m.op(f"layers.{i}.out", 8, (wide,), 0.2)
        saved.append((wide, current))
    gradient, results = tangent, []
    for i in reversed(range(count)):
        gradient = m.op(f"layers.{i}.back", 8, (gradient, saved[i][0]), 1.0, forward=False)
        results.append(gradient)
    return m.problem(x, tangent, current, tuple(results))


def test_shares_beat_whole_values_where_the_link_is_short() -> None:
    problem = layers(12)
    # In a layer's forward a third of what it makes leaves.
    rate = (1 << 20) / 3.0
    link = HostLink(out=rate, back=rate, latency=0.0, capacity=1 << 40, overlapped=True)
    with_shares = ActivationSearch(problem, link=link)
    without = ActivationSearch(replace(problem, divisible=frozenset()), link=link)
    faster = 0
    seconds: list[float] = []
    for megabytes in range(4, 10):
        limit = megabytes << 20
        found, whole = with_shares.within(limit), without.within(limit)
        assert found is not None and whole is not None
        assert found.peak <= limit and with_shares.bound(limit) <= found.seconds + 1e-9
        assert found.seconds <= whole.seconds + 1e-9
        seconds.append(found.seconds)
        faster += bool(found.shares) and found.seconds < whole.seconds - 1e-6
    assert faster > 2
    assert seconds == sorted(seconds, reverse=True)
