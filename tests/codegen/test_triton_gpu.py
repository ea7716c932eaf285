"""Triton kernels on a GPU, held to float64: every variant of attention and its gradients, losses, groups of plain
functions, and the op that compiled graphs call."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attention_cascades import BACKWARD, FORWARD, GROUPED
from attention_variants import VARIANTS
from fresh_seed import fresh_random

pytest.importorskip("triton")
from effcc.codegen.cascade_op import cascade_text
from effcc.codegen.prepared import TORCH_DTYPES
from effcc.codegen.triton_tiles.kernel import prepare_triton
from effcc.codegen.triton_tiles.schedule import Shape
from effcc.codegen.triton_tiles.settle import placed
from effcc.codegen.triton_tiles.target import Target
from effcc.codegen.triton_tiles.tune import fastest
from effcc.ir.cascade_parser import parse_cascade
from effcc.passes.raising.choose import choose
from effcc.passes.raising.raise_graph import raise_graph
from group_checks import LOOSE, check_groups
from kernel_checks import TEXTS as KNOWN_TEXTS
from kernel_checks import attention_case, case, known_case
from raised_graphs import EVERYTHING, record

pytestmark = pytest.mark.gpu
TEXTS = {**FORWARD, "grouped": GROUPED, **{f"backward, {name}": text for name, text in BACKWARD.items()}}
#: Of the largest number: float32 by three products; one rounding of the weights and of the output.
TOLERANCE = {"f32": 1e-5, "bf16": 2e-2, "f16": 3e-3}


def prepare(*arguments: Any, **settings: Any) -> Any:
    return prepare_triton(*arguments, target=Target.of_cuda(0), **settings)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", TEXTS)
def test_attention(name: str, dtype: str) -> None:
    made = attention_case(TEXTS[name], fresh_random(), dtype, prepare=prepare)
    assert made.kernel.buffer_bytes == 0 or "part" in made.kernel.source
    assert made.worst("cuda") < TOLERANCE[dtype] * (4 if "alibi" in name and dtype == "f32" else 1)


@pytest.mark.parametrize("name", KNOWN_TEXTS)
def test_known(name: str) -> None:
    def in_float32(cascade: Any, sizes: Any, dtypes: Any, **settings: Any) -> Any:
        return prepare(cascade, sizes, {k: "f32" if v == "f64" else v for k, v in dtypes.items()}, **settings)

    made = known_case(name, fresh_random(), prepare=in_float32)
    made.dtype = "f32"
    assert made.worst("cuda") < 2e-4


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("length", [127, 1000, 2048])
@pytest.mark.parametrize("causal", [False, True])
def test_beside_scaled_dot_product_attention(width: int, length: int, causal: bool) -> None:
    torch.manual_seed(fresh_random().randrange(2**32))
    q, k, v = (torch.randn(2, 4, length, width, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    sizes = {"b": 2, "h": 4, "m": length, "n": length, "d": width, "f": width}
    text = FORWARD["causal" if causal else "vanilla"].replace("0.125", repr(width**-0.5))
    kernel = prepare(parse_cascade(text), sizes, dict.fromkeys("QKVO", "bf16"))
    own = kernel({"Q": q, "K": k, "V": v})["O"]
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
    peer = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    assert (own - exact).abs().max() <= 2 * (peer - exact).abs().max() + 1e-3


def test_decoding_in_parts() -> None:
    sizes = {"b": 1, "h": 4, "m": 1, "n": 20000, "d": 128, "f": 128}
    made = case(FORWARD["vanilla"], sizes, np.random.default_rng(0), "bf16", prepare=prepare)
    assert any(loop.part is not None for program in made.kernel.programs for loop in program.loops)
    assert made.worst("cuda") < TOLERANCE["bf16"]


@pytest.mark.parametrize("name", [name for name, each in VARIANTS.items() if each.one_pass and name != "decode"])
def test_groups(name: str) -> None:
    """Groups of the joint graph, recorded on the CPU in float32, with their operands on the GPU."""

    def on_gpu(fused: Any, rewriting: Any, wide: frozenset[str]) -> Any:
        kernel = placed(fused, rewriting, Target.of_cuda(0), wide=wide)
        return OnGpu(kernel)

    tolerance = max(LOOSE.get(name, 0.0), 2e-5)
    if name != "kernel_density":
        assert check_groups(VARIANTS[name], on_gpu, tolerance, dtype=torch.float32)


class OnGpu:
    """A kernel called with tensors of the CPU."""

    def __init__(self, placed_kernel: Any) -> None:
        self.placed, self.kernel = placed_kernel, placed_kernel.kernel

    def __call__(self, operands: list[torch.Tensor]) -> list[torch.Tensor]:
        moved = [
            torch.empty_strided(o.shape, o.stride(), dtype=o.dtype, device="cuda").copy_(o) if o.numel() else o.cuda()
            for o in operands
        ]
        return [result.cpu() for result in self.placed(moved)]


def test_the_op_on_the_gpu() -> None:
    variant = VARIANTS["causal"]
    inputs = variant.inputs(fresh_random().getrandbits(32), torch.float32)
    (run,) = record(variant.function, inputs)
    (group,) = choose(raise_graph(run.graph), EVERYTHING).groups
    operands = [torch.tensor(run.values[name], dtype=torch.float32) for name in group.operands]
    shaped = [o.reshape([int(n) for n in t.shape]) for o, t in zip(operands, group.fused.operands, strict=True)]
    assert all(t.dtype in TORCH_DTYPES for t in group.fused.operands)
    text = cascade_text(group.fused)
    (result,) = torch.ops.effcc.cascade(text, [o.cuda() for o in shaped])
    (expected,) = torch.ops.effcc.cascade(text, shaped)
    assert result.is_cuda
    torch.testing.assert_close(result.cpu(), expected, atol=2e-5, rtol=2e-5)


def test_the_fastest_candidate() -> None:
    sizes = {"b": 2, "h": 8, "m": 1024, "n": 1024, "d": 64, "f": 64}
    target = Target.of_cuda(0)
    make = functools.partial(
        prepare_triton, parse_cascade(FORWARD["causal"]), sizes, dict.fromkeys("QKVO", "bf16"), target=target
    )
    tensors = {name: torch.randn(2, 8, 1024, 64, device="cuda", dtype=torch.bfloat16) for name in "QKV"}
    (shape, launch), times = fastest(
        lambda shape, launches: make(shape=shape, launches=launches), target, lambda kernel: kernel(tensors)
    )
    assert len(times) > 1
    assert times[shape, launch] == min(times.values())
    first = make(shape=Shape())(tensors)["O"]
    for shape, launch in times:
        result = make(shape=shape, launches=launch)(tensors)["O"]
        torch.testing.assert_close(result, first, atol=2e-2, rtol=2e-2)
