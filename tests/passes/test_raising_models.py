"""Whole small models, forward and backward: every raised value, and which groups are found."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from effcc.passes.raising.choose import Choice, choose
from effcc.passes.raising.raise_graph import raise_graph
from raised_graphs import EVERYTHING, Run, check_groups, check_raised, record
from torch import Tensor

#: The models run in float32, the cascades in float64.
_TOLERANCE = 1e-4


def _record(model: torch.nn.Module, tokens: Tensor) -> list[Run]:
    """The joint graphs of a training step, one for each part between graph breaks."""
    runs = record(lambda: model(input_ids=tokens, labels=tokens).loss, (), model=True)
    return [run for run in runs if run.phase == "joint"]


@functools.cache
def _llama(layers: int) -> list[Run]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    return _record(transformers.LlamaForCausalLM(config), torch.randint(0, 48, (2, 12)))


@functools.cache
def _gpt2() -> list[Run]:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=16, use_cache=False, attn_implementation="eager",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return _record(transformers.GPT2LMHeadModel(config), torch.randint(0, 48, (2, 12)))


_MODELS = {"llama": functools.partial(_llama, 3), "gpt2": _gpt2}
_NAMES = ["llama", pytest.param("gpt2", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", _NAMES)
def test_whole_model(name: str) -> None:
    found = [check_raised(joint, _TOLERANCE) for joint in _MODELS[name]()]
    assert sum(compared for _, compared in found) > 100
    assert sum(len(raised.kept) for raised, _ in found) < 30


@pytest.mark.parametrize("name", _NAMES)
def test_attention_and_loss_of_a_whole_model_are_fused(name: str) -> None:
    groups = [group for joint in _MODELS[name]() for group in check_groups(joint, EVERYTHING, _TOLERANCE)]
    sizes = [{int(size) for size in group.fused.sizes.values()} for group in groups]
    scores = [group for group, found in zip(groups, sizes, strict=True) if 12 in found and len(group.grid) >= 2]
    # Two layers: a forward and a backward each.
    softmaxes = [group for group in scores if any(einsum.reduction == "max" for einsum in group.fused.cascade.einsums)]
    assert len([group for group in softmaxes if len(group.grid) > 1]) >= 2
    if name == "llama":  # GPT-2's logits leave a graph, at a graph break
        assert any(48 in found for found in sizes), "the loss over the vocabulary"


def test_equal_layers_cost_one() -> None:
    """The fused cascades of equal layers are equal, down to the names."""
    (joint,) = _llama(3)
    groups = choose(raise_graph(joint.graph), EVERYTHING).groups
    fused = [group.fused for group in groups if len(group.grid) >= 3]
    assert len(fused) >= 6
    kinds: list[Any] = []
    for each in fused:
        if each not in kinds:
            kinds.append(each)
    # Forward and backward; the first layer's may differ in an operand's layout.
    assert len(kinds) <= 3
    assert len({id(group.rewriting) for group in groups}) < len(groups)


def test_what_computing_bounds_is_left_alone() -> None:
    """A layer's projections gain nothing from being fused."""

    def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return torch.nn.functional.gelu(x @ up, approximate="tanh") @ down

    x, up, down = (torch.empty(*shape, device="meta") for shape in ((512, 1024), (1024, 4096), (4096, 1024)))
    with torch.no_grad():
        (run,) = record(mlp, (x, up, down))
    chosen = choose(raise_graph(run.graph), Choice())
    assert not chosen.groups
    assert any("computing" in refused.why or "predicted" in refused.why for refused in chosen.refused)
