"""The dump folder: numbered files, records, several writers at once, folders that cannot be written."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import pytest
from effcc.errors import OptionError, OutputError
from effcc.ir.parser import parse_graph
from effcc.ir.printer import print_graph
from effcc.passes.dump import DumpFolder, PassRecord, read_records
from effcc.passes.manager import DUMP_VARIABLE, PassManager
from effcc.passes.pipeline import parse_pipeline
from fresh_seed import fresh_random

TEXT = """graph @g phase=inference {
  %x: f32[4] = input()  role(input)
  %a: f32[4] = aten.exp.default(%x)
  %b: f32[4] = aten.exp.default(%x)
  %c: f32[4] = aten.add.Tensor(%a, %b)
  %dead: f32[4] = aten.neg.default(%x)
  return (%c)
}
"""


@pytest.mark.parametrize("by_variable", [False, True])
def test_each_change_is_a_numbered_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_variable: bool) -> None:
    monkeypatch.setenv(DUMP_VARIABLE, str(tmp_path) if by_variable else "")
    manager = PassManager(parse_pipeline("normalize"), dump_dir=None if by_variable else tmp_path)
    result = manager.run(parse_graph(TEXT))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "000-input.ir",
        "000-input.json",
        "001-canonicalize.json",
        "002-constant-folding.json",
        "003-common-subexpressions.ir",
        "003-common-subexpressions.json",
        "004-dead-code.ir",
        "004-dead-code.json",
    ]
    assert (tmp_path / "000-input.ir").read_text() == TEXT
    assert (tmp_path / "004-dead-code.ir").read_text() == print_graph(result)
    records = read_records(tmp_path)
    assert records[1:] == tuple(manager.records)
    files = [(record.index, record.before, record.after) for record in records]
    merged, last = "003-common-subexpressions.ir", "004-dead-code.ir"
    assert files == [
        (0, "", "000-input.ir"),
        (1, "000-input.ir", "000-input.ir"),
        (2, "000-input.ir", "000-input.ir"),
        (3, "000-input.ir", merged),
        (4, merged, last),
    ]
    assert [(record.ops_before, record.ops_after) for record in records[3:]] == [(5, 4), (4, 3)]


def test_a_second_graph_goes_on_counting(tmp_path: Path) -> None:
    for name in ("first", "second"):
        PassManager(parse_pipeline("dead-code"), dump_dir=tmp_path).run(parse_graph(TEXT.replace("@g", f"@{name}")))
    assert [(r.index, r.graph, r.name) for r in read_records(tmp_path)] == [
        (0, "first", "input"),
        (1, "first", "dead-code"),
        (2, "second", "input"),
        (3, "second", "dead-code"),
    ]


def test_no_number_is_given_twice(tmp_path: Path) -> None:
    """Eight writers, each with its own counter as in processes of their own."""
    start = threading.Barrier(8)
    claimed: list[int] = []

    def claim(name: str) -> None:
        folder = DumpFolder(tmp_path)
        start.wait()
        claimed.extend(folder.claim(name)[0] for _ in range(12))

    threads = [threading.Thread(target=claim, args=(f"writer{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) == 96 and len(set(claimed)) == 96


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="cannot write dumps to"):
        PassManager(parse_pipeline("dead-code"), dump_dir=tmp_path / "file").run(parse_graph(TEXT))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    folder = DumpFolder(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OutputError, match=os.strerror(code)):
        patch.setattr(Path, "write_text", fail)
        folder.write("000-input.ir", TEXT)
    with monkeypatch.context() as patch, pytest.raises(OutputError, match=os.strerror(code)):
        patch.setattr(Path, "open", fail)
        folder.claim("input")


def test_what_is_no_record_is_passed_over(tmp_path: Path) -> None:
    good = PassRecord(3, "dead-code", "g", "inference", 0.5, True, 5, 4, "002-a.ir", "003-dead-code.ir")
    folder = DumpFolder(tmp_path)
    folder.write_record("003-dead-code", good)
    whole = json.loads((tmp_path / "003-dead-code.json").read_text())
    bad = {**whole, "index": "3"}, {**whole, "more": 1}, {"index": 3}, {}, [], None, 3
    for number, content in enumerate(bad):
        folder.write(f"{number + 10:03d}-bad.json", json.dumps(content))
    folder.write("030-claimed.json", "")
    folder.write("notes.json", "{}")
    assert read_records(tmp_path) == (good,)


def test_damaged_records_are_records_or_nothing(tmp_path: Path) -> None:
    """Whatever stands in a record's file, reading the folder does not fail."""
    generator = fresh_random()
    record = PassRecord(3, "dead-code", "g", "inference", 0.5, True, 5, 4, "002-a.ir", "003-dead-code.ir")
    DumpFolder(tmp_path).write_record("003-dead-code", record)
    file = tmp_path / "003-dead-code.json"
    original = file.read_bytes()
    for _ in range(200):
        data = bytearray(original)
        for _ in range(generator.randint(1, 4)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        file.write_bytes(bytes(data[: generator.randint(0, len(data))] if generator.random() < 0.3 else data))
        for found in read_records(tmp_path):
            assert isinstance(found.index, int) and isinstance(found.text, str) and isinstance(found.seconds, float)
