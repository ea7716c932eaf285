"""Damaged and forged plan files: refused, or exactly what was written and sound by a check of this file's own."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from effcc.errors import EffccError, PlanError
from effcc.ir.parser import parse_graph
from effcc.ir.plan import Plan
from effcc.ir.plan_file import decode_plan, encode_plan, load_plan
from effcc.ir.printer import print_graph
from effcc.ir.verifier import verify
from fresh_seed import fresh_random
from plan_files import EVERY_STRING, SOURCES, archive_of, members_of, outcome, paths, resealed, small_plan, with_value


@pytest.fixture(scope="module")
def original() -> bytes:
    verify(parse_graph(EVERY_STRING))
    return encode_plan(small_plan(), {"main": EVERY_STRING}, SOURCES)


# Damage by accident ---------------------------------------------------------------------------------------------------


def flip_bits(data: bytearray, generator: random.Random) -> None:
    for _ in range(generator.choice((1, 1, 3))):
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)


def truncate(data: bytearray, generator: random.Random) -> None:
    del data[generator.randrange(len(data)) :]


def cut_out(data: bytearray, generator: random.Random) -> None:
    place = generator.randrange(len(data))
    del data[place : place + generator.randrange(1, 40)]


def overwrite(data: bytearray, generator: random.Random) -> None:
    place = generator.randrange(len(data))
    data[place : place + 8] = generator.randbytes(8)


def append(data: bytearray, generator: random.Random) -> None:
    data.extend(generator.randbytes(generator.randrange(1, 30)))


DAMAGE: tuple[Callable[[bytearray, random.Random], None], ...] = (flip_bits, truncate, cut_out, overwrite, append)


def assert_harmless(original: bytes, rounds: int) -> None:
    """Refused, or equal in every part that is used."""
    good, generator, refused = decode_plan(original), fresh_random(), 0
    for _ in range(rounds):
        data = bytearray(original)
        generator.choice(DAMAGE)(data, generator)
        found = outcome(bytes(data))
        refused += found is None
        assert found is None or (found.plan, found.graphs_text) == (good.plan, good.graphs_text)
    assert refused > rounds // 2


def test_damage(original: bytes) -> None:
    assert_harmless(original, 400)


@pytest.mark.slow
def test_much_damage(original: bytes) -> None:
    assert_harmless(original, 20_000)


def test_every_prefix_is_refused(original: bytes) -> None:
    assert all(outcome(original[:length]) is None for length in range(0, len(original), 7))


# Edits on purpose -----------------------------------------------------------------------------------------------------


def is_sound(plan: Plan) -> bool:
    """Positions one by one, buffers pair by pair: slow, and unlike the validator in every line."""
    given = {"parameter", "gradient", "optimizer", "buffer", "input"}
    by_id = {buffer.id: buffer for buffer in plan.buffers}
    if len(by_id) < len(plan.buffers) or len({step.id for step in plan.steps}) < len(plan.steps):
        return False
    live = {b.id: set(range(b.lower, b.upper)) for b in plan.buffers}
    placed = [b for b in plan.buffers if b.offset is not None]
    for i, one in enumerate(placed):
        for other in placed[:i]:
            if (one.tier, one.pool) != (other.tier, other.pool) or not live[one.id] & live[other.id]:
                continue
            if max(one.offset, other.offset) < min(one.offset + one.bytes, other.offset + other.bytes):
                return False
        if one.offset < 0 or one.offset + one.bytes > plan.arena.get("/".join(filter(None, (one.tier, one.pool))), -1):
            return False
    made = {b.id for b in plan.buffers if b.role in given}
    gone: set[int] = set()
    for position, step in enumerate(plan.steps):
        for identity in (*step.reads, *step.writes):
            if identity not in by_id or position not in live[identity] or identity in gone:
                return False
        if not set(step.reads) <= made | set(step.writes):
            return False
        made |= set(step.writes)
        gone |= set(step.frees)
    for tier in {b.tier for b in plan.buffers} | set(plan.peak):
        use = [0] * len(plan.steps)
        for position in range(len(plan.steps)):
            use[position] += sum(
                b.bytes for b in plan.buffers if b.tier == tier and b.offset is None and position in live[b.id]
            )
            for key, size in plan.arena.items():
                inside = [b for b in placed if "/".join(filter(None, (b.tier, b.pool))) == key and b.tier == tier]
                if inside and min(b.lower for b in inside) <= position < max(b.upper for b in inside):
                    use[position] += size
        if max(use, default=0) != plan.peak.get(tier, 0):
            return False
    if plan.budget is not None and plan.peak.get("device", 0) > plan.budget:
        return False
    return abs(max((s.start + s.seconds for s in plan.steps), default=0.0) - plan.seconds) <= 1e-9


def test_the_check_of_this_file_agrees_on_the_good_plan() -> None:
    plan = small_plan()
    assert is_sound(plan)
    assert not is_sound(msgspec.structs.replace(plan, peak={"device": 9000, "host": 1088}))


STRANGE = [None, -1, 0, 1, 2**63, 2**200, -(2**70), 1.5, 1e308, "", "x", [], {}, [1], True, "\ud800", [[]], "é\n\0"]


def edited_json(content: Any, generator: random.Random) -> Any:
    """A value exchanged for a strange one, one from elsewhere in the file, or a near one; or removed, or twice."""
    path = generator.choice(paths(content))
    old = content
    for key in path:
        old = old[key]
    kind = generator.randrange(5)
    if kind == 0:
        return with_value(content, path, generator.choice(STRANGE))
    if kind == 1:
        other = content
        for key in generator.choice(paths(content)):
            other = other[key]
        return with_value(content, path, other)
    if kind == 2 and isinstance(old, int | float) and not isinstance(old, bool):
        return with_value(content, path, old + generator.choice((-64, -1, 1, 64, 0.001)))
    if kind == 3 and isinstance(old, list) and old:
        return with_value(content, path, generator.choice((old[1:], old[::-1], [*old, old[-1]])))
    copy = with_value(content, path, old)
    place = copy
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return copy


def assert_forgeries_are_refused_or_sound(original: bytes, rounds: int) -> None:
    """Without fitting digests refused; with them what comes out is what was written, and sound."""
    members, generator = members_of(original), fresh_random()
    plan = json.loads(members["plan.json"])
    accepted = 0
    for _ in range(rounds):
        edited = edited_json(plan, generator)
        content = json.dumps(edited).encode()
        if edited == plan:
            continue
        assert outcome(archive_of({**members, "plan.json": content})) is None
        found = outcome(resealed({**members, "plan.json": content}))
        if found is not None:
            accepted += 1
            assert found.plan == msgspec.json.decode(content, type=Plan)
            assert is_sound(found.plan), edited
    assert accepted < rounds // 2


def test_forged_plans(original: bytes) -> None:
    assert_forgeries_are_refused_or_sound(original, 300)


@pytest.mark.slow
def test_many_forged_plans(original: bytes) -> None:
    assert_forgeries_are_refused_or_sound(original, 20_000)


def test_forged_manifests(original: bytes) -> None:
    """The manifest has no digest of its own: what it says is checked against the plan, or is not used."""
    members, good, generator = members_of(original), decode_plan(original), fresh_random()
    manifest = json.loads(members["manifest.json"])
    for _ in range(200):
        content = json.dumps(edited_json(manifest, generator)).encode()
        found = outcome(archive_of({**members, "manifest.json": content}))
        assert found is None or (found.plan, found.graphs_text, found.sources) == (
            good.plan,
            good.graphs_text,
            good.sources,
        )


TOKENS = [
    "%x",
    "%zz",
    "@layer",
    "(",
    ")",
    "{",
    "}",
    "[",
    "]",
    ",",
    "=",
    ":",
    '"',
    "\\",
    "#",
    "s0",
    "-1",
    "f32",
    "alias ",
]


def test_forged_graph_texts(original: bytes) -> None:
    """A graph in the file that is not as it was is refused by name and line, or is a graph that keeps the rules."""
    members, generator = members_of(original), fresh_random()
    text = members["graph.ir"].decode()
    refused = 0
    for _ in range(300):
        place = generator.randrange(len(text))
        end = place + generator.choice((0, 1, 1, 5, 30))
        changed = text[:place] + generator.choice(TOKENS) * generator.randint(0, 1) + text[end:]
        found = outcome(resealed({**members, "graph.ir": changed.encode()}))
        if found is None:
            refused += 1
            continue
        for name, forged in found.graphs_text.items():
            try:
                graph = parse_graph(forged, name)
                verify(graph)
            except EffccError as error:
                refused += 1
                assert error.message
            else:
                assert parse_graph(print_graph(graph)) == graph
    assert refused > 100


def test_the_command_line_refuses_without_a_traceback(original: bytes, tmp_path: Path) -> None:
    """``effcc verify`` on damaged files: one line that says what is wrong, exit code 2."""
    from effcc.cli import app
    from typer.testing import CliRunner

    members = members_of(original)
    plan = json.loads(members["plan.json"])
    files = {
        "truncated": original[: len(original) // 2],
        "empty": b"",
        "text": b"not a zip",
        "swapped": resealed({**members, "plan.json": members["graph.ir"]}),
        "overlap": resealed(
            {**members, "plan.json": json.dumps(with_value(plan, ("buffers", 4, "lower"), 2)).encode()}
        ),
        "graph": resealed({**members, "graph.ir": members["graph.ir"].replace(b"aten.mm", b"aten mm")}),
    }
    for name, data in files.items():
        path = tmp_path / f"{name}.effcc"
        path.write_bytes(data)
        result = CliRunner().invoke(app, ["verify", str(path)])
        assert result.exit_code == 2, (name, result.output)
        assert path.name in result.output and "Traceback" not in result.output
        if name != "graph":
            with pytest.raises(PlanError):
                load_plan(path)
