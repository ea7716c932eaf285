"""The library of a matrix product by measurement: chosen, remembered, shared, and never by a damaged file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from effcc.cost_model import gemm_measurement
from effcc.cost_model.gemm_measurement import GemmMeasurements, has_onednn, layout, machine_name, measure
from fresh_seed import fresh_random

ROW_MAJOR = ((512, 1), (512, 1))
BIG = (512, 512, 512, *ROW_MAJOR)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """oneDNN twice as fast where n is 512, a tie elsewhere; the products that were measured."""
    calls: list[tuple[int, ...]] = []

    def made_up(product: tuple[int, int, int, tuple[int, int], tuple[int, int]]) -> dict[str, float]:
        calls.append(product[:3])
        return {"blas": 2e-3, "onednn": 1e-3 if product[2] == 512 else 1.95e-3}

    monkeypatch.setattr(gemm_measurement, "measure", made_up)
    monkeypatch.setattr(gemm_measurement, "has_onednn", lambda: True)
    return calls


def test_the_faster_library_is_taken_and_measured_once(measured: list[tuple[int, ...]]) -> None:
    choose = GemmMeasurements(None)
    assert [choose(*BIG) for _ in range(3)] == ["onednn"] * 3
    assert choose(512, 512, 500, (512, 1), (500, 1)) == "blas", "a tie keeps BLAS"
    assert measured == [(512, 512, 512), (512, 512, 500)]


def test_what_is_not_worth_measuring(measured: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert GemmMeasurements(None)(8, 8, 8, (8, 1), (8, 1)) == "blas"
    assert GemmMeasurements(None, "onednn")(*BIG) == "onednn"
    assert GemmMeasurements(None, "blas")(*BIG) == "blas"
    monkeypatch.setattr(gemm_measurement, "has_onednn", lambda: False)
    assert GemmMeasurements(None, "onednn")(*BIG) == "blas"
    assert measured == []


def test_layouts_are_told_apart(measured: list[tuple[int, ...]]) -> None:
    assert layout((512, 1), (512, 512)) == "n" and layout((1, 512), (512, 512)) == "t"
    assert layout((1024, 1), (512, 512)) == "[1024,1]"
    choose = GemmMeasurements(None)
    for left in ((512, 1), (1, 512), (1024, 1)):
        choose(512, 512, 512, left, (512, 1))
    assert len(measured) == 3


def test_answers_are_kept_between_processes(tmp_path: Path, measured: list[tuple[int, ...]]) -> None:
    first, second = GemmMeasurements(tmp_path / "cache"), GemmMeasurements(tmp_path / "cache")
    first(*BIG)
    second(512, 512, 500, (512, 1), (500, 1))
    third = GemmMeasurements(tmp_path / "cache")
    assert third(*BIG) == "onednn" and third(512, 512, 500, (512, 1), (500, 1)) == "blas"
    assert len(measured) == 2, "what another process stored is kept when a file is replaced"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["gemm.json"]


def test_another_machines_answers_are_not_used(tmp_path: Path, measured: list[tuple[int, ...]]) -> None:
    (tmp_path / "gemm.json").write_text(json.dumps({"other": {"512x512x512 nn": {"blas": 1.0, "onednn": 9.0}}}))
    assert GemmMeasurements(tmp_path)(*BIG) == "onednn"
    assert set(json.loads((tmp_path / "gemm.json").read_text())) == {"other", machine_name()}


def test_damaged_files_count_as_not_measured(tmp_path: Path, measured: list[tuple[int, ...]]) -> None:
    generator = fresh_random()
    GemmMeasurements(tmp_path)(*BIG)
    file = tmp_path / "gemm.json"
    original = file.read_text()
    key = next(iter(json.loads(original)[machine_name()]))
    bad = ["", "[]", "3", '{"a": 3}', json.dumps({machine_name(): 3}), json.dumps({machine_name(): {key: {}}})]
    bad += [
        json.dumps({machine_name(): {key: entry}}) for entry in ({"blas": 1}, {"blas": "x", "onednn": None}, [1, 2])
    ]
    bad += [original[: generator.randrange(len(original))] for _ in range(20)]
    for text in bad:
        file.write_text(text)
        assert GemmMeasurements(tmp_path)(*BIG) == "onednn"
        assert json.loads(file.read_text())[machine_name()][key]["blas"] == 2e-3


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, measured: list[tuple[int, ...]]) -> None:
    (tmp_path / "file").write_text("")
    choose = GemmMeasurements(tmp_path / "file")
    assert [choose(*BIG) for _ in range(2)] == ["onednn"] * 2
    assert len(measured) == 1


@pytest.mark.skipif(not has_onednn(), reason="torch without oneDNN")
def test_measuring_under_fake_tensors_takes_real_time() -> None:
    """While a graph is compiled fake tensors are on, under which nothing would be computed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    product = (256, 256, 256, (256, 1), (1, 256))
    with FakeTensorMode():
        seconds = measure(product)
    if not seconds:
        pytest.skip("the processor is busy with something else, so no measurement is kept")
    assert set(seconds) == {"blas", "onednn"}
    # No machine multiplies at more than 10 TFLOP/s here; a fake product takes no time that depends on its size.
    assert all(2 * 256**3 / value < 1e13 for value in seconds.values())
    assert all(not isinstance(value, torch.Tensor) for value in seconds.values())


def test_the_module_is_read_without_torch() -> None:
    code = "import sys, effcc.cost_model.gemm_measurement; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
