"""Kernels of the groups that plain functions are raised to: each result against eager float64, with its NaNs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from attention_variants import VARIANTS, Variant, with_gradients
from effcc.codegen.cascade_kernel import TORCH_DTYPES, build
from effcc.codegen.fused_kernel import prepare_fused
from effcc.ir.types import TensorType
from effcc.passes.raising.choose import choose
from effcc.passes.raising.raise_graph import raise_graph
from fresh_seed import fresh_random
from raised_graphs import EVERYTHING, assert_close, record

pytestmark = pytest.mark.slow  # dozens of kernels are compiled

_QUICK = {"causal", "grouped_query", "differential", "empty_rows", "linear_cross_entropy_weighted", "joint_projection"}
#: T5 computes its buckets from float32 logarithms, whatever the model's type.
_TOLERANCE = {"t5_relative": 1e-6}


def operand(array: Any, kind: TensorType) -> torch.Tensor:
    """A recorded value as the operand that a group was made for."""
    values = torch.tensor(np.asarray(array)).to(TORCH_DTYPES[kind.dtype]).reshape([int(n) for n in kind.shape])
    if kind.stride is None or 0 in kind.stride:
        return values
    made = torch.empty_strided(values.shape, [int(n) for n in kind.stride], dtype=values.dtype)
    return made.copy_(values)


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, id=v.name, marks=() if v.name in _QUICK else pytest.mark.slow) for v in VARIANTS.values()],
)
def test_groups_of_the_joint_graph(variant: Variant) -> None:
    inputs = variant.inputs(fresh_random().getrandbits(32), torch.float64)
    (run,) = [each for each in record(variant.function, with_gradients(variant, inputs)) if each.phase == "joint"]
    groups = choose(raise_graph(run.graph), EVERYTHING).groups
    kernels = [prepare_fused(group.fused, group.rewriting, wide=frozenset(group.wide)) for group in groups]
    assert kernels
    build([each.kernel for each in kernels])
    hidden: dict[str, Any] = {}
    for group, kernel in zip(groups, kernels, strict=True):
        values = {**hidden, **run.values}
        operands = [
            operand(values[name], kind) for name, kind in zip(group.operands, group.fused.operands, strict=True)
        ]
        for name, result in zip(group.results, kernel(operands), strict=True):
            found = result.double().numpy()
            if name not in run.values:
                hidden[name] = found
                continue
            wanted = np.asarray(run.values[name]).reshape(found.shape)
            assert_close(found, wanted, f"{group.name}: {name}", _TOLERANCE.get(variant.name, 1e-9))
