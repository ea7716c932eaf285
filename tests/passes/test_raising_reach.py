"""Which values kernels could compute, told without working the kernels out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from effcc.passes.raising.choose import choose
from effcc.passes.raising.raise_graph import raise_graph
from effcc.passes.raising.reach import within_reach
from raised_graphs import EVERYTHING, record


def tower_on_a_table(layers: int) -> tuple[Any, tuple[torch.Tensor, ...]]:
    """Rows of a table go through ``layers`` residual layers; the table gets a gradient."""
    inputs = [torch.randn(16, 8, dtype=torch.float64, requires_grad=True), torch.arange(32) % 16]
    inputs += [torch.randn(8, 8, dtype=torch.float64, requires_grad=True) for _ in range(layers)]

    def run(table: torch.Tensor, tokens: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        x = table[tokens]
        for weight in weights:
            x = x + torch.tanh(x @ weight)
        return x.square().sum()

    return run, tuple(inputs)


@pytest.mark.parametrize(("layers", "near"), [(2, True), (40, False)])
def test_what_hangs_together_with_all_layers_is_in_no_kernel(layers: int, near: bool) -> None:
    joint = next(run.graph for run in record(*tower_on_a_table(layers)) if run.phase == "joint")
    summed = [node.name for node in joint.nodes if "index_put" in node.op]
    assert len(summed) == 1
    raised = raise_graph(joint)
    assert within_reach(raised, [summed]) == (near,)
    results = {name for group in choose(raised, EVERYTHING).groups for name in group.results}
    assert near or results.isdisjoint(summed)


def test_inputs_and_unknown_values_are_out_of_reach() -> None:
    joint = next(run.graph for run in record(*tower_on_a_table(1)) if run.phase == "joint")
    raised = raise_graph(joint)
    assert within_reach(raised, [[joint.inputs[0].name], ["no such value"], []]) == (False, False, True)
