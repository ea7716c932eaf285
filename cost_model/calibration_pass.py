"""One pass over all that a calibration measures twice: memory, generated kernels, library ops, products."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from .cpu_kernels import LawCase, law_seconds, walking_seconds
from .devices import GemmMeasurement
from .generated_probes import Probes, ProbeSeconds, probe_seconds
from .measuring_time import Account, agreed, agreed_together
from .product_probes import batched_products, interleaved, linear_products, measured_again
from .this_machine import cache_sizes

#: Part -> share of the seconds. Products get what the others leave of the whole, and no less than their own share.
SHARES = {
    "memory": 0.1,
    "generated kernels": 0.25,
    "ladder": 0.05,
    "laws": 0.1,
    "batched": 0.075,
    "products": 0.4,
}


@dataclass(frozen=True)
class Pass:
    """What a pass measured, in seconds: of memory (``memory_seconds``); of products, whose keys have
    no rate; of kernels by the bytes that they move, of attention and convolution, and of what is generated, all three
    empty without a compiler."""

    memory: Mapping[str, float]
    products: Mapping[GemmMeasurement, float]
    walks: Mapping[int, float]
    laws: Mapping[tuple[int, bool], float]
    generated: ProbeSeconds

    def agreed(self, other: Pass) -> Pass:
        """What both passes say."""
        return Pass(
            agreed(self.memory, other.memory),
            agreed(self.products, other.products),
            agreed(self.walks, other.walks),
            agreed(self.laws, other.laws),
            {name: agreed_together(spent, other.generated[name]) for name, spent in self.generated.items()},
        )


def measure_pass(
    probes: Probes | None, cases: Sequence[LawCase], seconds: float, account: Account, before: Pass | None = None
) -> Pass:
    """One pass in about ``seconds``. A second one measures the products of the one ``before``."""
    begun = account.measured
    with account.part("memory"):
        memory = memory_seconds(SHARES["memory"] * seconds)
    kernels: ProbeSeconds | None = None
    walks: dict[int, float] = {}
    laws: dict[tuple[int, bool], float] = {}
    if probes is not None:
        with account.part("generated kernels"):
            kernels = probe_seconds(probes, SHARES["generated kernels"] * seconds)
    if kernels is not None:
        with account.part("memory by size"):
            walks = walking_seconds(SHARES["ladder"] * seconds)
        with account.part("attention and convolution"):
            laws = law_seconds(cases, SHARES["laws"] * seconds)
    if before is None:
        with account.part("batched products"):
            products = list(batched_products(SHARES["batched"] * seconds))
        with account.part("products"):
            products += linear_products(max(seconds - (account.measured - begun), SHARES["products"] * seconds))
    else:
        left = seconds - (account.measured - begun)
        with account.part("all products"):
            known = [with_rate(each, spent) for each, spent in before.products.items()]
            products = list(measured_again(known, max(left, (SHARES["products"] + SHARES["batched"]) * seconds)))
    spent = {msgspec.structs.replace(each, rate=0.0): each.flop / each.rate for each in products}
    return Pass(memory, spent, walks, laws, kernels or {})


def with_rate(product: GemmMeasurement, seconds: float) -> GemmMeasurement:
    return msgspec.structs.replace(product, rate=product.flop / seconds)


def memory_seconds(seconds: float) -> dict[str, float]:
    """Seconds a byte, read and written: ``copy``, ``pointwise`` (two read, one written), ``reduction`` on sizes beyond
    any cache, and ``cache <bytes>`` for a pointwise op whose working set is half of each cache. ``call``: seconds of a
    call that does next to nothing."""
    import torch

    count = 1 << 25  # 128 MiB of f32
    a, b, out = (torch.ones(count) for _ in range(3))
    share = seconds / (3 + len(cache_sizes()))
    found = {
        "call": _call_seconds(),
        "copy": interleaved({"_": lambda: out.copy_(a)}, share)["_"] / (8 * count),
        "pointwise": interleaved({"_": lambda: torch.add(a, b, out=out)}, share)["_"] / (12 * count),
        "reduction": interleaved({"_": lambda: torch.sum(a)}, share)["_"] / (4 * count),
    }
    for _, size in cache_sizes():
        part = max(1024, size // 2 // 12)
        x, y, z = a[:part], b[:part], out[:part]
        run = functools.partial(torch.add, x, y, out=z)
        spent = max(interleaved({"_": run}, share)["_"] - found["call"], 1e-7)
        found[f"cache {size}"] = spent / (12 * part)
    return found


def _call_seconds() -> float:
    import torch

    x = torch.ones(1)
    with torch.no_grad():
        return min(_many(lambda: torch.add(x, x, out=x)) for _ in range(5))


def _many(run: Callable[[], Any], times: int = 2000) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - begin) / times
