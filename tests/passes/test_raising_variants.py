"""Attention of every kind, losses and norms, raised from plain PyTorch and held against eager float64."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from attention_variants import ATTENTION, LOSSES, VARIANTS, Variant, with_gradients
from effcc.passes.cascade_analysis import pass_table
from effcc.passes.raising.group import Group
from fresh_seed import fresh_random
from raised_graphs import Run, check_groups, check_raised, record

#: One of each kind is run by default, all with ``-m slow``.
_QUICK = {
    "causal", "t5_relative", "sliding_window", "grouped_query_expanded", "sink_joined", "differential", "empty_rows",
    "builtin_mask", "joint_projection", "linear_cross_entropy_weighted", "layer_norm_linear", "kernel_density",
}  # fmt: skip


def _some(variants: Iterable[Variant]) -> list[Any]:
    return [pytest.param(v, id=v.name, marks=() if v.name in _QUICK else pytest.mark.slow) for v in variants]


_ALL = _some(VARIANTS.values())
_ONE_PASS = _some(v for v in (*ATTENTION, *LOSSES) if v.one_pass)


@functools.cache
def _runs(variant: Variant, decomposed: bool = True) -> list[Run]:
    """Inference graph, then forward, backward and joint graph, of inputs that are new in each test run."""
    inputs = variant.inputs(fresh_random().getrandbits(32), torch.float64)
    with torch.no_grad():
        runs = record(variant.function, inputs, decomposed=decomposed)
    return runs + record(variant.function, with_gradients(variant, inputs), decomposed=decomposed)


#: T5 computes its buckets from float32 logarithms, whatever the model's type.
_TOLERANCE = {"t5_relative": 1e-6}


@pytest.mark.parametrize("variant", _ALL)
def test_raised_cascade_gives_every_value(variant: Variant) -> None:
    for run in _runs(variant):
        raised, compared = check_raised(run, _TOLERANCE.get(variant.name, 1e-9))
        assert compared >= 1
        assert len(raised.cascade.einsums) <= 60


@pytest.mark.parametrize("name", ["vanilla", "causal", "builtin_causal", "linear_cross_entropy", "layer_norm"])
def test_composite_ops_are_raised_too(name: str) -> None:
    """Without Inductor's decompositions there are softmax, layer norm and nll_loss ops, and their gradients."""
    for run in _runs(VARIANTS[name], decomposed=False):
        raised, compared = check_raised(run)
        assert compared >= 1
        assert not raised.kept


@pytest.mark.parametrize("variant", _ALL)
def test_groups_give_their_results(variant: Variant) -> None:
    for run in _runs(variant):
        check_groups(run, tolerance=_TOLERANCE.get(variant.name, 1e-9))


def _one_pass(group: Group) -> bool:
    table = pass_table(group.rewriting.cascade)
    streamed = {symbol.name for symbol in group.streamed}
    inputs = {view.tensor for view in group.fused.inputs}
    return all(
        count <= 1
        for name, ranks in table.items()
        if name in inputs
        for rank, count in ranks.items()
        if rank in streamed
    )


@pytest.mark.parametrize("variant", _ONE_PASS)
def test_one_kernel_without_a_wide_tensor(variant: Variant) -> None:
    """The forward is one group, whose inputs are read once, and which writes nothing of queries times keys."""
    run = _runs(variant)[0]
    groups = check_groups(run, tolerance=_TOLERANCE.get(variant.name, 1e-9))
    group = max(groups, key=lambda group: len(group.wide))
    assert _one_pass(group)
    wide = {frozenset(e.kept) for e in group.fused.cascade.einsums if e.output in group.wide}
    for view in group.fused.outputs:
        assert not any(space <= frozenset(view.ranks) for space in wide)


#: Variants whose backward is one group too: softmax's sum is exchanged with the output's.
_BACKWARD = [
    "vanilla", "causal", "causal_tril", "alibi", "t5_relative", "softcap", "sliding_window", "prefix_lm",
    "document_mask", "grouped_query", "grouped_query_expanded", "multi_query", "cross", "sink", "qk_norm",
    "temperature", "sink_joined", "sigmoid", "gated", "latent", "additive_mask", "boolean_mask", "empty_rows",
    "padded", "builtin", "builtin_causal", "builtin_mask", "joint_projection", "rotary",
]  # fmt: skip


@pytest.mark.parametrize("variant", _some(VARIANTS[name] for name in _BACKWARD))
def test_forward_and_backward_are_a_kernel_each(variant: Variant) -> None:
    (joint,) = [run for run in _runs(variant) if run.phase == "joint"]
    groups = check_groups(joint, tolerance=_TOLERANCE.get(variant.name, 1e-9))
    attention = [group for group in groups if len(group.wide) >= 2]
    assert len(attention) == 2
    assert all(map(_one_pass, attention))
    forward, backward = attention
    # The backward computes its weights again, from narrow results of the forward. (A sigmoid needs none.)
    assert variant.name == "sigmoid" or set(forward.results) & set(backward.operands)
