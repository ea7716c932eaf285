"""What tests of generated kernels share: inputs for a cascade, and its kernel held to the interpreter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from effcc.codegen.cascade_kernel import DTYPE_NAMES, TORCH_DTYPES, CascadeKernel, prepare_cascade
from effcc.codegen.tiles.roles import Caches
from effcc.ir.cascade import Cascade, tensor_name
from effcc.ir.cascade_interpreter import evaluate
from effcc.ir.cascade_parser import parse_cascade
from numpy.typing import NDArray

#: So small that ordinary test sizes have several tiles in each direction.
SMALL_CACHES = Caches(first=1 << 10, second=1 << 12)


@dataclass
class Case:
    """A cascade, its kernel and its inputs (float64 arrays; integers and booleans as they are)."""

    cascade: Cascade
    kernel: CascadeKernel
    inputs: dict[str, NDArray[np.generic]]
    sizes: dict[str, int]
    dtype: str

    def tensors(self) -> dict[str, torch.Tensor]:
        found = {}
        for name, array in self.inputs.items():
            tensor = torch.tensor(array)
            found[name] = tensor.to(TORCH_DTYPES[self.dtype]) if tensor.dtype == torch.float64 else tensor
        return found

    def reference(self) -> dict[str, NDArray[np.float64]]:
        """The interpreter's float64 result, on the inputs as the kernel gets them."""
        rounded = {name: tensor.double().numpy() for name, tensor in self.tensors().items()}
        return evaluate(self.cascade, rounded, self.sizes)

    def worst(self) -> float:
        """The largest error, as a part of the output's largest magnitude (at least 1). NaN and infinities must
        agree."""
        found, reference = self.kernel(self.tensors()), self.reference()
        errors = [0.0]
        for name in self.kernel.outputs:
            own, expected = found[name].double().numpy(), reference[name]
            np.testing.assert_array_equal(np.isnan(own), np.isnan(expected), err_msg=name)
            finite = np.isfinite(expected)
            np.testing.assert_array_equal(own[~finite], expected[~finite], err_msg=name)
            scale = max(1.0, float(np.abs(expected[finite]).max(initial=0.0)))
            errors.append(float(np.abs(own - expected)[finite].max(initial=0.0)) / scale)
        return max(errors)


def case(
    text: str,
    sizes: Mapping[str, int],
    generator: np.random.Generator,
    dtype: str = "f64",
    given: Mapping[str, NDArray[np.generic]] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    caches: Caches | None = SMALL_CACHES,
    crossing: bool = True,
) -> Case:
    """Standard normal inputs, but for those ``given``."""
    cascade = parse_cascade(text)
    inputs: dict[str, NDArray[np.generic]] = dict(given or {})
    for einsum in cascade.einsums:
        for item in einsum.reads:
            name = tensor_name(item)
            if name in cascade.inputs and name not in inputs:
                shape = (shapes or {}).get(name) or [sizes[str(index)] for index in item.args]
                inputs[name] = generator.normal(size=shape)
    inputs = {name: array for name, array in inputs.items() if name in cascade.inputs}
    dtypes = {
        name: dtype if array.dtype == np.float64 else DTYPE_NAMES[torch.tensor(array).dtype]
        for name, array in inputs.items()
    }
    kernel = prepare_cascade(
        cascade,
        sizes,
        dtypes,
        shapes={name: array.shape for name, array in inputs.items()},
        caches=caches,
        crossing=crossing,
    )
    return Case(cascade, kernel, inputs, dict(sizes), dtype)
