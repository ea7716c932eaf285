"""What a GPU would do with fused cascades, on the CPU: graphs take the GPU's way through the compiler, and their Triton
kernels run in Triton's interpreter. A process of its own, which prints one line of JSON.

    TRITON_INTERPRET=1 python gpu_cascade_worker.py right
    TRITON_INTERPRET=1 python gpu_cascade_worker.py wrong      (kernels that give something else)
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import effcc
import torch
from effcc import cascade_fusion
from effcc.codegen import cascade_op, gpu_cascade
from effcc.codegen.fused_kernel import PlacedKernel, prepare_with
from effcc.codegen.triton_tiles import settle
from effcc.codegen.triton_tiles.kernel import prepare_triton
from effcc.codegen.triton_tiles.schedule import Shape
from effcc.codegen.triton_tiles.target import Target
from effcc.ir.parser import parse_fused_cascade
from effcc.passes.raising.choose import Choice

TARGET = Target.of_capability(90, 1)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    keep = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return torch.softmax(scores.masked_fill(~keep, float("-inf")), -1) @ v


def as_if_on_a_gpu(wrong: bool) -> dict[str, gpu_cascade.GpuCascade]:
    """Replaces what asks for a device; returns the kernels by the text of their op."""
    made: dict[str, gpu_cascade.GpuCascade] = {}

    def placed(fused: Any, rewriting: Any, target: Target, **named: Any) -> PlacedKernel[Any]:
        found = prepare_with(prepare_triton, fused, rewriting, target=target, shape=Shape(0.25, 0.5), **named)
        if wrong:
            right = found.kernel
            found.kernel = lambda inputs, out: {name: t.mul_(1.1) for name, t in right(inputs, out).items()}
        return found

    def kernel_of(text: str) -> gpu_cascade.GpuCascade:
        if text not in made:
            made[text] = gpu_cascade.GpuCascade(parse_fused_cascade(text), None, TARGET)
        return made[text]

    settle.placed = placed  # type: ignore[assignment]
    cascade_op.kernel_of = kernel_of  # type: ignore[assignment]
    cascade_fusion.choice_for = lambda *_: Choice(gain=0.5)  # type: ignore[assignment]
    cascade_fusion.placed_on = lambda _: torch.device("cuda", 0)  # type: ignore[assignment]
    Target.of_cuda = staticmethod(lambda _: TARGET)  # type: ignore[method-assign]
    torch.cuda.get_device_name = lambda _: "NVIDIA H100 80GB HBM3"
    return made


def main(wrong: bool) -> dict[str, Any]:
    made = as_if_on_a_gpu(wrong)
    torch.manual_seed(int(sys.argv[2]))
    given = [torch.randn(1, 2, 203, 16, requires_grad=True) for _ in range(3)]
    compiled = torch.compile(attention, backend="effcc")
    slope = torch.randn(1, 2, 203, 16)
    errors = []
    for _ in range(2):
        found = compiled(*given)
        wanted = attention(*given)
        pairs = [(found, wanted), *zip(*(torch.autograd.grad(y, given, slope) for y in (found, wanted)), strict=True)]
        errors += [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]
    return {
        "error": max(errors),
        "why": [kernel.why for kernel in made.values()],
        "sources": [c.source for report in effcc.reports() for c in report.cascades],
        "kernels": [c.kernel for report in effcc.reports() for c in report.cascades],
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(main(sys.argv[1] == "wrong")))
