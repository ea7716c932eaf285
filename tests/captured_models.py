"""Real models captured through torch.compile: forward and backward graphs as the planner gets them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from effcc.frontend.fx_import import from_fx
from effcc.ir.graph import Graph
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition


@dataclass(frozen=True)
class Example:
    """A model with its captured graphs; ``call`` runs the training step (forward and backward) eagerly. ``modules`` are
    the FX graphs beside ``graphs``, ``arguments`` what each forward was called with."""

    model: torch.nn.Module
    graphs: tuple[Graph, ...]
    modules: tuple[torch.fx.GraphModule, ...]
    arguments: tuple[list[Any], ...]
    call: Callable[[], None]


@dataclass
class _Compiled:
    phase: str
    module: torch.fx.GraphModule
    arguments: list[Any]
    saved: int = 0
    backward: torch.fx.GraphModule | None = None


def capture(model: torch.nn.Module, loss: Callable[[torch.nn.Module], torch.Tensor]) -> Example:
    """Graphs of ``loss(model)``, each forward (or part without gradient) in call order, then the backwards, last first.
    Roles are found from the memory of the real inputs."""
    compiled: list[_Compiled] = []
    parted: list[tuple[int, torch.fx.GraphModule]] = []

    def compiler(phase: str) -> Callable[..., Any]:
        def compile_graph(gm: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
            entry = _Compiled(phase, gm, [])
            if phase == "forward":
                entry.saved, entry.backward = parted[-1]
            if phase != "backward":
                compiled.append(entry)

            def call(args: list[Any]) -> Any:
                entry.arguments = entry.arguments or list(args)
                return torch.fx.Interpreter(gm).boxed_run(list(args))

            call._boxed_call = True  # type: ignore[attr-defined]
            return call

        return compile_graph

    def partition(gm: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        forward, backward = min_cut_rematerialization_partition(gm, inputs, **options)
        (output,) = forward.graph.find_nodes(op="output")
        parted.append((len(output.args[0]) - options["num_fwd_outputs"], backward))
        return forward, backward

    torch._dynamo.reset()
    torch.manual_seed(0)
    backend = aot_autograd(
        fw_compiler=compiler("forward"),
        bw_compiler=compiler("backward"),
        inference_compiler=compiler("inference"),
        partition_fn=partition,
    )
    loss(torch.compile(model, backend=backend)).backward()
    model.zero_grad()
    torch._dynamo.reset()
    owned = {b.data_ptr(): "buffer" for b in model.buffers() if b.numel()}
    owned |= {p.data_ptr(): "parameter" for p in model.parameters()}
    forwards, backwards, modules = [], [], []
    for index, entry in enumerate(compiled):
        roles = [
            owned.get(value.data_ptr(), "input") if isinstance(value, torch.Tensor) else "symbol"
            for value in entry.arguments
        ]
        forwards.append(from_fx(entry.module, f"graph{index}", entry.phase, roles, entry.saved))
        if entry.backward is not None:
            names = [str(node.target) for node in entry.backward.graph.find_nodes(op="placeholder")]
            roles = ["tangent" if name.startswith("tangents") else "saved" for name in names]
            back = from_fx(entry.backward, f"graph{index}", "backward", roles, forward=entry.module)
            backwards.append(back)
            modules.append(entry.backward)
    modules = [*(entry.module for entry in compiled), *reversed(modules)]
    graphs = (*forwards, *reversed(backwards))
    arguments = tuple(entry.arguments for entry in compiled)
    return Example(model, graphs, tuple(modules), arguments, lambda: loss(model).backward())


def _language_loss(vocabulary: int, shape: tuple[int, int]) -> Callable[[torch.nn.Module], torch.Tensor]:
    tokens = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(1))
    return lambda model: model(input_ids=tokens, labels=tokens).loss


def llama(layers: int = 2, attention: str = "sdpa") -> Example:
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
        attn_implementation=attention,
    )
    return capture(transformers.LlamaForCausalLM(config), _language_loss(256, (2, 32)))


def gpt2() -> Example:
    config = transformers.GPT2Config(
        vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=64, use_cache=False, attn_implementation="eager",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return capture(transformers.GPT2LMHeadModel(config), _language_loss(256, (2, 32)))


class ResidualNet(torch.nn.Module):
    """Strided, grouped, dilated and transposed convolutions with batch norm and residual sums."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 16, 5, stride=2, padding=2)
        self.norm = torch.nn.BatchNorm2d(16)
        self.grouped = torch.nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False)
        self.dilated = torch.nn.Conv2d(16, 32, 3, padding=2, dilation=2)
        self.up = torch.nn.ConvTranspose2d(32, 8, 2, stride=2)
        self.head = torch.nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.grouped(x)
        x = self.up(torch.relu(self.dilated(x)))
        return self.head(x.mean((2, 3)))


def residual_net() -> Example:
    images = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    return capture(ResidualNet(), lambda model: model(images).square().mean())


_MAKERS: dict[str, Callable[[], Example]] = {
    "llama": llama,
    "llama_eager": functools.partial(llama, attention="eager"),
    "gpt2": gpt2,
    "residual_net": residual_net,
}


@functools.cache
def example(name: str) -> Example:
    """Captured example by name: llama, llama_eager, gpt2 (with graph breaks) or residual_net. Captured once."""
    return _MAKERS[name]()
