"""Attention in Triton kernels made of cascades, on a GPU: TFLOP/s beside FlexAttention, and SDPA's flash and cuDNN.

    python benchmarks/attention_on_gpu.py                                   # all, to results/attention_on_gpu.json
    python benchmarks/attention_on_gpu.py --only causal --lengths 4096 --widths 128 --tune
    python benchmarks/attention_on_gpu.py --usage 90                        # what kernels take of Hopper; needs no GPU

bfloat16, 16,384 tokens in all, 16 heads of 128 features or 32 of 64; forward, and forward with backward (3.5 times the
operations). Each result is checked against float32 eager on one head first. The operations of a causal mask count half,
those of a window as far as it reaches. ``--tune`` times the schedule's candidates and takes the fastest.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import environment, keep, show

# isort: split
from attention_cascades import FORWARD, backward  # common puts tests/ on the path
from effcc.codegen.triton_tiles.kernel import prepare_triton
from effcc.codegen.triton_tiles.settle import Make, settled
from effcc.codegen.triton_tiles.target import Target
from effcc.codegen.triton_tiles.tune import tuned
from effcc.ir.cascade_parser import parse_cascade

Run = Callable[[], Any]
TOKENS, FEATURES, WINDOW, CAP = 16384, 2048, 256, 20.0
SCORES = {
    "vanilla": "QK[b,h,m,n] * SCALE",
    "causal": "where(n <= m, QK[b,h,m,n] * SCALE, -inf)",
    "alibi": "where(n <= m, QK[b,h,m,n] * SCALE + SLOPE[h] * (n - m), -inf)",
    "window": "where((n <= m) * (m - n < W), QK[b,h,m,n] * SCALE, -inf)",
    "softcap": "20 * tanh(QK[b,h,m,n] * SCALE / 20)",
}
SLOPES = {"softcap": "SCALE * (1 - tanh(QK[b,h,m,n] * SCALE / 20)**2)"}


def texts(variant: str, width: int) -> tuple[str, str]:
    """(forward with the logsumexp kept, backward)."""
    scale = repr(width**-0.5)
    ahead = FORWARD[variant].replace("0.125", scale) + "L[b,h,m] = GM[b,h,m] + log(SD[b,h,m])\n"
    back = backward(SCORES[variant], SLOPES.get(variant, "SCALE")).replace("SCALE", scale)
    return ahead, "D[b,h,m] = sum[f] DO[b,h,m,f] * O[b,h,m,f]\n" + back


def makers(variant: str, length: int, width: int, target: Target) -> list[Make]:
    """For the forward and the backward: what makes a kernel with tiles of a shape and these launch settings."""
    sizes = {"b": max(1, TOKENS // length), "h": FEATURES // width, "m": length, "n": length, "d": width, "f": width}
    dtypes = {**dict.fromkeys(("Q", "K", "V", "O", "DO", "DQ", "DK", "DV"), "bf16"), "L": "f32", "SLOPE": "f32"}

    def maker(text: str) -> Make:
        make = functools.partial(prepare_triton, parse_cascade(text), {**sizes, "W": WINDOW}, dtypes, target=target)
        return lambda shape, launches: make(shape=shape, launches=launches)

    return [maker(text) for text in texts(variant, width)]


def operations(variant: str, length: int, width: int) -> float:
    """Floating-point operations of a forward; a backward has 2.5 times as many."""
    pairs = float(length) * length
    if variant in ("causal", "alibi"):
        pairs /= 2
    if variant == "window":
        pairs = float(length) * min(WINDOW, length)
    return 4.0 * max(1, TOKENS // length) * (FEATURES // width) * pairs * width


def flex(variant: str, length: int, slopes: torch.Tensor) -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    masks: dict[str, Any] = {
        "causal": lambda b, h, m, n: n <= m,
        "alibi": lambda b, h, m, n: n <= m,
        "window": lambda b, h, m, n: (n <= m) & (m - n < WINDOW),
    }
    scores: dict[str, Any] = {
        "alibi": lambda score, b, h, m, n: score + slopes[h] * (n - m),
        "softcap": lambda score, b, h, m, n: CAP * torch.tanh(score / CAP),
    }
    block = create_block_mask(masks[variant], None, None, length, length, device="cuda") if variant in masks else None
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, score_mod=scores.get(variant), block_mask=block)


def plain(variant: str, slopes: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Written out, for checking."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        m = torch.arange(q.shape[-2], device=q.device)[:, None]
        n = torch.arange(k.shape[-2], device=q.device)[None, :]
        if variant == "alibi":
            scores = scores + slopes[: q.shape[1], None, None] * (n - m)
        if variant == "softcap":
            scores = CAP * torch.tanh(scores / CAP)
        if variant in ("causal", "alibi"):
            scores = scores.masked_fill(n > m, -torch.inf)
        if variant == "window":
            scores = scores.masked_fill((n > m) | (m - n >= WINDOW), -torch.inf)
        return torch.softmax(scores, -1) @ v

    return run


def peers(variant: str, length: int, slopes: torch.Tensor) -> dict[str, Callable[..., torch.Tensor]]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attention(backend: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=variant == "causal")

    found: dict[str, Callable[..., torch.Tensor]] = {"flex": flex(variant, length, slopes)}
    if variant in ("vanilla", "causal"):
        found["flash"] = functools.partial(attention, SDPBackend.FLASH_ATTENTION)
        found["cudnn"] = functools.partial(attention, SDPBackend.CUDNN_ATTENTION)
    return found


def gradients(function: Callable[..., torch.Tensor], q: Any, k: Any, v: Any, grad: Any) -> Any:
    leaves = [each.detach().requires_grad_() for each in (q, k, v)]
    return torch.autograd.grad(function(*leaves), leaves, grad)


def milliseconds(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Medians of runs taken in turns, by the GPU's clock."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 3):
        for name, run in runs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            if number >= 3:
                times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(each) for name, each in times.items()}


def measure(variant: str, length: int, width: int, tune: bool, rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    heads = FEATURES // width
    shape = (max(1, TOKENS // length), heads, length, width)
    q, k, v, grad = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    slopes = 2.0 ** -torch.linspace(0.5, 8.0, heads, device="cuda")
    inputs = {"Q": q, "K": k, "V": v, "SLOPE": slopes}
    target = Target.of_cuda(0)

    ahead, back = (settled(make, target)[0] for make in makers(variant, length, width, target))
    if tune:
        first, second = makers(variant, length, width, target)
        ahead = tuned(first, target, lambda each: each(inputs))
        saved = {**inputs, **ahead(inputs), "DO": grad}
        back = tuned(second, target, lambda each: each(saved))

    def training() -> dict[str, torch.Tensor]:
        return back({**inputs, **ahead(inputs), "DO": grad})

    sample = [each[:1, :1].float() for each in (q, k, v, grad)]
    written = plain(variant, slopes)
    if length <= 8192:
        exact = [written(*sample[:3]), *gradients(written, *sample)]
        own = [ahead(inputs)["O"], *(training()[name] for name in ("DQ", "DK", "DV"))]
        for name, found, expected in zip(("O", "dQ", "dK", "dV"), own, exact, strict=True):
            error = (found[:1, :1].float() - expected).abs().max() / expected.abs().max()
            assert error < 3e-2, f"{variant} {length} {width}: {name} is wrong by {error:.1e}"
    work = operations(variant, length, width)
    forward: dict[str, Run] = {"effcc": lambda: ahead(inputs)}
    both: dict[str, Run] = {"effcc": training}
    for name, function in peers(variant, length, slopes).items():
        forward[name] = functools.partial(function, q, k, v)
        both[name] = functools.partial(gradients, function, q, k, v, grad)
    rows = []
    for phase, runs, factor in (("forward", forward, 1.0), ("training", both, 3.5)):
        times = milliseconds(working(runs), rounds)
        speeds = {name: factor * work / (time * 1e9) for name, time in times.items()}
        rows.append({"variant": variant, "length": length, "width": width, "phase": phase, **speeds})
    return rows


def working(runs: dict[str, Run]) -> dict[str, Run]:
    """Those that this GPU and torch have."""
    found = {}
    for name, run in runs.items():
        try:
            run()
            torch.cuda.synchronize()
            found[name] = run
        except RuntimeError as error:
            print(f"{name} is left out: {str(error).splitlines()[0]}")
    return found


def print_usage(variants: list[str], widths: list[int], capability: int) -> None:
    target = Target.of_capability(capability)
    for variant in variants:
        for width in widths:
            for make in makers(variant, 4096, width, target):
                for each in settled(make, target)[1]:
                    print(f"{variant}, {width} features: {each}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(SCORES))
    parser.add_argument("--lengths", nargs="*", type=int, default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--widths", nargs="*", type=int, default=[64, 128])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--usage", type=int, metavar="CAPABILITY", help="for example 90, for Hopper")
    options = parser.parse_args()
    if options.usage:
        print_usage(options.only, options.widths, options.usage)
        return
    rows: list[dict[str, Any]] = []
    for variant in options.only:
        for width in options.widths:
            for length in options.lengths:
                rows += measure(variant, length, width, options.tune, options.rounds)
                print(rows[-2], rows[-1], flush=True)
    about = {**environment(), "gpu": torch.cuda.get_device_name(0), "tuned": options.tune}
    keep("attention_on_gpu", rows, about)
    columns = ("variant", "length", "width", "phase", "effcc", "flex", "flash", "cudnn")
    show("TFLOP/s", [{column: row.get(column, "") for column in columns} for row in rows])


if __name__ == "__main__":
    main()
