"""Offset assignment: against brute force on small problems, planted perfect packings, and an independent validator."""

from __future__ import annotations

import csv
import io
import itertools
import os
import random
from pathlib import Path

import numpy as np
import pytest
from effcc.cost_model.offset_assignment import csv_format
from effcc.cost_model.offset_assignment.exact import NO_SOLUTION, SOLVED, search
from effcc.cost_model.offset_assignment.greedy import place
from effcc.cost_model.offset_assignment.parts import split
from effcc.cost_model.offset_assignment.problem import Problem
from effcc.cost_model.offset_assignment.quick import first_fit
from effcc.cost_model.offset_assignment.reinsertion import reinsert
from effcc.cost_model.offset_assignment.restarts import Restarts, luby
from effcc.cost_model.offset_assignment.solver import solve
from effcc.cost_model.offset_assignment.windows import improve_window
from effcc.errors import MappingError
from effcc.ir.mapping_validator import validate_mapping
from hypothesis import given, settings
from hypothesis import strategies as st

Row = tuple[int, int, int, int]  # lower, upper, size, alignment


@pytest.fixture
def seed() -> int:
    """A fresh seed, shown when the test fails."""
    value = random.SystemRandom().randrange(1 << 30)
    print(f"seed {value}")
    return value


def problem(rows: list[Row], gaps: list[list[tuple[int, int, int, int]]] | None = None) -> Problem:
    columns = np.array(rows, np.int64).reshape(-1, 4).T
    return Problem(*(column.copy() for column in columns), gaps=gaps or ())


def check(p: Problem, offsets: np.ndarray, capacity: int) -> None:
    """The independent validator's opinion of a placement."""
    rows = []
    for b in range(p.size.size):
        gaps = " ".join(f"{begin}-{end}@{low}:{high}" for begin, end, low, high in p.gaps[b]) if p.gaps else ""
        values = {"lower": p.lower[b], "upper": p.upper[b], "size": p.size[b], "alignment": p.alignment[b]}
        rows.append({"id": str(b), "offset": str(offsets[b]), "gaps": gaps, **{k: str(v) for k, v in values.items()}})
    validate_mapping(rows, capacity)


def optimum(rows: list[Row]) -> int:
    """The least height, by trying every offset of every buffer in turn."""

    def fits(capacity: int, placed: list[int]) -> bool:
        if len(placed) == len(rows):
            return True
        lower, upper, size, alignment = rows[len(placed)]
        for offset in range(0, capacity - size + 1, alignment):
            free = all(
                other_upper <= lower or upper <= other_lower or top <= offset or offset + size <= bottom
                for (other_lower, other_upper, other_size, _), bottom in zip(rows, placed, strict=False)
                for top in (bottom + other_size,)
            )
            if free and fits(capacity, [*placed, offset]):
                return True
        return False

    capacity = max(size for _, _, size, _ in rows)
    while not fits(capacity, []):
        capacity += 1
    return capacity


def random_rows(generator: random.Random, count: int, alignments: tuple[int, ...] = (1,)) -> list[Row]:
    rows = []
    for _ in range(count):
        lower = generator.randrange(8)
        row = (lower, lower + generator.randint(1, 5), generator.randint(1, 4), generator.choice(alignments))
        rows.append(row)
    return rows


def perfect(generator: random.Random, height: int, width: int, cuts: int) -> list[Row]:
    """A rectangle cut into buffers: they fill ``height`` at every time, so the optimum is ``height``."""
    pieces = [(0, width, 0, height)]
    for _ in range(cuts):
        lower, upper, low, high = pieces.pop(generator.randrange(len(pieces)))
        if generator.random() < 0.5 and upper - lower > 1:
            at = generator.randint(lower + 1, upper - 1)
            pieces += [(lower, at, low, high), (at, upper, low, high)]
        elif high - low > 1:
            at = generator.randint(low + 1, high - 1)
            pieces += [(lower, upper, low, at), (lower, upper, at, high)]
        else:
            pieces.append((lower, upper, low, high))
    generator.shuffle(pieces)
    return [(lower, upper, high - low, 1) for lower, upper, low, high in pieces]


@pytest.mark.parametrize(
    "alignments", [(1, 3), *(pytest.param(each, marks=pytest.mark.slow) for each in ((1,), (2,), (1, 2)))]
)
def test_optimum_of_small_problems(alignments: tuple[int, ...], seed: int) -> None:
    generator = random.Random(seed)
    for _ in range(20):
        rows = random_rows(generator, generator.randint(2, 7), alignments)
        p = problem(rows)
        best = optimum(rows)
        result = solve(p, time_limit=30, seed=seed)
        check(p, result.offsets, result.height)
        assert result.height == p.height(result.offsets) == best, rows
        assert result.lower_bound <= best, rows
        assert solve(p, best, time_limit=30).status in ("feasible", "optimal"), rows
        below = solve(p, best - 1, time_limit=5)
        assert below.height == p.height(below.offsets) >= best
        assert below.status == "infeasible", rows


def test_exact_search_finds_or_refutes(seed: int) -> None:
    generator = random.Random(seed)
    for _ in range(150):
        rows = random_rows(generator, generator.randint(3, 7), (1, 2))
        tables, best = problem(rows).tables, optimum(rows)
        # Whatever the order of the buffers and the sections, and whichever valley is taken, nothing is missed.
        rank = np.array(generator.sample(range(len(rows)), len(rows)), np.int64)
        ranked = tables.sections if generator.random() < 0.6 else 0
        priority = np.array([generator.randrange(3) for _ in range(ranked)], np.int64)
        for capacity, expected in ((best, SOLVED), (best + 1, SOLVED), (best - 1, NO_SOLUTION)):
            blame, stop = np.zeros(tables.sections, np.int64), np.zeros(1, np.int64)
            status, offsets, _ = search(tables, rank, priority, capacity, 10**7, stop, blame)
            assert status == expected, (rows, capacity)
            if status == SOLVED:
                check(problem(rows), offsets, capacity)


def test_perfect_packings_are_found(seed: int) -> None:
    generator = random.Random(seed)
    for _ in range(10):
        p = problem(perfect(generator, 60, 40, 35))
        assert p.lower_bound() == 60
        result = solve(p, time_limit=60, seed=seed)
        check(p, result.offsets, 60)
        assert (result.height, result.status, result.gap) == (60, "optimal", 0.0)


def test_stop_ends_a_search() -> None:
    tables = problem([(0, 2, 2, 1)] * 40).tables
    rank, priority = np.arange(40), np.zeros(tables.sections, np.int64)
    status, _, nodes = search(
        tables, rank, priority, 79, 10**9, np.ones(1, np.int64), np.zeros(tables.sections, np.int64)
    )
    assert status not in (SOLVED, NO_SOLUTION) and nodes == 1


@pytest.mark.parametrize("count", [1, 50, 900])
def test_compiled_first_fit_equals_plain(count: int, seed: int) -> None:
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        lower = generator.randrange(2 * count)
        length = generator.choice((1, 3, 20, count)) + generator.randrange(5)
        rows.append((lower, lower + length, generator.choice((1, 7, 64, 500)), generator.choice((1, 8))))
    # Some that live from begin to end, so that blocks have floors.
    rows += [(0, 4 * count + 9, 40, 8)] * 5
    p = problem(rows)
    for order in (list(range(len(rows))), sorted(range(len(rows)), key=lambda b: rows[b][0] - rows[b][1])):
        columns = [column.tolist() for column in (p.tables.lower, p.tables.upper, p.tables.size, p.tables.alignment)]
        height, offsets = first_fit(order, *columns)
        reached, compiled_offsets = place(p.tables, np.array(order))
        assert (reached, compiled_offsets.tolist()) == (height, offsets)
        check(p, compiled_offsets, height)
        best_height, best_offsets = place(p.tables, np.array(order), best=True)
        check(p, best_offsets, best_height)
        assert place(p.tables, np.array(order), limit=height - 1)[0] >= height


def test_searches_keep_placements_sound(seed: int) -> None:
    generator = random.Random(seed)
    p = problem(perfect(generator, 300, 60, 80))
    order = np.array(generator.sample(range(p.size.size), p.size.size), np.int64)
    before, _ = place(p.tables, order)
    height, offsets = reinsert(p.tables, order, 300, 3000, seed, np.zeros(1, np.int64))
    check(p, offsets, height)
    assert 300 <= height <= before
    # The order goes with the placement.
    assert place(p.tables, order)[0] == height
    for number in range(3):
        changed = improve_window(p.tables, offsets, np.random.default_rng(number), 1e9)
        assert changed is not None
        check(p, changed, height)
        offsets = changed


def test_many_buffers_are_near_the_bound(seed: int) -> None:
    """A training step: values saved by a forward in one order are used by its backward in the other."""
    generator = random.Random(seed)
    steps, rows = 1500, []
    for step in range(steps):
        saved = generator.random() < 0.4
        end = 2 * steps - step if saved else step + generator.randint(2, 6)
        rows.append((step, end, 512 * generator.randint(1, 4000), 512))
        rows.append((2 * steps - step - 1, 2 * steps - step + 3, 512 * generator.randint(1, 4000), 512))
    p = problem(rows)
    result = solve(p, time_limit=60, seed=seed, tolerance=0.007)
    check(p, result.offsets, result.height)
    assert result.gap <= 0.007


def test_same_seed_same_result(seed: int) -> None:
    p = problem(perfect(random.Random(seed), 200, 50, 60))
    one, two = (Restarts(p.tables, seed) for _ in range(2))
    first, second = one.run(200, 16, 1e9), two.run(200, 16, 1e9)
    assert first[0] == second[0] and first[1].tolist() == second[1].tolist() and one.number == two.number


def test_parts_share_no_time(seed: int) -> None:
    generator = random.Random(seed)
    rows = [(lower, lower + generator.randint(1, 4), 1, 1) for lower in (generator.randrange(200) for _ in range(60))]
    parts = split(problem(rows).tables)
    assert sorted(index for part in parts for index in part.tolist()) == list(range(60))
    spans = [(min(rows[i][0] for i in part), max(rows[i][1] for i in part)) for part in parts]
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(spans))
    # Within a part, time has no hole.
    for part, (begin, end) in zip(parts, spans, strict=True):
        assert {t for i in part for t in range(rows[i][0], rows[i][1])} == set(range(begin, end))


def test_luby() -> None:
    assert [luby(i) for i in range(1, 16)] == [1, 1, 2, 1, 1, 2, 4, 1, 1, 2, 1, 1, 2, 4, 8]


@given(
    st.lists(
        st.tuples(st.integers(-5, 20), st.integers(1, 12), st.integers(0, 50), st.sampled_from([1, 1, 4, 6, 64])),
        max_size=25,
    ),
    st.integers(0, 400),
)
@settings(max_examples=60, deadline=None)
def test_any_problem(entries: list[tuple[int, int, int, int]], capacity: int) -> None:
    rows = [(lower, lower + length, size, alignment) for lower, length, size, alignment in entries]
    p = problem(rows)
    result = solve(p, capacity, time_limit=0.2)
    check(p, result.offsets, result.height)
    live = max((sum(r[2] for r in rows if r[0] <= t < r[1]) for t in range(-5, 35)), default=0)
    assert live <= result.lower_bound <= result.height == p.height(result.offsets)
    if result.status in ("optimal", "feasible"):
        assert result.height <= capacity
    else:
        assert result.height > capacity


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_gaps(data: st.DataObject) -> None:
    rows: list[Row] = []
    gaps: list[list[tuple[int, int, int, int]]] = []
    for _ in range(data.draw(st.integers(1, 9))):
        lower, length, size = data.draw(st.tuples(st.integers(0, 9), st.integers(1, 12), st.integers(1, 20)))
        times = sorted(data.draw(st.lists(st.integers(lower, lower + length), min_size=0, max_size=4)))
        own = []
        for begin, end in zip(times[::2], times[1::2], strict=False):
            low = data.draw(st.integers(0, size))
            own.append((begin, end, low, data.draw(st.integers(low, size))))
        rows.append((lower, lower + length, size, data.draw(st.sampled_from([1, 4]))))
        gaps.append(own)
    p = problem(rows, gaps)
    result = solve(p, time_limit=0.2)
    check(p, result.offsets, result.height)
    assert p.lower_bound() <= result.height <= solve(problem(rows), time_limit=0.2).height + 64


def test_a_gap_is_used() -> None:
    """The second fits into the first's gap, and the third on what stays of it."""
    p = problem([(0, 10, 8, 1), (2, 5, 8, 1), (5, 8, 6, 1)], [[(2, 5, 0, 0), (5, 8, 0, 2)], [], []])
    assert solve(p).height == 8


MINIMALLOC = "id,lower,upper,size,alignment,hint,gaps\na,0,4,3,1,,1-3@0:1\nb,1,3,2,2,0,\n"


def test_csv_keeps_rows_and_columns() -> None:
    file = csv_format.read(MINIMALLOC)
    assert file.problem.alignment.tolist() == [1, 2]
    assert file.problem.gaps == [[(1, 3, 0, 1)], []]
    text = file.solved(np.array([0, 2]))
    assert text == "id,lower,upper,size,alignment,hint,gaps,offset\na,0,4,3,1,,1-3@0:1,0\nb,1,3,2,2,0,,2\n"
    again = csv_format.read(text)
    assert again.columns == file.columns and again.solved(np.array([0, 2])) == text
    validate_mapping(list(csv.DictReader(io.StringIO(text))), 4)


def test_hints_are_tried() -> None:
    text = "id,lower,upper,size,hint\na,0,2,1,3\nb,1,3,2,1\nc,2,4,3,0\n"
    result = solve(csv_format.read(text).problem)
    assert result.height == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "column 'id' is missing"),
        ("id,lower,upper\na,0,1\n", "column 'size' is missing"),
        ("id,lower,upper,size,size\n", "named twice"),
        ("id,lower,upper,size\na,0,1\n", "does not have 4 fields"),
        ("id,lower,upper,size\na,0,1,2,3\n", "does not have 4 fields"),
        ("id,lower,upper,size\na,0,1,x\n", "size is 'x'"),
        ("id,lower,upper,size\na,0,1,1.5\n", "size is '1.5'"),
        ("id,lower,upper,size\na,0,1,-1\n", "size is -1"),
        ("id,lower,upper,size\na,0,1,99999999999999999999\n", "not a whole number"),
        ("id,lower,upper,size\na,0,1,9000000000000000000\n", "not between"),
        ("id,lower,upper,size\na,0,1,1000000000000000000\nb,0,1,1000000000000000000\n", "add up"),
        ("id,lower,upper,size\na,1,1,2\n", "lifetime [1, 1) is empty"),
        ("id,lower,upper,size\na,0,1,2\na,0,1,2\n", "used twice"),
        ("id,lower,upper,size,alignment\na,0,1,2,0\n", "alignment is 0"),
        ("id,lower,upper,size,gaps\na,0,9,2,3\n", "gap '3' is not understood"),
        ("id,lower,upper,size,gaps\na,0,9,2,3-10\n", "not within"),
        ("id,lower,upper,size,gaps\na,0,9,2,3-4@1:3\n", "not within"),
        ("id,lower,upper,size,gaps\na,0,9,2,2-5 4-6\n", "gaps overlap"),
        ('id,lower,upper,size\n"a,0,1,2\n', "not a CSV file"),
    ],
)
def test_bad_files_say_what_and_where(text: str, said: str) -> None:
    with pytest.raises(MappingError) as caught:
        csv_format.read(text, "x.csv")
    assert said in str(caught.value) and "x.csv" in str(caught.value)


@pytest.mark.skipif("EFFCC_BENCH_DATA" not in os.environ, reason="EFFCC_BENCH_DATA is not set")
@pytest.mark.parametrize("name", ["C", "G", "K"])
def test_challenging_instances(name: str) -> None:
    path = Path(os.environ["EFFCC_BENCH_DATA"]) / "memory_mapping" / f"{name}.1048576.csv"
    file = csv_format.read(path.read_text())
    result = solve(file.problem, 1048576, time_limit=120)
    check(file.problem, result.offsets, 1048576)
    assert result.status in ("feasible", "optimal")
