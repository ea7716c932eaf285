"""MEMO's setting as a plan: a 7B GPT with 1M tokens on 8 A800, MEMO's rule beside effcc's choice at equal memory.

    python benchmarks/memo_setting.py [--tokens 1048576] [--parts 4]

Nothing is timed: both are predicted by the planner's simulator, from the rates in the table of assumptions. MEMO's rule
(Zhao et al. 2024, arXiv 2407.12117) sends the input and the attention's result of each layer to the host, and of what
else is saved a share alpha of the tokens, the same for all values and layers; the other tokens are computed again.
effcc chooses for each value: keep, swap, compute again, or a share of the tokens swapped and the rest computed again, a
share for each layer; and again for each value and each of ``--parts`` parts of the tokens: keep, swap or compute again.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import common
from effcc.cost_model.devices import Device, load_device
from effcc.formatting import bytes_text, seconds_text
from effcc.passes.activation.baselines import memo_share
from effcc.passes.activation.candidates import Candidate, evaluate
from effcc.passes.activation.host_link import HostLink
from effcc.passes.activation.problem import JointProblem, Op, Value
from effcc.passes.activation.search import ActivationSearch
from effcc.passes.activation.simulate import Simulator

#: Megatron-LM's GPT of 7B, which the paper trains.
LAYERS, HIDDEN, MLP, VOCABULARY = 32, 4096, 4 * 4096, 50257
#: Tensor parallelism with sequence parallelism: a device has 1/8 of every saved value and of every op.
DEVICES = 8
#: Bytes of weight, gradient, and optimizer state (32-bit weight and two moments) of a parameter.
STATE = 2 + 2 + 12
#: Bytes that the process holds besides: the CUDA context, communication buffers.
OUTSIDE = 4 << 30
#: PCIe 4.0 x16, one direction, as the paper states it; 2 TB of host memory a node.
PCIE, HOST = 32e9, 2e12


class Step:
    """A training step of one device as the planner sees it. ``parts``: shares of the tokens that token-wise ops are cut
    into; attention reads all of them."""

    def __init__(self, device: Device, tokens: int, parts: Sequence[float]) -> None:
        self.device, self.parts, self.tokens = device, parts, tokens
        self.unit = tokens * HIDDEN * 2 // DEVICES  # bytes of one bf16 value of the model's width
        self.gemm = 2 * tokens * HIDDEN * HIDDEN / DEVICES  # floating-point operations of one product of that width
        self.attention = 4 * tokens * tokens * HIDDEN / 2 / DEVICES  # causal
        self.ops: list[Op] = []
        self.values: list[Value] = []
        #: Token-wise ops, by index.
        self.row_wise: set[int] = set()
        #: Value -> (layer, name, part).
        self.named: dict[int, tuple[int, str, int]] = {}
        self.layer, self.forward = 0, True

    def value(self, name: str, units: float, part: int, op: int) -> int:
        share = 1.0 if part < 0 else self.parts[part]
        found = Value(len(self.values), f"{name}_{self.layer}_{part}", 0, int(share * units * self.unit), op)
        self.values.append(found)
        self.named[found.id] = (self.layer, name, part)
        return found.id

    def op(
        self, name: str, reads: Sequence[int], units: float, part: int, *, products: float = 0.0, attention: float = 0.0
    ) -> int:
        """``products`` in units of ``gemm``; an op without any moves its reads and its result through memory."""
        share = 1.0 if part < 0 else self.parts[part]
        made = self.value(name, units, part, len(self.ops))
        efficiency, rate = self.device.efficiency_of, self.device.matrix_rate("bf16")
        seconds = share * products * self.gemm / (rate * efficiency("gemm"))
        seconds += attention * self.attention / (rate * efficiency("attention"))
        light = not products and not attention
        if light:
            moved = sum(self.values[v].bytes for v in (*reads, made))
            seconds = moved / (self.device.bandwidth * efficiency("memory"))
        self.ops.append(
            Op(len(self.ops), self.values[made].node, name, tuple(reads), (made,), seconds, self.forward, light, False,
               False, module=f"layers.{self.layer}")
        )  # fmt: skip
        return made

    def each(self, name: str, reads: Sequence[Sequence[int]], units: float, products: float = 0.0) -> list[int]:
        """A token-wise op: part by part. What has one element is read whole."""
        made = [
            self.op(name, [of[part] if len(of) > 1 else of[0] for of in reads], units, part, products=products)
            for part in range(len(self.parts))
        ]
        self.row_wise |= {self.values[v].op for v in made if self.forward}
        return made

    def build(self) -> JointProblem:
        x = [self.value("x", 1, part, -1) for part in range(len(self.parts))]
        given = list(x)
        saved: list[dict[str, list[int]]] = []
        for self.layer in range(LAYERS):
            found = {"x": x, "n1": self.each("n1", [x], 1)}
            for name in "qkv":
                found[name] = self.each(name, [found["n1"]], 1, 1)
            found["o"] = [self.op("o", [v for name in "qkv" for v in found[name]], 1, -1, attention=1)]
            found["y"] = self.each("y", [found["o"], x], 1, 1)
            found["n2"] = self.each("n2", [found["y"]], 1)
            found["a"] = self.each("a", [found["n2"]], MLP / HIDDEN, MLP / HIDDEN)
            found["g"] = self.each("g", [found["a"]], MLP / HIDDEN)
            x = self.each("x", [found["g"], found["y"]], 1, MLP / HIDDEN)
            saved.append(found)
        result, self.forward = x, False
        dx = tangents = [self.value("dx", 1, part, -1) for part in range(len(self.parts))]
        for self.layer in reversed(range(LAYERS)):
            of = saved[self.layer]
            dg = self.each("dg", [dx, of["g"]], MLP / HIDDEN, 2 * MLP / HIDDEN)
            da = self.each("da", [dg, of["a"]], MLP / HIDDEN)
            dn2 = self.each("dn2", [da, of["n2"]], 1, 2 * MLP / HIDDEN)
            dy = self.each("dy", [dn2, of["y"], dx], 1)
            do = self.each("do", [dy, of["o"]], 1, 2)
            reads = [*do, *of["o"], *(v for name in "qkv" for v in of[name])]
            dqkv = [self.op("dqkv", reads, 3, -1, attention=2.5)]
            dn1 = self.each("dn1", [dqkv, of["n1"]], 1, 6)
            dx = self.each("dx", [dn1, of["x"], dy], 1)
        users: dict[int, tuple[int, ...]] = {}
        for op in self.ops:
            for v in op.reads:
                users[v] = (*users.get(v, ()), op.index)
        held = parameters() * STATE // DEVICES + OUTSIDE + sum(self.values[v].bytes for v in given)
        return JointProblem(
            tuple(self.ops), tuple(self.values), frozenset(given), frozenset(tangents), tuple(result), tuple(dx),
            frozenset(), held, users, {value.node: (value.id,) for value in self.values},
            row_reads={index: frozenset(self.ops[index].reads) for index in self.row_wise},
            divisible=frozenset(v for index in self.row_wise for v in self.ops[index].writes), tokens=self.tokens,
        )  # fmt: skip


def parameters() -> int:
    return LAYERS * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * MLP) + VOCABULARY * HIDDEN


def memo(device: Device, tokens: int, link: HostLink) -> tuple[float, Candidate, JointProblem]:
    """The published rule: alpha, and its plan. The last two layers stay on the device whole."""
    whole = Step(device, tokens, (1.0,))
    first = whole.build()
    layer = sum(op.seconds for op in first.ops if op.forward) / LAYERS
    skeletal = sum(first.values[v].bytes for v, (at, name, _) in whole.named.items() if at == 1 and name in SAVED)
    alpha = memo_share(2 * whole.unit, skeletal - 2 * whole.unit, LAYERS, layer, link)
    if alpha < 0:
        raise SystemExit("not even the inputs and the attention's results fit on the host")
    step = Step(device, tokens, (alpha, 1.0 - alpha))
    problem = step.build()
    made = {v for v in step.named if problem.values[v].op >= 0 and problem.ops[problem.values[v].op].forward}
    swapped, kept = set(), set()
    for v in made:
        at, name, part = step.named[v]
        # What a layer makes last is the next one's input; it is part of the next.
        at += name == "x"
        if at >= LAYERS - 2:
            kept.add(v)
        elif name in ("x", "o") or part == 0:
            swapped.add(v)
    return alpha, evaluate(Simulator(problem, link), frozenset(kept), frozenset(swapped)), problem


#: What a layer saves: 16 values of the model's width.
SAVED = ("x", "n1", "q", "k", "v", "o", "y", "n2", "a", "g")


def row(name: str, candidate: Candidate, problem: JointProblem, step: float) -> dict[str, Any]:
    swapped = candidate.bytes_away(problem.values)
    again = candidate.simulation.extra_seconds
    return {
        "plan": name,
        "step_seconds": problem.seconds + candidate.seconds,
        "more_percent": 100 * candidate.seconds / problem.seconds,
        "recompute_seconds": again,
        "stall_seconds": candidate.simulation.stall,
        "device_peak_bytes": candidate.peak,
        "host_bytes": swapped,
        "mfu_percent": 100 * step / (problem.seconds + candidate.seconds),
    }


def assumptions(device: Device, tokens: int, link: HostLink, budget: int) -> dict[str, str]:
    rate, efficiency = device.matrix_rate("bf16"), device.efficiency_of
    return {
        "model": f"GPT, {LAYERS} layers, width {HIDDEN}, MLP {MLP}, {VOCABULARY} words: {parameters() / 1e9:.2f} B",
        "batch": f"one sequence of {tokens} tokens, bf16, causal attention",
        "parallel split": f"tensor and sequence parallelism over {DEVICES}: 1/{DEVICES} of every value and op",
        "communication": "not counted, for either",
        "embedding and loss": "not counted, for either (the loss is chunked)",
        "device": f"A800-80G, as {device.title}; NVLink's rate does not enter",
        "matrix products": f"{rate * efficiency('gemm') / 1e12:.0f} TFLOP/s ({efficiency('gemm'):.0%} of peak)",
        "attention": f"{rate * efficiency('attention') / 1e12:.0f} TFLOP/s; backward 2.5 times the forward",
        "device memory": f"{device.bandwidth * efficiency('memory') / 1e9:.0f} GB/s reached; {bytes_text(budget)}",
        "state": f"{STATE} bytes a parameter, sharded over {DEVICES}; {bytes_text(OUTSIDE)} for context and buffers",
        "host": f"{link.capacity / 1e9:.0f} GB a device (2 TB a node), {link.out / 1e9:.0f} GB/s each way (PCIe 4)",
        "copies": "one engine in each direction beside the ops, begun as late as they may be",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--parts", type=int, default=4)
    arguments = parser.parse_args()
    device = load_device("a100-80g")
    link = HostLink(PCIE, PCIE, device.tiers["host"].latency.value, int(HOST / DEVICES), overlapped=True)
    budget = device.memory
    alpha, baseline, problem = memo(device, arguments.tokens, link)
    useful = 6 * (parameters() - VOCABULARY * HIDDEN) * arguments.tokens / DEVICES
    useful += 3 * LAYERS * 4 * arguments.tokens**2 * HIDDEN / 2 / DEVICES
    ideal = useful / device.matrix_rate("bf16")
    rows = [row(f"MEMO, alpha {alpha:.3f}", baseline, problem, ideal)]
    begin = time.perf_counter()
    for words, parts in (("shares of tokens", 1), (f"{arguments.parts} parts of tokens", arguments.parts)):
        own = Step(device, arguments.tokens, (1 / parts,) * parts).build()
        if parts > 1:  # a choice for each part is what shares of tokens stand for
            own = dataclasses.replace(own, divisible=frozenset())
        search = ActivationSearch(own, link=link)
        for name, limit in (("at MEMO's device memory", baseline.peak), ("at the device's memory", budget)):
            found = search.within(min(limit, budget))
            if found is None:
                print(f"effcc {name}: nothing fits in {bytes_text(limit)}")
                continue
            gap = 100 * (found.seconds - search.bound(limit)) / (own.seconds + found.seconds)
            title = f"effcc, {words}, {name}"
            rows.append(row(title, found, own, ideal) | {"gap_percent": gap, "split_values": len(found.shares)})
    facts = assumptions(device, arguments.tokens, link, budget)
    common.show("assumptions", [{"what": key, "value": value} for key, value in facts.items()])
    common.show("MEMO's setting", [shown(each) for each in rows])
    print(f"planned in {seconds_text(time.perf_counter() - begin)}")
    print(
        common.keep("memo_setting", rows, {"assumptions": facts, **vars(arguments), "link": dataclasses.asdict(link)})
    )


def shown(each: dict[str, Any]) -> dict[str, str]:
    return {
        "plan": each["plan"],
        "step": f"{each['step_seconds']:.2f} s",
        "more than no plan": f"{each['more_percent']:.2f} %",
        "again": f"{each['recompute_seconds']:.2f} s",
        "waits": f"{each['stall_seconds']:.2f} s",
        "device": bytes_text(each["device_peak_bytes"]),
        "host": bytes_text(each["host_bytes"]),
        "MFU": f"{each['mfu_percent']:.1f} %",
        "gap": f"{each['gap_percent']:.2f} %" if "gap_percent" in each else "",
    }


if __name__ == "__main__":
    main()
