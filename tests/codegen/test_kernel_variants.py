"""Kernels that are generated otherwise than by the generator's rules: what there is, its text, and what it computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_variants import VARIANTS, with_gradients
from effcc.codegen.cascade_kernel import build
from effcc.codegen.cascade_op import cascade_text
from effcc.codegen.fused_kernel import FusedKernel, prepare_fused
from effcc.codegen.kernel_variants import KernelVariants
from effcc.cost_model.tile_cost import TileRates
from effcc.ir.fused_cascade import FusedCascade
from effcc.ir.parser import parse_fused_cascade
from effcc.passes.raising.choose import choose
from effcc.passes.raising.group import Group
from effcc.passes.raising.raise_graph import raise_graph
from effcc.passes.rewrite_cascade import Rewriting
from group_checks import check_groups
from raised_graphs import EVERYTHING, record

RATES = TileRates(2, 16, 1e11, 4e-10, (("exp", 6e-11),), ((6e4, 9e10), (1e6, 3e10), (1e8, 6e9)), 1e-6)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / 8, -1) @ v


def groups_of(rows: int, keys: int) -> tuple[Group, ...]:
    values = [torch.randn(1, 2, count, 16) for count in (rows, keys, keys)]
    (run,) = record(attention, values)
    return choose(raise_graph(run.graph), EVERYTHING).groups


def test_variants_differ_and_the_rules_own_is_first() -> None:
    (group,) = groups_of(300, 600)
    found = KernelVariants(RATES)(group)
    assert len(found) > 2
    assert found[0].schedule == ()
    assert found[0].what.endswith("(rule)")
    assert len({each.what for each in found}) == len(found)
    assert all(each.seconds > 2 * 2 * 300 * 600 * 32 / 1e11 / 2 for each in found), "no faster than its products"


def test_one_row_of_queries_can_be_split_into_parts() -> None:
    (group,) = groups_of(1, 4096)
    chosen = {dict(each.schedule).get("parts") for each in KernelVariants(replace(RATES, threads=8))(group)}
    assert len(chosen - {None}) >= 2


def test_the_text_reads_back_with_its_schedule() -> None:
    (group,) = groups_of(64, 64)
    fused = replace(group.fused, schedule={"rows": 32, "streamed": 64, "parts": 2, "crossing": 0})
    assert parse_fused_cascade(cascade_text(fused)).schedule == fused.schedule
    assert cascade_text(fused) != cascade_text(group.fused), "another kernel"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "grouped_query", "sliding_window"])
@pytest.mark.parametrize("schedule", [{"rows": 16, "streamed": 16}, {"crossing": 0}, {"parts": 3}, {"parts": 1}])
def test_every_schedule_computes_eagers_values(name: str, schedule: Mapping[str, int]) -> None:
    def prepare(fused: FusedCascade, rewriting: Rewriting, **settings: Any) -> FusedKernel:
        return prepare_fused(replace(fused, schedule=dict(schedule)), rewriting, **settings)

    assert check_groups(VARIANTS[name], prepare, 1e-9, build)


@pytest.mark.slow
def test_what_is_offered_for_a_backward_computes_eagers_values() -> None:
    variant = VARIANTS["causal"]
    inputs = variant.inputs(1, torch.float64)
    (run,) = [each for each in record(variant.function, with_gradients(variant, inputs)) if each.phase == "joint"]
    for group in choose(raise_graph(run.graph), EVERYTHING).groups:
        for each in KernelVariants(RATES)(group):
            wanted = dict(each.schedule)

            def prepare(fused: FusedCascade, rewriting: Rewriting, wanted: Any = wanted, **more: Any) -> FusedKernel:
                return prepare_fused(replace(fused, schedule=wanted), rewriting, **more)

            assert check_groups(variant, prepare, 1e-9, build)
