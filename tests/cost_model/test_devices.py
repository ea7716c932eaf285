"""Device files: complete, sourced, and equal to the datasheets where a number is known by heart."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from effcc.cost_model.devices import Device, figures, list_devices, load_device, parse_device
from effcc.errors import DeviceError

EXPECTED = {"cpu", "h100", "h200", "a100-80g", "l4", "rtx4090", "mi300x", "tpu-v4i-like"}


def test_all_devices_are_there() -> None:
    assert set(list_devices()) >= EXPECTED


@pytest.mark.parametrize("name", list_devices())
def test_every_figure_is_positive_and_sourced(name: str) -> None:
    device = load_device(name)
    assert device.name == name
    for label, figure in figures(device):
        assert figure.value > 0, label
        assert len(figure.source) >= 10, f"{label} has no source"
    assert device.memory > 0 and {"device", "host", "disk"} <= set(device.tiers)
    assert all(0 < figure.value <= 1 for figure in device.efficiency.values())


@pytest.mark.parametrize(
    ("name", "bf16_tflops", "terabytes_a_second", "gigabytes"),
    [
        ("h100", 989.4, 3.35, 80),
        ("h200", 989.4, 4.8, 141),
        ("a100-80g", 312, 2.04, 80),
        ("l4", 121, 0.3, 24),
        ("rtx4090", 165.2, 1.008, 24),
        ("mi300x", 1307.4, 5.3, 192),
        ("tpu-v4i-like", 138, 0.614, 8),
    ],
)
def test_datasheet(name: str, bf16_tflops: float, terabytes_a_second: float, gigabytes: float) -> None:
    device = load_device(name)
    assert device.matrix_rate("bf16") == pytest.approx(bf16_tflops * 1e12, rel=1e-3)
    assert device.bandwidth == pytest.approx(terabytes_a_second * 1e12, rel=1e-2)
    assert gigabytes * 1e9 <= device.memory <= gigabytes * 1.08 * 2**30


def test_scratchpad_is_a_tier_of_the_tpu() -> None:
    tier = load_device("tpu-v4i-like").tiers["scratchpad"]
    assert tier.capacity.value == 128 * 2**20
    assert tier.bandwidth.value > load_device("tpu-v4i-like").bandwidth


def test_dtype_without_matrix_units_falls_back_on_vector_units() -> None:
    h100 = load_device("h100")
    assert h100.matrix_rate("f32") == h100.vector_rate("f32") < h100.matrix_rate("tf32")


def test_names_are_case_insensitive() -> None:
    assert load_device("H200") is load_device("h200")


def test_unknown_name_suggests_close_ones() -> None:
    with pytest.raises(DeviceError, match=r"unknown device 'h20'(.|\n)*h200"):
        load_device("h20")


def test_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    device = msgspec.structs.replace(load_device("l4"), name="mine")
    file.write_bytes(msgspec.json.encode(device))
    assert load_device(file) == device
    with pytest.raises(DeviceError, match="does not exist"):
        load_device(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"units"', '"unitz"', "unitz"),
        ('"kind":"cuda"', '"kind":3', "kind"),
        ('"host"', '"hosts"', "tier 'host' is missing"),
        ("{", "[", "not a device file"),
    ],
)
def test_damaged_files_name_the_field(old: str, new: str, message: str) -> None:
    text = msgspec.json.encode(load_device("l4")).decode()
    assert old in text
    with pytest.raises(DeviceError, match=re.escape(message)):
        parse_device(text.replace(old, new, 1).encode(), where="x.json")


def test_negative_figure_is_refused() -> None:
    device = load_device("l4")
    broken = msgspec.structs.replace(device, launch=msgspec.structs.replace(device.launch, value=-1.0))
    with pytest.raises(DeviceError, match="launch is not positive"):
        parse_device(msgspec.json.encode(broken))


def test_links() -> None:
    assert load_device("h100").link("node").bandwidth.value == 450e9
    with pytest.raises(DeviceError, match="no link of scope"):
        load_device("tpu-v4i-like").link("cluster")


def test_round_trip() -> None:
    for name in list_devices():
        device = load_device(name)
        assert msgspec.json.decode(msgspec.json.encode(device), type=Device) == device
