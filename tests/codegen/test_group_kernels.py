"""Kernels of the groups that plain functions are raised to: each result against eager float64, with its NaNs."""

from __future__ import annotations

import pytest
from attention_variants import VARIANTS, Variant
from effcc.codegen.cascade_kernel import build
from effcc.codegen.fused_kernel import prepare_fused
from group_checks import LOOSE, WITHOUT_GROUPS, check_groups

pytestmark = pytest.mark.slow  # dozens of kernels are compiled

_QUICK = {"causal", "grouped_query", "differential", "empty_rows", "linear_cross_entropy_weighted", "joint_projection"}


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, id=v.name, marks=() if v.name in _QUICK else pytest.mark.slow) for v in VARIANTS.values()],
)
def test_groups_of_the_joint_graph(variant: Variant) -> None:
    tolerance = LOOSE.get(variant.name, 1e-9)
    kernels = check_groups(variant, prepare_fused, tolerance, build)
    assert bool(kernels) == (variant.name not in WITHOUT_GROUPS)
