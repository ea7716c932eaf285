"""What keeping less of the forward costs: effcc's budget beside torch's knapsack and uniform checkpointing.

    python benchmarks/activation.py [--model llama|gpt2] [--layers N] [--rounds R]

Every method splits the same joint graph; the code is compiled by the same backend and libraries. ``peak_bytes`` is the
allocator's, exact: what a step holds with parameters, gradients and inputs. ``predicted_seconds`` are the cost model's;
``seconds`` measured ones, medians of interleaved rounds (left out with --rounds 0).
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Callable, Iterator
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

Model = tuple[torch.nn.Module, torch.Tensor]


def llama(layers: int, size: str) -> Model:
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, vocabulary, length = (256, 8192, 512) if size == "full" else (64, 512, 128)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=int(hidden * 2.75) // 8 * 8,
        num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=8, use_cache=False,
        attn_implementation="eager", max_position_embeddings=length,
    )  # fmt: skip
    return LlamaForCausalLM(config), torch.randint(0, vocabulary, (2, length))


def gpt2(layers: int, size: str) -> Model:
    from transformers import GPT2Config, GPT2LMHeadModel

    width, vocabulary, length = (256, 8192, 512) if size == "full" else (64, 512, 128)
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=length, n_embd=width, n_layer=layers, n_head=8, use_cache=False,
        attn_implementation="eager", bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config), torch.randint(0, vocabulary, (2, length))


MODELS = {"llama": llama, "gpt2": gpt2}
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
def knapsack(budget: float) -> Iterator[None]:
    def partition(gm: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        return torch_internals.knapsack_partition(gm, inputs, budget, **kwargs)

    with torch_internals.joint_partitioner(partition):
        yield


def held(tensors: Any) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class Method:
    """A compiled training step with its peak and predicted time."""

    def __init__(self, name: str, model: Model, options: dict[str, Any], around: Any) -> None:
        self.name, (self.module, self.tokens) = name, model
        torch._dynamo.reset()
        effcc.reset_reports()
        self.compiled = torch.compile(self.module, backend="effcc", options={"repeated_modules": False, **options})
        with around:
            self.step()
        self.module.zero_grad(set_to_none=True)
        own = held([*self.module.parameters(), *self.module.buffers(), self.tokens])
        self.peak = own + peak_of(self.step, torch.device("cpu"))
        self.module.zero_grad(set_to_none=True)
        report = effcc.reports()[-1]
        self.predicted = report.plan.seconds if report.plan is not None else float("nan")
        self.predicted_peak = report.predicted_peak
        self.gap = report.activation.gap if report.activation is not None else None

    def step(self) -> None:
        self.module.zero_grad(set_to_none=True)
        self.compiled(input_ids=self.tokens, labels=self.tokens).loss.backward()

    def row(self, seconds: list[float] | None) -> dict[str, Any]:
        return {
            "method": self.name,
            "peak_bytes": self.peak,
            "predicted_peak_bytes": self.predicted_peak,
            "predicted_seconds": self.predicted,
            "gap_to_bound": self.gap if self.gap is not None else "",
            "seconds": statistics.median(seconds) if seconds else "",
        }


def methods(model: Model, layers: int, shares: list[float]) -> Iterator[Method]:
    plain = Method("keep all (minimum cut)", model, {}, contextlib.nullcontext())
    yield plain
    for budget in (0.5, 0.2, 0.0):
        yield Method(f"torch knapsack {budget}", model, {}, knapsack(budget))
    for every in sorted({1, max(1, round(layers**0.5))}):
        yield Method(
            f"checkpoint every {every}", model, {}, splitting(lambda search, k=every: uniform_checkpointing(search, k))
        )
    for share in shares:
        limit = int(share * plain.peak)
        yield Method(f"greedy {share}", model, {}, splitting(lambda search, b=limit: greedy(search, b)))
        try:
            yield Method(f"effcc {share}", model, {"memory_budget": limit}, contextlib.nullcontext())
        except Exception as error:
            cause = torch_internals.compile_error_cause(error)
            print(f"effcc {share}: {str(getattr(cause, 'message', cause)).splitlines()[0][:200]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="llama")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--shares", type=float, nargs="*", default=[0.8, 0.6, 0.4])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = MODELS[arguments.model](arguments.layers, arguments.size)
    about = common.environment() | {key: value for key, value in vars(arguments).items() if key != "rounds"}
    made = []
    for method in methods(model, arguments.layers, arguments.shares):
        made.append(method)
        print(method.name, method.peak, method.predicted, flush=True)
    times = common.interleaved({m.name: m.step for m in made}, arguments.rounds) if arguments.rounds else {}
    rows = [method.row(times.get(method.name)) for method in made]
    common.show(f"activations, {arguments.model}, {arguments.layers} layers", rows)
    print(common.keep(f"activation_{arguments.model}_{arguments.layers}", rows, about))


if __name__ == "__main__":
    main()
