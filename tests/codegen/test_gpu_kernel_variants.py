"""Ways to generate a Triton kernel: what there is for a GPU that is not here, its price, and that the kernel has it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_variants import VARIANTS
from command_line import Effcc
from effcc.cascade_fusion import variants_for
from effcc.codegen.cascade_op import prepare_on_gpu
from effcc.codegen.gpu_kernel_variants import GPU_ALIKE, TILES, GpuKernelVariants
from effcc.codegen.triton_tiles.target import CAPABILITIES, Target
from effcc.codegen.variant_timing import close_ones
from effcc.cost_model.devices import list_devices, load_device
from effcc.cost_model.gpu_tile_cost import Launched, program_seconds
from effcc.errors import DeviceError
from effcc.ir.parser import parse_fused_cascade
from effcc.passes.raising.choose import choose
from effcc.passes.raising.group import Group
from effcc.passes.raising.raise_graph import raise_graph
from raised_graphs import EVERYTHING, record

H100 = load_device("h100")


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / 8, -1) @ v


def group_of(heads: int, rows: int, keys: int, width: int = 64) -> Group:
    values = [torch.randn(1, heads, count, width, dtype=torch.bfloat16) for count in (rows, keys, keys)]
    (run,) = record(attention, values)
    (group,) = choose(raise_graph(run.graph), EVERYTHING).groups
    return group


@pytest.fixture(scope="module")
def group() -> Group:
    return group_of(4, 512, 512)


@pytest.fixture(scope="module")
def larger() -> Group:
    return group_of(16, 512, 512)


def variants_of(device: str) -> GpuKernelVariants:
    found = load_device(device)
    return GpuKernelVariants.of(found, Target.of_device(found))


def test_few_blocks_are_filled_with_shorter_tiles(group: Group) -> None:
    """16 blocks of 128 rows leave most of 132 multiprocessors idle; an L4's 58 units want other tiles than they do."""
    found = variants_of("h100")(group)
    assert found[0].schedule == () and "(rule" in found[0].what
    assert len({each.what for each in found}) == len(found) > 2
    best = dict(min(found, key=lambda each: each.seconds).schedule)
    assert best["rows"] < 128
    assert (best["rows"], best["streamed"]) in TILES
    assert {(each.measured, each.alike) for each in found} == {(False, GPU_ALIKE)}


def test_with_blocks_enough_the_rule_stays(larger: Group) -> None:
    """One for each of an L4's multiprocessors, and more: no other tiles are clearly cheaper."""
    found = variants_of("l4")(larger)
    assert min(each.seconds for each in found) >= (1 - GPU_ALIKE) * found[0].seconds


def test_what_is_a_little_cheaper_is_there_to_be_timed(larger: Group) -> None:
    """It is not taken for its price, but it is among those that ``measure_candidates`` runs."""
    found = variants_of("l4")(larger)
    little = [each for each in found if (1 - GPU_ALIKE) * found[0].seconds <= each.seconds < found[0].seconds]
    assert little and set(close_ones(found, 0.12)[1:]) & set(little)


def test_no_kernel_is_cheaper_than_its_products_and_its_bytes(group: Group) -> None:
    products = 2 * 2 * 4 * 512 * 512 * 64 / H100.matrix_rate("bf16")
    moved = 4 * 4 * 512 * 64 * 2 / H100.bandwidth
    for each in variants_of("h100")(group):
        assert each.seconds > max(products, moved) + H100.launch.value


def test_what_is_reduced_without_products_is_left_to_the_rules() -> None:
    def mean_and_variance(x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return (centred * centred).mean(-1)

    (run,) = record(mean_and_variance, [torch.randn(512, 256)])
    for each in choose(raise_graph(run.graph), EVERYTHING).groups:
        assert variants_of("h100")(each) == ()


@pytest.mark.parametrize("name", list_devices())
def test_every_device_file_is_a_target_or_is_refused(name: str) -> None:
    """NVIDIA's GPUs have a capability, whose table of shared memory agrees with the file; kernels are made for no other
    device."""
    device = load_device(name)
    if device.kind != "cuda":
        with pytest.raises(DeviceError, match="compute capability"):
            Target.of_device(name)
        return
    target = Target.of_device(name)
    known = {"h100": 90, "h200": 90, "a100-80g": 80, "l4": 89, "rtx4090": 89}
    assert target.capability == known.get(name, target.capability)
    assert (target.units, target.shared) == (device.units.value, device.unit_scratch.value)
    assert target.shared == Target.of_capability(target.capability).shared
    assert variants_for(device) is not None, "its kernels' tiles are chosen"


def test_no_target_is_without_its_device_file() -> None:
    assert set(CAPABILITIES) == {name for name in list_devices() if load_device(name).kind == "cuda"}


def price_of(group: Group, launched: Launched) -> float:
    """On an L4, in tiles of 64 by 64."""
    variants = variants_of("l4")
    lowered, _ = variants.lowered(group.fused, group.rewriting, (64, 64))
    (program,) = lowered.programs
    return program_seconds(program, lowered.sizes, variants.rates, launched)


def test_prices_follow_occupancy_stages_and_waves(larger: Group) -> None:
    launched = Launched(4, 3, 2, 32 << 10, "bf16")
    plain = price_of(larger, launched)
    assert price_of(larger, replace(launched, resident=1)) > plain, "two blocks hide each other's waiting"
    assert price_of(larger, replace(launched, stages=1)) > plain, "without stages, each tile is waited for"
    assert price_of(larger, replace(launched, parts=3)) > plain, "three products for one"
    # 8 blocks a head: 14 heads are one wave of 116 blocks, two at a time on 58 multiprocessors; 16 begin another.
    assert plain > 1.3 * price_of(group_of(14, 512, 512), launched)


def test_the_kernel_has_the_chosen_tiles_and_warps(group: Group) -> None:
    pytest.importorskip("triton")
    schedule = {"rows": 64, "streamed": 32, "warps": 8, "stages": 2}
    fused = replace(group.fused, schedule=schedule)
    text, placed = prepare_on_gpu(fused, group.rewriting, Target.of_device("h100"))
    assert parse_fused_cascade(text).schedule == schedule
    assert {(step.launch.warps, step.launch.stages) for step in placed.kernel.steps} == {(8, 2)}
    assert {64, 32} <= {loop.step for loop in placed.kernel.programs[0].loops} <= {1, 64, 32}


def test_equal_layers_are_lowered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention of two layers, written down as one op: its kernel, and then its source, are made once."""
    from effcc.codegen import cascade_op

    made = 0
    original = cascade_op.prepare_with

    def counting(*args: Any, **more: Any) -> Any:
        nonlocal made
        made += 1
        return original(*args, **more)

    monkeypatch.setattr(cascade_op, "prepare_with", counting)
    target = Target.of_device("l4")
    texts = {prepare_on_gpu(each.fused, each.rewriting, target)[0] for each in (group_of(3, 320, 352) for _ in "ab")}
    (text,) = texts
    assert "@triton.jit" in cascade_op.gpu_source(text, target)
    assert made == 1
    prepare_on_gpu(parse_fused_cascade(text), None, Target.of_device("h100"))
    assert made == 2, "another GPU has another kernel"


MODEL = """
import torch

class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = torch.nn.Linear(256, 768)

    def forward(self, x):
        q, k, v = (part.view(1, 1024, 4, 64).transpose(1, 2) for part in self.heads(x).chunk(3, -1))
        return torch.softmax(q @ k.transpose(-1, -2) / 8, -1) @ v

model = Attention
def example_inputs():
    return (torch.randn(1, 1024, 256),)
"""


def test_a_plan_for_a_gpu_says_how_its_kernels_are_generated(effcc: Effcc, tmp_path: Path) -> None:
    source, plan = tmp_path / "attention.py", tmp_path / "attention.effcc"
    source.write_text(MODEL)
    assert effcc("plan", source, "--device", "h100", "--dtype", "bf16", "--no-report", "-o", plan).code == 0
    shown = json.loads(json.dumps(effcc("explain", plan, "--schedule", "--json").json["schedule"]))
    (kernel,) = [each for each in shown["decisions"] if each["kind"] == "kernel"]
    prices = {each["what"]: each["value"] for each in kernel["alternatives"]}
    assert any("(rule" in what for what in prices) and all("warps" in what for what in prices)
    rule = next(value for what, value in prices.items() if "(rule" in what)
    assert prices[kernel["chosen"]] == rule or prices[kernel["chosen"]] < (1 - GPU_ALIKE) * rule
    out = effcc("explain", plan, "--schedule").out
    assert "what is fused into one kernel, and each kernel's tiles, parts, warps" in out
    assert "kernel: tile lengths of each launch by rank" in out


@pytest.mark.slow
@pytest.mark.parametrize("device", ["h100", "a100-80g"])
def test_registers_and_shared_memory_are_what_the_compiler_says(device: str) -> None:
    """Of attention's kernels: never more blocks at once than there is room for, by more than one; seldom fewer."""
    pytest.importorskip("triton")
    from effcc.codegen.fused_kernel import prepare_with
    from effcc.codegen.triton_tiles.aot import usage
    from effcc.codegen.triton_tiles.blocks import Blocks
    from effcc.codegen.triton_tiles.kernel import prepare_triton
    from effcc.codegen.triton_tiles.schedule import Launch

    variants, wrong = variants_of(device), []
    for group in (group_of(16, 512, 512), group_of(16, 512, 512, 128)):
        for tile in ((64, 64), (128, 64), (64, 128)):
            lowered, narrow = variants.lowered(group.fused, group.rewriting, tile)
            for chosen in (Launch(4, 2), Launch(8, 3)):
                made = prepare_with(
                    prepare_triton, group.fused, group.rewriting, wide=frozenset(group.wide), target=variants.target,
                    tile=tile, launches=chosen,
                )  # fmt: skip
                program = lowered.programs[0]
                counted = variants.launched(program, Blocks(program, lowered.sizes, lowered.shapes), chosen, narrow)
                if not counted.resident:
                    continue
                (used,) = usage(made.kernel, variants.target, only=0)
                held = variants.target.resident(chosen.warps * 32, used.registers, used.shared)
                if abs(held - counted.resident) > 1:
                    wrong.append(f"{tile} {chosen}: {counted.resident} counted, {held} held ({used})")
    assert not wrong, "\n".join(wrong)


def test_variants_of_the_zoo_of_attention_can_be_lowered() -> None:
    """Masks, biases, grouped heads: something is offered for each, and every offer has a price."""
    for name in ("causal", "grouped_query", "sliding_window"):
        variant = VARIANTS[name]
        run = record(variant.function, variant.inputs(1, torch.float32))[0]
        for each in choose(raise_graph(run.graph), EVERYTHING).groups:
            found = variants_of("a100-80g")(each)
            assert all(one.seconds > 0 for one in found)
            assert not found or found[0].schedule == ()
