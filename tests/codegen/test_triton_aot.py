"""Triton kernels compiled ahead of time, without a GPU: what they take of an A100, an H100 and a B200."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from attention_cascades import BACKWARD, FORWARD, GROUPED
from effcc.errors import CompileError
from effcc.ir.cascade_parser import parse_cascade

pytest.importorskip("triton")
from effcc.codegen.triton_tiles.aot import Usage, usage
from effcc.codegen.triton_tiles.kernel import TritonKernel, prepare_triton
from effcc.codegen.triton_tiles.schedule import Launch
from effcc.codegen.triton_tiles.settle import settled
from effcc.codegen.triton_tiles.target import Target

TEXTS = {**FORWARD, "grouped": GROUPED, **{f"backward, {name}": text for name, text in BACKWARD.items()}}
_TENSORS = ("Q", "K", "V", "O", "DO", "DQ", "DK", "DV")


@pytest.fixture(autouse=True)
def warm_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's cache beside the other caches of tests."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parent / "triton"))
    yield


def kernel(name: str, dtype: str, width: int, target: Target, **settings: object) -> TritonKernel:
    """4 x 16 heads of 2048 queries and keys; ``grouped`` has 4 query heads for each key head."""
    text, heads = TEXTS[name], 16
    sizes = {"b": 4, "h": heads, "m": 2048, "n": 2048, "d": width, "f": width, "W": 256, "P": 100, "r": 4, "R": 4}
    shapes = {}
    if name == "grouped":
        sizes["h"], shapes = heads // 4, {"Q": (4, heads, 2048, width)}
    dtypes = {**dict.fromkeys(_TENSORS, dtype), "DOC": "i64", "START": "i64"}
    dtypes["MASK"] = dtype if "+ MASK" in text else "b1"
    make = functools.partial(prepare_triton, target=target, shapes=shapes)
    return make(parse_cascade(text), sizes, dtypes, **settings)  # type: ignore[arg-type]


def first_choice(name: str, dtype: str, width: int, capability: int) -> tuple[Usage, ...]:
    target = Target.of_capability(capability)
    _, found = settled(
        lambda shape, launches: kernel(name, dtype, width, target, shape=shape, launches=launches), target
    )
    return found


@pytest.mark.parametrize(("name", "launches"), [("causal", 1), ("backward, vanilla", 2)])
def test_no_spills(name: str, launches: int) -> None:
    found = first_choice(name, "bf16", 64, 90)
    assert len(found) == launches
    for each in found:
        assert each.spilled == 0, str(each)
        assert 0 < each.registers <= 255
        assert 0 < each.shared <= 232448
        assert 0 < each.occupancy <= 1


def test_more_shared_memory_than_there_is() -> None:
    target = Target.of_capability(90)
    large = kernel("vanilla", "bf16", 128, target, launches=Launch(8, 12))
    with pytest.raises(CompileError, match="shared memory"):
        usage(large, target)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_all_without_spills(dtype: str, width: int, capability: int) -> None:
    spilled = []
    for name in TEXTS:
        for each in first_choice(name, dtype, width, capability):
            print(f"{name}, {dtype}, d = {width}: {each}")
            if each.spilled:
                spilled.append(f"{name}: {each}")
    assert not spilled, "\n".join(spilled)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", ["causal", "backward, causal"])
def test_head_dimensions_to_256(name: str, capability: int) -> None:
    for width in (32, 80, 256):
        for each in first_choice(name, "bf16", width, capability):
            assert each.shared <= Target.of_capability(capability).shared


def test_occupancy() -> None:
    """As NVIDIA's occupancy calculator has it: limited by registers, by shared memory, by threads, by blocks."""
    hopper = Target.of_capability(90)
    assert hopper.resident(threads=128, registers=128, shared=0) == 4
    assert hopper.resident(threads=128, registers=32, shared=100 << 10) == 2
    assert hopper.resident(threads=1024, registers=32, shared=0) == 2
    assert hopper.resident(threads=32, registers=16, shared=0) == 32
    assert hopper.occupancy(threads=128, registers=128, shared=0) == 0.25
    assert Target.of_capability(89).occupancy(threads=256, registers=40, shared=0) == 1.0
