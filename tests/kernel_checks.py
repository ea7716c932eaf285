"""What tests of generated kernels share: inputs for a cascade, and its kernel held to the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from effcc.codegen.cascade_kernel import DTYPE_NAMES, TORCH_DTYPES, prepare_cascade
from effcc.codegen.tiles.roles import Caches
from effcc.ir.cascade import Cascade, tensor_name
from effcc.ir.cascade_interpreter import evaluate
from effcc.ir.cascade_parser import parse_cascade
from known_cascades import KNOWN, REFUSED
from numpy.typing import NDArray

TEXTS = {name: known.text for name, known in KNOWN.items()} | {name: entry[0] for name, entry in REFUSED.items()}

#: So small that ordinary test sizes have several tiles in each direction.
SMALL_CACHES = Caches(first=1 << 10, second=1 << 12)


@dataclass
class Case:
    """A cascade, its kernel and its inputs (float64 arrays; integers and booleans as they are)."""

    cascade: Cascade
    kernel: Any
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

    def worst(self, device: str = "cpu") -> float:
        """The largest error, as a part of the output's largest magnitude (at least 1). NaN and infinities must
        agree."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        found, reference = self.kernel(tensors), self.reference()
        errors = [0.0]
        for name in self.kernel.outputs:
            own, expected = found[name].double().cpu().numpy(), reference[name]
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
    prepare: Callable[..., Any] = prepare_cascade,
    **settings: Any,
) -> Case:
    """Standard normal inputs, but for those ``given``. ``prepare`` makes the kernel, with ``settings``."""
    if prepare is prepare_cascade:
        settings.setdefault("caches", SMALL_CACHES)
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
    kernel = prepare(cascade, sizes, dtypes, shapes={name: array.shape for name, array in inputs.items()}, **settings)
    return Case(cascade, kernel, inputs, dict(sizes), dtype)


def known_case(name: str, source: Any, **settings: Any) -> Case:
    """Fresh sizes, all between 17 and 32 or 65 and 128: their tiles are the same, so the C++ is found in the cache."""
    text = TEXTS[name]
    ranks = [symbol.name for symbol in parse_cascade(text).ranks]
    sizes = {each: source.randint(65, 128) if each in ("n", "v", "t") else source.randint(17, 32) for each in ranks}
    if "X[i]" in text:
        sizes["j"] = sizes["i"]
    if "c*B" in text:
        sizes.update({"c": source.randint(2, 4), "j": 8, "B": 8})
    given: dict[str, Any] = {}
    if "T[t]" in text:
        given["T"] = np.array([source.randrange(sizes["v"]) for _ in range(sizes["t"])])
    shapes = {each: [sizes["c"] * 8, sizes["d" if each == "K" else "f"]] for each in ("K", "V") if "c" in sizes}
    generator = np.random.default_rng(source.randrange(2**32))
    return case(text, sizes, generator, given=given, shapes=shapes, **settings)


def attention_case(text: str, source: Any, dtype: str = "f64", **settings: Any) -> Case:
    """Fresh odd sizes of several tiles. ``L`` is the scores' true logsumexp, so that weights are at most 1."""
    generator = np.random.default_rng(source.randrange(2**32))
    n = source.randint(129, 190)
    sizes = {"b": 2, "h": 2, "r": 3, "R": 3, "m": source.randint(33, 120), "n": n, "d": 24, "f": 20, "W": 30, "P": 11}
    if "DOC" in text:
        sizes["m"] = n
    given: dict[str, Any] = {
        "DOC": np.sort(generator.integers(0, 3, size=(2, n)), axis=-1),
        # The first queries see nothing, the last ones all.
        "KEYS": np.sort(generator.integers(0, 100, size=(2, n)), axis=-1),
        "QUERIES": np.linspace(-20, 120, sizes["m"]).astype(int)[None].repeat(2, 0),
        "START": np.array([0, source.randint(1, n)]),
        "MASK": generator.random(size=(2, sizes["m"], n)) < 0.6,
        "SLOPE": generator.uniform(0, 1, size=2),
    }
    if "+ MASK" in text:
        given["MASK"] = np.where(given["MASK"], generator.normal(size=given["MASK"].shape), -np.inf)
    if "L[b,h,m]" in text:
        given |= saved(text, sizes, generator, given)
    shapes = {"Q": (2, 6, sizes["m"], 24)} if "h*R" in text else {}
    return case(text, sizes, generator, dtype, given, shapes, **settings)


def saved(
    text: str, sizes: Mapping[str, int], generator: np.random.Generator, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Queries, keys and the logsumexp of their scores, for a gradient's text."""
    head = "".join(line + "\n" for line in text.splitlines()[:2])
    cascade = parse_cascade(head + "L[b,h,m] = max[n] S[b,h,m,n]\n")
    inputs = {
        "Q": generator.normal(size=[sizes[s] for s in "bhmd"]),
        "K": generator.normal(size=[sizes[s] for s in "bhnd"]),
    }
    known = {name: given[name] for name in cascade.inputs if name in given}
    scores = evaluate(cascade, {**inputs, **known}, sizes)["S"]
    top = scores.max(-1, keepdims=True)
    return {**inputs, "L": (np.log(np.exp(scores - top).sum(-1, keepdims=True)) + top)[..., 0]}
