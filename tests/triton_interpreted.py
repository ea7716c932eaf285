"""Triton kernels in Triton's interpreter, held to float64 and eager: run in a process of its own, which prints one line
of JSON, check -> largest error (or the reason why it failed).

    TRITON_INTERPRET=1 python triton_interpreted.py "forward, vanilla" "group, causal"

Without names it runs all checks. ``CHECKS`` lists them.
"""

from __future__ import annotations

import functools
import json
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from attention_cascades import BACKWARD, FORWARD, GROUPED
from attention_variants import VARIANTS
from effcc.codegen.fused_kernel import prepare_with
from effcc.codegen.triton_tiles.kernel import TritonKernel, prepare_triton
from effcc.codegen.triton_tiles.schedule import Launch, Shape
from effcc.codegen.triton_tiles.target import Target
from fresh_seed import fresh_random
from group_checks import LOOSE, WITHOUT_GROUPS, check_groups
from kernel_checks import TEXTS, Case, attention_case, case, known_case

#: A GPU with so few multiprocessors that nothing is cut into parts, and one with so many that single rows are.
_SMALL, _LARGE = Target.of_capability(90, 1), Target.of_capability(90, 6)
#: Tiles of 32 by 32 or so: test sizes have several in each direction.
_TILES = Shape(0.25, 0.5)
_TINY = Shape(0.125, 0.25)

prepare: Callable[..., TritonKernel] = functools.partial(prepare_triton, target=_SMALL, shape=_TILES)
prepare_group = functools.partial(prepare_with, functools.partial(prepare_triton, target=_SMALL, shape=_TINY))


def attention(text: str, dtype: str) -> float:
    found = attention_case(text, fresh_random(), dtype, prepare=prepare)
    assert found.kernel.buffer_bytes == 0, "something is stored between launches"
    return found.worst()


def by_descriptors(text: str) -> float:
    """Tiles read through the tensor memory accelerator, and the same kernel where a tensor's layout forbids it."""
    make = functools.partial(prepare, launches=Launch(4, 2, descriptors=True))
    found = attention_case(text, fresh_random(), "f32", prepare=make)
    assert all(step.function.descriptors for step in found.kernel.steps), "nothing is described"
    plain = found.tensors()
    shifted = {name: torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t) for name, t in plain.items()}
    first, second = found.kernel(plain), found.kernel(shifted)
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first), "the two kernels differ"
    return found.worst()


def known(name: str) -> float:
    return known_case(name, fresh_random(), prepare=prepare).worst()


def group(name: str, dtype: torch.dtype = torch.float64, tolerance: float = 1e-9) -> float:
    assert check_groups(VARIANTS[name], prepare_group, max(tolerance, LOOSE.get(name, 0.0)), dtype=dtype), "no group"
    return 0.0


def in_parts(text: str) -> float:
    """One row or few over a long fiber: the fiber in parts, merged by a second launch."""
    source = fresh_random()
    sizes = {"b": 1, "h": 1, "m": source.choice([1, 3]), "n": source.randint(700, 900), "d": 8, "f": 5, "r": 3, "R": 3}
    if "LN[m,d]" in text:
        sizes.update({"d": sizes["n"], "m": 2})
    given = {"START": np.array([source.randint(0, 3)])}
    shapes = {"Q": (1, 3, sizes["m"], 8)} if "h*R" in text else {}
    generator = np.random.default_rng(source.randrange(2**32))
    found = case(text, sizes, generator, given=given, shapes=shapes, prepare=prepare_triton, target=_LARGE)
    assert any(loop.part is not None for program in found.kernel.programs for loop in program.loops), "no parts"
    return found.worst()


def masked_rows() -> float:
    """NaN where every key is masked by -inf; the uniform average where the mask is finite."""
    sizes = {"b": 1, "h": 2, "m": 40, "n": 70, "d": 16, "f": 16}
    generator = np.random.default_rng(fresh_random().randrange(2**32))
    start = {"START": np.array([7])}
    worst = 0.0
    for name in ("left padding", "left padding, finite"):
        text = FORWARD[name].replace("-1e30", str(torch.finfo(torch.float32).min))
        found = case(text, sizes, generator, "f32", start, prepare=prepare)
        result = found.kernel(found.tensors())["O"]
        if name == "left padding":
            assert result[:, :, :7].isnan().all() and not result[:, :, 7:].isnan().any()
        else:
            mean = found.tensors()["V"].mean(2, keepdim=True).expand(-1, -1, 7, -1)
            worst = (result[:, :, :7] - mean).abs().max().item()
    return worst


def nan_and_infinity() -> float:
    """Rows that see a NaN are NaN, as are those that eager makes so; others are not."""
    sizes = {"b": 1, "h": 2, "m": 40, "n": 40, "d": 16, "f": 16}
    found = case(FORWARD["causal"], sizes, np.random.default_rng(1), "f32", prepare=prepare)
    found.inputs["K"][0, 0, 20, 3] = np.nan
    found.inputs["Q"][0, 1, 5, 0] = np.inf
    result = found.kernel(found.tensors())["O"]
    assert result[0, 0, 20:].isnan().all() and not result[0, 0, :20].isnan().any()
    q, k, v = (found.tensors()[name] for name in "QKV")
    scores = (q @ k.transpose(-1, -2) * 0.125).masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf)
    assert torch.equal(result[0, 1].isnan(), (torch.softmax(scores, -1) @ v)[0, 1].isnan())
    return 0.0


def strided() -> float:
    """Operands and results that are not contiguous, and one of whose elements none are neighbours."""
    text = "S[m] = sum[n] X[m,n]\nY[m,n] = X[m,n] - S[m]\n"
    from effcc.ir.cascade_parser import parse_cascade

    kernel = prepare(parse_cascade(text), {"m": 50, "n": 70}, "f64", units={"X": None, "Y": None})
    x = torch.randn(70, 50, dtype=torch.float64).t()
    whole = torch.zeros(50, 140, dtype=torch.float64)
    result = kernel({"X": x}, out={"Y": whole[:, ::2]})["Y"]
    assert result.data_ptr() == whole.data_ptr() and (whole[:, 1::2] == 0).all()
    return float((result - (x - x.sum(1, keepdim=True))).abs().max())


def long_features(width: int) -> float:
    """Products over so many features that they are taken in several steps."""
    source = fresh_random()
    sizes = {"b": 1, "h": 1, "m": 40, "n": 70, "d": width, "f": width}
    return case(FORWARD["causal"], sizes, np.random.default_rng(source.randrange(2**32)), prepare=prepare).worst()


_PARTS = {
    **{name: FORWARD[name] for name in ("vanilla", "softcap", "sigmoid", "sink", "left padding")},
    "grouped": GROUPED.replace("where(n <= m, ", "where(n <= m + 600, "),
    "layer norm and dot product": TEXTS["layernorm, then a dot product"],
    "covariance": TEXTS["covariance"],
    "entropy": TEXTS["entropy"],
}
#: Variants that raising leaves as they are: nothing in them is wide, or what is wide needs all passes.
_ALL = {**FORWARD, "grouped": GROUPED, **{f"backward, {name}": text for name, text in BACKWARD.items()}}
CHECKS: dict[str, Callable[[], float]] = {
    **{f"f64, {name}": functools.partial(attention, text, "f64") for name, text in _ALL.items()},
    **{f"f32, {name}": functools.partial(attention, text, "f32") for name, text in _ALL.items()},
    **{
        f"{dtype}, {name}": functools.partial(attention, _ALL[name], dtype)
        for dtype in ("bf16", "f16")
        for name in ("vanilla", "causal", "softcap", "backward, causal")
    },
    **{f"known, {name}": functools.partial(known, name) for name in TEXTS},
    **{f"group, {name}": functools.partial(group, name) for name in VARIANTS if name not in WITHOUT_GROUPS},
    # Eager rounds every op's result to bfloat16, 2**-9 of it; here only operands of products are.
    **{
        f"bf16, group, {name}": functools.partial(group, name, torch.bfloat16, 5e-2)
        for name in VARIANTS
        if name not in WITHOUT_GROUPS
    },
    **{f"in parts, {name}": functools.partial(in_parts, text) for name, text in _PARTS.items()},
    **{
        f"f32, descriptors, {name}": functools.partial(by_descriptors, _ALL[name])
        for name in ("vanilla", "causal", "grouped", "backward, causal")
    },
    "rows that are masked altogether": masked_rows,
    "NaN and infinity": nan_and_infinity,
    "strides": strided,
    "256 features": functools.partial(long_features, 256),
    "400 features": functools.partial(long_features, 400),
}


def main(names: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names or CHECKS:
        try:
            found[name] = CHECKS[name]()
        except Exception:  # told to the test that asked
            found[name] = traceback.format_exc()[-3000:]
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    print(json.dumps(main(sys.argv[1:])))

__all__ = ["CHECKS", "Case", "main"]
