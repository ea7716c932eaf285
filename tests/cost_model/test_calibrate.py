"""Calibration: what is stored is read back, a read-only folder is no error, and the choice follows the measurements."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from effcc.cost_model import calibrate as calibration
from effcc.cost_model import product_probes, this_machine
from effcc.cost_model.calibrate import calibrate, calibrated_device
from effcc.cost_model.devices import Device, GemmMeasurement, load_device
from effcc.cost_model.product_probes import LAYOUTS, Shape, measure_product
from effcc.cost_model.roofline import gemm_seconds


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFCC_CACHE_DIR", str(folder))
        patch.setattr(product_probes, "LINEAR_SHAPES", ((8, 64, 32), (64, 128, 128)))
        calibrated_device.cache_clear()
        yield calibrate(1.0, generated=False)
    calibrated_device.cache_clear()


def has_onednn(dtype: str) -> bool:
    """Whether oneDNN multiplies matrices of ``dtype`` here, tried; it has no bf16 on a processor with AVX2 alone."""
    try:
        one = torch.ones(2, 2, dtype={"f32": torch.float32, "bf16": torch.bfloat16}[dtype])
        torch.ops.mkldnn._linear_pointwise(one, one, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return True


def test_everything_is_measured(device: Device) -> None:
    measured = {(e.library, e.dtype, e.layout, e.m, e.k, e.n) for e in device.gemm}
    for dtype in ("f32", "bf16"):
        for library in ["blas", "onednn"] if has_onednn(dtype) else ["blas"]:
            assert (library, dtype, "forward", 8, 64, 32) in measured
            assert (library, dtype, "input_gradient", 8, 32, 64) in measured
            assert (library, dtype, "weight_gradient", 32, 8, 64) in measured
    assert all(e.rate > 1e5 for e in device.gemm)
    assert 1e8 < device.bandwidth < 1e13 and 1e-8 < device.launch.value < 1e-2
    assert "measured" in device.tiers["device"].bandwidth.source
    assert device.matrix_rate("f32") == max(e.rate for e in device.gemm if e.dtype == "f32")
    assert all(0 < figure.value <= 1 for figure in device.efficiency.values())


def test_it_is_kept_and_read_back(device: Device) -> None:
    assert calibrated_device() == device
    assert device.machine == this_machine.machine()


def test_another_thread_count_is_another_machine(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(this_machine, "threads", lambda: 77)
    calibrated_device.cache_clear()
    assert calibrated_device() == load_device("cpu")
    calibrated_device.cache_clear()


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
def test_read_only_folder_is_no_error(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("EFFCC_CACHE_DIR", str(blocked / "below"))
    calibration._store(device)
    assert blocked.read_text() == "not a folder"
    calibrated_device.cache_clear()
    assert calibrated_device() == load_device("cpu")
    calibrated_device.cache_clear()


def test_a_library_without_the_type_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_probes, "_has_onednn", lambda dtype: dtype != "bf16")
    assert [each.library for each in measure_product("bf16", Shape("forward", 1, 5, 7, 3), 0.0)] == ["blas"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_libraries_compute_the_product_that_is_measured(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results: dict[str, torch.Tensor] = {}

    def run(candidates: dict[str, object], seconds: float, warm: bool) -> dict[str, float]:
        for name, candidate in candidates.items():
            results[name] = candidate()  # type: ignore[operator]
        return dict.fromkeys(candidates, 1.0)

    monkeypatch.setattr(product_probes, "interleaved", run)
    measured = measure_product("f32", Shape(layout, 1, 5, 7, 3), 0.0)
    assert all(e.rate == 2 * 5 * 7 * 3 for e in measured)
    first, *others = results.values()
    assert first.shape == (5, 3)
    for other in others:
        torch.testing.assert_close(first, other)


def entry(library: str, rate: float, m: int) -> GemmMeasurement:
    return GemmMeasurement(library=library, dtype="f32", layout="forward", m=m, k=m, n=m, rate=rate)


def test_measured_rates_price_products() -> None:
    known = msgspec.structs.replace(load_device("cpu"), gemm=(entry("blas", 1e9, 64), entry("onednn", 4e9, 64)))
    assert gemm_seconds(1, 64, 64, 64, "f32", known) == pytest.approx(2 * 64**3 / 4e9)


def test_importing_the_cost_model_does_not_load_torch() -> None:
    code = (
        "import sys; import effcc.cost_model.calibrate, effcc.cost_model.roofline, effcc.cost_model.simulator;"
        "import effcc.cost_model.liveness, effcc.passes.planner; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
