"""What keeping less of the forward costs: effcc's budget beside torch's knapsack and uniform checkpointing.

    python benchmarks/activation.py [--model llama|gpt2|vit] [--layers N] [--rounds R] [--cascades off|on]
                                    [--shares 0.8 0.6 0.4 0.3 0.25] [--swap] [--size full|small]
                                    [--solvers dp ilp] [--budgets 0.8 0.5 0.2 0] [--minutes M]

Within 12 minutes on 2 cores: --solvers dp --budgets 0.5 0.2 0 --minutes 9 --rounds 9. What --minutes leaves out comes
last: first effcc's budgets, then torch's with effcc at the same peak, then checkpoints and the rounded relaxation.

Every method splits the same joint graph; the code is compiled by the same backend and the same GEMM library
(``--gemm``), without cascades or with them, so that the plan alone differs. ``peak_bytes`` is the allocator's, exact:
what a step holds with parameters, gradients and inputs. ``predicted_seconds`` are the cost model's; ``seconds``
measured ones, medians of interleaved rounds (left out with --rounds 0). ``effcc 0.6`` has 0.6 of the peak of keeping
all as its budget; ``effcc = ...`` has the measured peak of one of torch's points. Refused budgets are told with their
floors. What should hold is checked: peaks within budgets, smaller budgets with no larger peaks and no shorter predicted
times, gradients equal.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import common
import effcc
import torch
from effcc import torch_internals
from effcc.budget_planning import BudgetPlanner
from effcc.joint_split import split_saving
from effcc.measuring import peak_of
from effcc.passes.activation.baselines import greedy, uniform_checkpointing
from effcc.passes.activation.candidates import Candidate
from effcc.passes.activation.search import ActivationSearch
from effcc.summary import device_named


@dataclass(frozen=True)
class Model:
    module: torch.nn.Module
    inputs: dict[str, torch.Tensor]


def llama(layers: int, size: str) -> Model:
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, vocabulary, length = (256, 8192, 512) if size == "full" else (64, 512, 128)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=int(hidden * 2.75) // 8 * 8,
        num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=8, use_cache=False,
        attn_implementation="eager", max_position_embeddings=length,
    )  # fmt: skip
    return words(LlamaForCausalLM(config), vocabulary, length)


def gpt2(layers: int, size: str) -> Model:
    from transformers import GPT2Config, GPT2LMHeadModel

    width, vocabulary, length = (256, 8192, 512) if size == "full" else (64, 512, 128)
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=length, n_embd=width, n_layer=layers, n_head=8, use_cache=False,
        attn_implementation="eager", bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    module = GPT2LMHeadModel(config)
    module.loss_type = "ForCausalLM"  # else it warns of its default where it is called, which breaks the graph
    return words(module, vocabulary, length)


def words(module: torch.nn.Module, vocabulary: int, length: int) -> Model:
    tokens = torch.randint(0, vocabulary, (2, length))
    return Model(module, {"input_ids": tokens, "labels": tokens})


def vit(layers: int, size: str) -> Model:
    from transformers import ViTConfig, ViTForImageClassification

    width, pixels, batch = (256, 224, 8) if size == "full" else (64, 64, 4)
    config = ViTConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=8, intermediate_size=4 * width,
        num_labels=1000, image_size=pixels, patch_size=16, attn_implementation="eager", hidden_dropout_prob=0.0,
    )  # fmt: skip
    images, labels = torch.randn(batch, 3, pixels, pixels), torch.randint(0, 1000, (batch,))
    return Model(ViTForImageClassification(config), {"pixel_values": images, "labels": labels})


MODELS = {"llama": llama, "gpt2": gpt2, "vit": vit}
Choose = Callable[[ActivationSearch], Candidate | None]


@contextlib.contextmanager
def splitting(choose: Choose) -> Iterator[None]:
    """Joint graphs compiled inside are split by ``choose``."""
    planner = BudgetPlanner(device_named("cpu"))

    def partition(gm: torch.fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **kwargs: Any) -> Any:
        split = planner.partition(gm, inputs, num_fwd_outputs=num_fwd_outputs, **kwargs)
        graph = planner.graphs[-1]
        chosen = choose(graph.search) if graph is not None else None
        if graph is None or chosen is None:
            return split
        return split_saving(graph.module, graph.search.problem, chosen.saved, num_fwd_outputs, graph.static)

    with torch_internals.joint_partitioner(partition):
        yield


@contextlib.contextmanager
def knapsack(budget: float, solver: str, seconds: float) -> Iterator[None]:
    """``solver``: torch's ``dp``, ``ilp`` or ``greedy``. The program of ``ilp`` has no time limit in torch and may
    take minutes; here its best answer after ``seconds`` is taken."""
    import scipy.optimize

    solve = scipy.optimize.milp

    def limited(*args: Any, **kwargs: Any) -> Any:
        found = solve(*args, **kwargs, options={"time_limit": seconds})
        if found.x is not None:
            found.success = True
            found.x = found.x.round()  # torch takes what equals 1
        return found

    scipy.optimize.milp = limited

    def partition(gm: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        return torch_internals.knapsack_partition(gm, inputs, budget, solver, **kwargs)

    try:
        with torch_internals.joint_partitioner(partition):
            yield
    finally:
        scipy.optimize.milp = solve


def held(tensors: Any) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class Method:
    """A compiled training step with its peak and predicted time."""

    def __init__(self, name: str, model: Model, options: dict[str, Any], around: Any) -> None:
        self.name, self.module, self.inputs = name, model.module, model.inputs
        self.budget: int | None = options.get("memory_budget")
        effcc.reset_reports()
        self.compiled = common.compiled(self.module, backend="effcc", options={"repeated_modules": False, **options})
        with around:
            self.step()
        self.gradients = {name: p.grad.clone() for name, p in self.module.named_parameters() if p.grad is not None}
        self.module.zero_grad(set_to_none=True)
        own = held([*self.module.parameters(), *self.module.buffers(), *self.inputs.values()])
        self.peak = own + peak_of(self.step, torch.device("cpu"))
        self.module.zero_grad(set_to_none=True)
        report = effcc.reports()[-1]
        self.predicted = report.plan.seconds if report.plan is not None else float("nan")
        self.predicted_peak = report.predicted_peak
        self.gap = report.activation.gap if report.activation is not None else None

    def step(self) -> None:
        self.module.zero_grad(set_to_none=True)
        torch.manual_seed(0)  # the same dropout for every method
        # The logits stay in the caller's hands until the backward is over, for every method: a budget must allow it.
        outputs = self.compiled(**self.inputs)
        outputs.loss.backward()

    def row(self, seconds: list[float] | None) -> dict[str, Any]:
        return {
            "method": self.name,
            "budget_bytes": self.budget if self.budget is not None else "",
            "peak_bytes": self.peak,
            "predicted_peak_bytes": self.predicted_peak,
            "predicted_seconds": self.predicted,
            "gap_to_bound": self.gap if self.gap is not None else "",
            "seconds": statistics.median(seconds) if seconds else "",
        }


def methods(model: Model, arguments: argparse.Namespace, refused: list[dict[str, Any]]) -> Iterator[Method]:
    common_options = {"cascades": arguments.cascades == "on", "gemm": arguments.gemm}

    def method(name: str, around: Any, **options: Any) -> Method:
        return Method(name, model, {**common_options, **options}, around)

    def planned(name: str, limit: int) -> Iterator[Method]:
        try:
            yield method(f"effcc {name}", contextlib.nullcontext(), memory_budget=limit, swap=arguments.swap)
        except Exception as error:
            cause = torch_internals.compile_error_cause(error)
            if not isinstance(cause, effcc.EffccError):
                raise
            refused.append({"budget": name, "budget_bytes": limit, "message": cause.message, "remedy": cause.remedy})
            print(f"effcc {name}: refused. {cause.message[:300]} {cause.remedy}", flush=True)

    plain = method("keep all (minimum cut)", contextlib.nullcontext())
    yield plain
    limits = {share: int(share * plain.peak) for share in arguments.shares}
    for share, limit in limits.items():
        yield from planned(f"{share}", limit)
    for solver in arguments.solvers:
        for budget in arguments.budgets:
            around = knapsack(budget, solver, arguments.ilp_seconds)
            other = method(f"torch knapsack {solver} {budget}", around)
            yield other
            yield from planned(f"= {other.name}", other.peak)
    for every in sorted({1, max(1, round(arguments.layers**0.5))}):
        around = splitting(lambda search, k=every: uniform_checkpointing(search, k))
        yield method(f"checkpoint every {every}", around)
    for share, limit in limits.items():
        yield method(f"greedy {share}", splitting(lambda search, b=limit: greedy(search, b)))


def check(made: list[Method]) -> list[str]:
    """What should hold and does not."""
    wrong = []
    wanted = made[0].gradients
    for method in made:
        if method.budget is not None and method.peak > method.budget:
            wrong.append(f"{method.name}: {method.peak} bytes, more than its budget of {method.budget}")
        for name, gradient in method.gradients.items():
            # Fused recomputation may round otherwise; replayed ops may not.
            distance = (gradient - wanted[name]).abs().max().item()
            if distance > 1e-5 * max(1e-3, wanted[name].abs().max().item()):
                wrong.append(f"{method.name}: the gradient of {name} is {distance:.2g} off")
    own = sorted((m for m in made if m.budget is not None), key=lambda m: m.budget or 0)
    for less, more in itertools.pairwise(own):
        if less.peak > more.peak or less.predicted < more.predicted * (1 - 1e-9):
            wrong.append(f"{less.name} against {more.name}: not monotone")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="llama")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--shares", type=float, nargs="*", default=[0.8, 0.6, 0.4, 0.3, 0.25])
    parser.add_argument("--cascades", choices=("off", "on"), default="off")
    parser.add_argument("--gemm", choices=("measure", "onednn", "blas"), default="blas")
    parser.add_argument("--solvers", nargs="*", choices=("dp", "ilp", "greedy"), default=["dp", "ilp"])
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.8, 0.5, 0.2, 0.0], help="torch's, relative")
    parser.add_argument("--ilp-seconds", type=float, default=20.0, help="time limit of torch's integer program")
    parser.add_argument("--minutes", type=float, default=60.0, help="no further methods are compiled after that")
    parser.add_argument("--swap", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = MODELS[arguments.model](arguments.layers, arguments.size)
    about = common.environment() | {key: value for key, value in vars(arguments).items() if key != "rounds"}
    made: list[Method] = []
    refused: list[dict[str, Any]] = []
    begin, complete = time.monotonic(), True
    for method in methods(model, arguments, refused):
        made.append(method)
        print(f"{(time.monotonic() - begin) / 60:5.1f} min", method.name, method.peak, method.predicted, flush=True)
        if time.monotonic() - begin > 60 * arguments.minutes:
            complete = False
            print(f"stopped: --minutes {arguments.minutes} are over; what would follow is left out")
            break
    times = common.interleaved({m.name: m.step for m in made}, arguments.rounds) if arguments.rounds else {}
    rows = [method.row(times.get(method.name)) for method in made]
    common.show(f"activations, {arguments.model}, {arguments.layers} layers", rows)
    wrong = check(made)
    for line in wrong:
        print(f"WRONG {line}")
    name = f"activation_{arguments.model}_{arguments.layers}_cascades_{arguments.cascades}"
    print(common.keep(name, rows, about | {"refused": refused, "wrong": wrong, "complete": complete}))


if __name__ == "__main__":
    main()
