"""FX graphs of real models, captured once a process: what AOTAutograd hands to a compiler, with its values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import default_partition


@dataclass
class Captured:
    """One graph: ``args`` are what it was called with."""

    model: str
    phase: str
    gm: torch.fx.GraphModule
    args: list[Any] = field(default_factory=list)
    saved: int = 0
    forward: torch.fx.GraphModule | None = None

    def __str__(self) -> str:
        return f"{self.model}-{self.phase}"


def copy_value(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def capture(name: str, run: Callable[[Callable[..., Any]], None]) -> list[Captured]:
    """Graphs that ``run(backend)`` compiles and calls, in the order of compilation."""
    found: list[Captured] = []
    #: (joint, forward) pairs whose backward has not been compiled: autograd comes to the last one first.
    waiting: list[tuple[Captured, Captured]] = []

    def compiler(phase: str) -> Callable[..., Any]:
        def compile_graph(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            made = Captured(name, phase, gm)
            partner: Captured | None = None
            if phase == "forward":
                partner = next(one for one in reversed(found) if one.phase == "joint")
                waiting.append((partner, made))
            elif phase == "backward":
                partner, forward = waiting.pop()
                made.forward = forward.gm
            found.append(made)

            def call(args: list[Any]) -> Any:
                values = [copy_value(value) for value in args]
                if not made.args:
                    made.args = values
                    if partner is not None and phase == "forward":
                        partner.args = [copy_value(value) for value in values]
                    if partner is not None and phase == "backward":
                        wanted = sum(node.op == "placeholder" for node in partner.gm.graph.nodes)
                        partner.args += [copy_value(value) for value in values[len(partner.args) - wanted :]]
                args.clear()
                return torch.fx.Interpreter(gm).boxed_run([copy_value(value) for value in values])

            call._boxed_call = True  # type: ignore[attr-defined]
            return call

        return compile_graph

    def partition(gm: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        found.append(Captured(name, "joint", gm))
        return default_partition(gm, inputs, **options)

    backend = aot_autograd(
        fw_compiler=compiler("forward"),
        bw_compiler=compiler("backward"),
        inference_compiler=compiler("inference"),
        partition_fn=partition,
        keep_inference_input_mutations=True,
    )
    torch._dynamo.reset()
    torch.manual_seed(0)
    run(backend)
    torch._dynamo.reset()
    return found


def _language_model(kind: str, **changes: Any) -> torch.nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**changes)
    return getattr(transformers, f"{kind}ForCausalLM" if kind != "GPT2" else "GPT2LMHeadModel")(config)


def _train(model: torch.nn.Module, backend: Callable[..., Any], inputs: dict[str, Any], **options: Any) -> None:
    model.train()
    result = torch.compile(model, backend=backend, **options)(**inputs)
    result.loss.backward()


def _llama(backend: Callable[..., Any]) -> None:
    model = _language_model("Llama", **_SMALL, num_key_value_heads=1, num_hidden_layers=3)
    _train(model, backend, _tokens())


def _llama_dynamic(backend: Callable[..., Any]) -> None:
    model = _language_model("Llama", **_SMALL, num_key_value_heads=1, num_hidden_layers=2)
    inputs = _tokens()
    for tensor in inputs.values():
        torch._dynamo.mark_dynamic(tensor, 1)
    _train(model, backend, inputs)


def _llama_inference(backend: Callable[..., Any]) -> None:
    model = _language_model("Llama", **_SMALL, num_key_value_heads=1, num_hidden_layers=2).eval()
    with torch.no_grad():
        torch.compile(model, backend=backend)(input_ids=_tokens()["input_ids"])


def _mixtral(backend: Callable[..., Any]) -> None:
    model = _language_model(
        "Mixtral", **_SMALL, num_key_value_heads=1, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2
    )
    _train(model, backend, _tokens())


def _gpt2(backend: Callable[..., Any]) -> None:
    model = _language_model(
        "GPT2",
        vocab_size=64,
        n_embd=32,
        n_layer=3,
        n_head=2,
        n_positions=16,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
        loss_type="ForCausalLM",
    )
    _train(model, backend, _tokens())


def _t5(backend: Callable[..., Any]) -> None:
    import transformers

    config = transformers.T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        use_cache=False,
        decoder_start_token_id=0,
    )
    _train(transformers.T5ForConditionalGeneration(config), backend, _tokens())


def _vit(backend: Callable[..., Any]) -> None:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
    )
    model = transformers.ViTForImageClassification(config)
    _train(model, backend, {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])})


class ConvNet(torch.nn.Module):
    """Residual blocks with batch normalisation, whose running statistics are written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.Conv2d(8, 8, 3, padding=1, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
            )
            for _ in range(3)
        )
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


def _conv(backend: Callable[..., Any]) -> None:
    torch.compile(ConvNet().train(), backend=backend)(torch.randn(2, 3, 8, 8)).square().mean().backward()


def _conv_inference(backend: Callable[..., Any]) -> None:
    with torch.no_grad():
        torch.compile(ConvNet().train(), backend=backend)(torch.randn(2, 3, 8, 8))


_SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "use_cache": False}


def _tokens() -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 64, (2, 8))
    return {"input_ids": tokens, "labels": tokens.clone()}


MODELS: dict[str, Callable[[Callable[..., Any]], None]] = {
    "llama": _llama,
    "llama_dynamic": _llama_dynamic,
    "llama_inference": _llama_inference,
    "mixtral": _mixtral,
    "gpt2": _gpt2,
    "t5": _t5,
    "vit": _vit,
    "conv": _conv,
    "conv_inference": _conv_inference,
}
#: Without those that have nothing of their own: no symbols, no convolutions.
BY_DEFAULT = frozenset(MODELS) - {"llama", "mixtral", "gpt2", "vit", "t5"}


@functools.cache
def graphs_of(name: str) -> list[Captured]:
    """The captured graphs of one of ``MODELS``."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return capture(name, MODELS[name])
    finally:
        torch.set_num_threads(threads)
