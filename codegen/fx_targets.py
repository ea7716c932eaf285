"""Names of ops -> the functions that FX calls. Only torch's own op registry and lists of known functions are searched:
a name in IR text can never reach other code."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from ..errors import ExportError

_OPERATORS = frozenset(
    """add sub mul truediv floordiv mod pow neg pos abs and_ or_ xor invert lshift rshift matmul eq ne lt le gt ge not_
    getitem setitem iadd isub imul itruediv ifloordiv imod ipow iand ior ixor is_ is_not contains truth index""".split()
)
_MATH = frozenset(
    "sqrt exp log log2 log10 sin cos tan tanh sinh cosh asin acos atan atan2 floor ceil trunc pow fabs isqrt".split()
)
_BUILTINS: dict[str, Any] = {"max": max, "min": min, "abs": abs, "round": round, "sum": sum, "pow": pow, "len": len}


def op_target(op: str, where: str = "") -> Callable[..., Any]:
    """The function of an op's full name. Raises ``ExportError`` for a name that is not known to torch."""
    target = _find(op)
    if target is None:
        raise ExportError(
            f"the op '{op}' is not known to torch {torch.__version__}",
            where=where,
            remedy="import the library that registers the op, or check its name",
        )
    return target  # type: ignore[no-any-return]


@lru_cache(maxsize=4096)
def _find(op: str) -> Any:
    namespace, _, rest = op.partition(".")
    if namespace == "_operator":
        return getattr(operator, rest) if rest in _OPERATORS else None
    if namespace == "math":
        return getattr(math, rest) if rest in _MATH else None
    if namespace == "builtins":
        return _BUILTINS.get(rest)
    if namespace == "torch":
        return _torch_functions().get(op)
    if namespace == "higher_order":
        return _registered("higher_order", rest)
    return _registered(namespace, *rest.split("."))


def _registered(namespace: str, *path: str) -> Any:
    """An entry of torch.ops, or None."""
    if namespace in _NOT_NAMESPACES or not all(part.isidentifier() and not part.startswith("__") for part in path):
        return None
    found = getattr(torch.ops, namespace, None)
    for part in path:
        found = getattr(found, part, None)
    kinds = (torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator)
    return found if isinstance(found, kinds) else None


#: Attributes of ``torch.ops`` that are functions, not namespaces of ops.
_NOT_NAMESPACES = frozenset({"load_library", "import_module", "loaded_libraries", ""})


@lru_cache(maxsize=1)
def _torch_functions() -> dict[str, Any]:
    """Functions on tensors that torch lists as overridable, by qualified name."""
    from torch.overrides import get_overridable_functions

    found: dict[str, Any] = {}
    for owner, functions in get_overridable_functions().items():
        prefix = getattr(owner, "__name__", "")
        if owner is torch.Tensor:
            continue
        for function in functions:
            name = getattr(function, "__name__", "")
            if not name:
                continue
            found.setdefault(f"{prefix}.{name}", function)
            module = getattr(function, "__module__", None)
            if isinstance(module, str) and module.startswith("torch"):
                found.setdefault(f"{module}.{name}", function)
    names = """arange empty zeros ones full tensor rand randn randint eye linspace scalar_tensor
        sym_max sym_min sym_int sym_float sym_not sym_ite sym_sum""".split()
    for name in names:
        if hasattr(torch, name):
            found[f"torch.{name}"] = getattr(torch, name)
    return found
