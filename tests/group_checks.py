"""Kernels of the groups that plain functions are raised to, held to eager's values: what tests of all kinds of kernels
share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from attention_variants import Variant, with_gradients
from effcc.codegen.fused_kernel import PlacedKernel
from effcc.codegen.prepared import TORCH_DTYPES
from effcc.ir.types import TensorType
from effcc.passes.raising.choose import choose
from effcc.passes.raising.raise_graph import raise_graph
from fresh_seed import fresh_random
from raised_graphs import EVERYTHING, assert_close, record

#: T5 computes its buckets from float32 logarithms, whatever the model's type.
LOOSE = {"t5_relative": 1e-6}
#: Variants whose joint graph has no tensor that one kernel could spare: norms, one query alone, and distances summed
#: over a third rank, which would be computed again.
WITHOUT_GROUPS = {"decode", "kernel_density", "layer_norm", "rms_norm"}


def operand(array: Any, kind: TensorType) -> torch.Tensor:
    """A recorded value as the operand that a group was made for."""
    values = torch.tensor(np.asarray(array)).to(TORCH_DTYPES[kind.dtype]).reshape([int(n) for n in kind.shape])
    if kind.stride is None or 0 in kind.stride:
        return values
    made = torch.empty_strided(values.shape, [int(n) for n in kind.stride], dtype=values.dtype)
    return made.copy_(values)


def check_groups(
    variant: Variant,
    prepare: Callable[..., PlacedKernel[Any]],
    tolerance: float,
    build: Callable[[Sequence[Any]], None] = lambda kernels: None,
    dtype: torch.dtype = torch.float64,
) -> list[PlacedKernel[Any]]:
    """Kernels for all groups of a variant's joint graph: each result against eager's value, with its NaNs.

    ``prepare`` makes the kernel of a fused cascade, ``build`` compiles kernels of cascades together.
    """
    inputs = variant.inputs(fresh_random().getrandbits(32), dtype)
    (run,) = [each for each in record(variant.function, with_gradients(variant, inputs)) if each.phase == "joint"]
    groups = choose(raise_graph(run.graph), EVERYTHING).groups
    kernels = [prepare(group.fused, group.rewriting, wide=frozenset(group.wide)) for group in groups]
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
            assert_close(found, wanted, f"{group.name}: {name}", tolerance)
    return kernels
