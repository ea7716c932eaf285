"""Attention's variants as generated cascade kernels, beside torch's: times interleaved in one process, medians.

    python benchmarks/cascade_kernels.py --threads 2 --rounds 15 --out cascade_kernels.json
    python benchmarks/cascade_kernels.py --only vanilla causal --training

For each variant: our kernel, ``scaled_dot_product_attention`` where it has the variant, compiled ``flex_attention``
(inference only on CPU), and Inductor on the variant written out. ``--training``: forward and backward. ``--loss``: a
linear layer with cross-entropy and its gradients. Every result is checked against float64 first. Times in
milliseconds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from attention_cascades import FORWARD, backward
from effcc.codegen.cascade_kernel import CascadeKernel, compile_cascade
from effcc.ir.cascade_parser import parse_cascade

Run = Callable[[], Any]
WINDOW, CAP = 256, 20.0
SCORES = {
    "vanilla": "QK[b,h,m,n] * 0.125",
    "causal": "where(n <= m, QK[b,h,m,n] * 0.125, -inf)",
    "alibi": "where(n <= m, QK[b,h,m,n] * 0.125 + SLOPE[h] * (n - m), -inf)",
    "window": "where((n <= m) * (m - n < W), QK[b,h,m,n] * 0.125, -inf)",
    "softcap": "20 * tanh(QK[b,h,m,n] * 0.125 / 20)",
}
SLOPES = {"softcap": "0.125 * (1 - tanh(QK[b,h,m,n] / 160)**2)"}


def eager(variant: str, slopes: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The variant written out in plain torch."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q @ k.transpose(-1, -2) * 0.125
        m = torch.arange(q.shape[-2])[:, None]
        n = torch.arange(k.shape[-2])[None, :]
        if variant == "alibi":
            scores = scores + slopes[:, None, None] * (n - m)
        if variant == "softcap":
            scores = CAP * torch.tanh(scores / CAP)
        if variant == "sigmoid":
            return torch.sigmoid(scores) @ v
        if variant in ("causal", "alibi"):
            scores = scores.masked_fill(n > m, -torch.inf)
        if variant == "window":
            scores = scores.masked_fill((n > m) | (m - n >= WINDOW), -torch.inf)
        return torch.softmax(scores, -1) @ v

    return run


def flex(variant: str, slopes: torch.Tensor, length: int) -> Callable[..., torch.Tensor] | None:
    """Compiled ``flex_attention`` with the variant's score and mask functions."""
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
    if variant == "sigmoid":
        return None
    block = create_block_mask(masks[variant], None, None, length, length, device="cpu") if variant in masks else None
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, score_mod=scores.get(variant), block_mask=block)


def extents(length: int) -> dict[str, int]:
    return {"b": 1, "h": 8, "m": length, "n": length, "d": 64, "f": 64, "W": WINDOW}


def forward_runs(variant: str, length: int, inputs: dict[str, torch.Tensor], peers: bool) -> dict[str, Run]:
    kernel = compile_cascade(parse_cascade(FORWARD[variant]), extents(length))
    q, k, v = inputs["Q"], inputs["K"], inputs["V"]
    plain = eager(variant, inputs["SLOPE"])
    exact = plain(q.double(), k.double(), v.double())
    error = (kernel(inputs)["O"] - exact).abs().max().item()
    print(f"{variant}: error {error:.1e}, scratch {kernel.scratch_bytes >> 10} KiB a thread", file=sys.stderr)
    runs: dict[str, Run] = {"effcc": lambda: kernel(inputs)}
    if variant in ("vanilla", "causal"):
        runs["sdpa"] = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=variant == "causal")
    if peers:
        attention = flex(variant, inputs["SLOPE"], length)
        if attention is not None:
            runs["flex"] = lambda: attention(q, k, v)
        compiled = torch.compile(plain, dynamic=False)
        runs["inductor"] = lambda: compiled(q, k, v)
    return runs


def training_kernels(variant: str, length: int) -> tuple[CascadeKernel, CascadeKernel]:
    """(forward with the logsumexp kept, backward)."""
    text = FORWARD[variant] + "L[b,h,m] = GM[b,h,m] + log(SD[b,h,m])\n"
    gradient = "D[b,h,m] = sum[f] DO[b,h,m,f] * O[b,h,m,f]\n" + backward(SCORES[variant], SLOPES.get(variant, "0.125"))
    sizes = extents(length)
    return compile_cascade(parse_cascade(text), sizes), compile_cascade(parse_cascade(gradient), sizes)


def training_runs(variant: str, length: int, inputs: dict[str, torch.Tensor], peers: bool) -> dict[str, Run]:
    ahead, back = training_kernels(variant, length)
    grad = torch.randn_like(inputs["Q"])

    def own() -> dict[str, torch.Tensor]:
        kept = ahead(inputs)
        return back({**inputs, **kept, "DO": grad})

    def with_autograd(function: Callable[..., torch.Tensor], kind: torch.dtype = torch.float32) -> list[torch.Tensor]:
        leaves = [inputs[name].to(kind).requires_grad_() for name in "QKV"]
        return list(torch.autograd.grad(function(*leaves), leaves, grad.to(kind)))

    plain = eager(variant, inputs["SLOPE"])
    exact = with_autograd(plain, torch.float64)
    found = own()
    errors = [(found[name] - e).abs().max().item() for name, e in zip(("DQ", "DK", "DV"), exact, strict=True)]
    print(f"{variant}: errors of dQ, dK, dV {' '.join(f'{e:.1e}' for e in errors)}", file=sys.stderr)
    runs: dict[str, Run] = {"effcc": own}
    if variant in ("vanilla", "causal"):
        causal = variant == "causal"
        runs["sdpa"] = lambda: with_autograd(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal))
    if peers:
        compiled = torch.compile(plain, dynamic=False)
        runs["inductor"] = lambda: with_autograd(compiled)
    return runs


def loss_runs(words: int, peers: bool) -> dict[str, Run]:
    """A linear layer of 512 features over ``words`` words, mean cross-entropy of 2048 tokens, all gradients."""
    tokens, width = 2048, 512
    ahead = """
Z[t,v]  = sum[d] H[t,d] * W[v,d]
MX[t]   = max[v] Z[t,v]
SE[t]   = sum[v] exp(Z[t,v] - MX[t])
L[t]    = MX[t] + log(SE[t])
ZT[t]   = sum[v] where(v == T[t], Z[t,v], 0)
LOSS[]  = sum[t] (L[t] - ZT[t]) / |t|
"""
    back = """
Z[t,v]  = sum[d] H[t,d] * W[v,d]
DZ[t,v] = (exp(Z[t,v] - L[t]) - where(v == T[t], 1, 0)) * G[] / |t|
DH[t,d] = sum[v] DZ[t,v] * W[v,d]
DW[v,d] = sum[t] DZ[t,v] * H[t,d]
"""
    sizes = {"t": tokens, "v": words, "d": width}
    dtypes = {"T": "i64"}
    first = compile_cascade(parse_cascade(ahead), sizes, dtypes, outputs=["LOSS", "L"])
    second = compile_cascade(parse_cascade(back), sizes, dtypes)
    h, w = torch.randn(tokens, width) * 0.5, torch.randn(words, width) * 0.05
    target, one = torch.randint(words, (tokens,)), torch.ones(())

    def own() -> dict[str, torch.Tensor]:
        kept = first({"H": h, "W": w, "T": target})
        return {**kept, **second({"H": h, "W": w, "T": target, "L": kept["L"], "G": one})}

    def step(function: Callable[..., torch.Tensor], kind: torch.dtype = torch.float32) -> list[torch.Tensor]:
        leaves = [h.to(kind).requires_grad_(), w.to(kind).requires_grad_()]
        loss = function(*leaves)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    def plain(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x @ y.t(), target)

    found, exact = own(), step(plain)
    for name, expected in zip(("LOSS", "DH", "DW"), exact, strict=True):
        print(f"{name}: difference {(found[name] - expected).abs().max().item():.1e}", file=sys.stderr)
    runs: dict[str, Run] = {"effcc": own}
    if peers:
        compiled = torch.compile(plain, dynamic=False)
        runs["inductor"] = lambda: step(compiled)
    return runs


def measure(runs: dict[str, Run], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number >= 2:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: {"median": statistics.median(t), "least": min(t)} for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--training", action="store_true")
    parser.add_argument("--loss", action="store_true")
    parser.add_argument("--words", type=int, default=32000)
    parser.add_argument("--no-peers", action="store_true", help="only what needs no compiling")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape = (1, 8, options.length, 64)
    inputs = {name: torch.randn(shape) for name in "QKV"} | {"SLOPE": 2.0 ** -torch.arange(1.0, 9.0)}
    variants = options.only or [*SCORES, *([] if options.training else ["sigmoid"])]
    results: dict[str, Any] = {}
    if options.loss:
        results["loss"] = measure(loss_runs(options.words, not options.no_peers), options.rounds)
    else:
        make = training_runs if options.training else forward_runs
        for variant in variants:
            runs = make(variant, options.length, inputs, not options.no_peers)
            results[variant] = measure(runs, options.rounds)
    for name, each in results.items():
        print(name.ljust(10), "  ".join(f"{who} {t['median']:.1f} ({t['least']:.1f})" for who, t in each.items()))
    report = {"machine": platform.processor(), "threads": options.threads, "torch": torch.__version__, "ms": results}
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
