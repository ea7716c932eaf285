"""What goes wrong while a model is traced, told in terms of the user's file."""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Iterator

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ..errors import CaptureError, EffccError
from .model_file import ModelSpec

__all__ = ["errors_of_tracing"]

#: Dynamo's report of an op that failed on fake tensors ends in the op's own error.
_FAILED_OP = re.compile(r"got (\w+)\((['\"])(.*?)\2,?\)\s*$", re.MULTILINE | re.DOTALL)
_OTHER_DEVICE = re.compile(
    r"not compiled with|no NVIDIA driver|not linked with support|Cannot access accelerator|device mismatch"
)


@contextlib.contextmanager
def errors_of_tracing(spec: ModelSpec) -> Iterator[None]:
    """Whatever tracing raises inside, as a CaptureError with the user's own line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        inner = _innermost(error)
        if isinstance(inner, EffccError):
            raise inner from None
        message, remedy = _explain(spec.name, inner)
        raise CaptureError(message, where=_user_line(error, inner, spec), remedy=remedy) from error


def _innermost(error: BaseException) -> BaseException:
    """The error that a backend, or code run by Dynamo, really raised."""
    inner = getattr(error, "inner_exception", None)
    while isinstance(inner, BaseException):
        error, inner = inner, getattr(inner, "inner_exception", None)
    return error


def _explain(name: str, error: BaseException) -> tuple[str, str]:
    """Message and remedy."""
    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException | GuardOnDataDependentSymNode):
        op = f" ({error.func})" if hasattr(error, "func") else ""
        return (
            f"{name} depends on the values of a tensor{op}, which an offline capture does not have",
            "Keep the decision in tensor operations (torch.where, masks), or take it out of forward. "
            'torch.compile(model, backend="effcc") runs such code, with a graph break.',
        )
    text = _headline(error)
    if _OTHER_DEVICE.search(str(error)):
        return (
            f"{name} names a device that its inputs are not on: {text}",
            "Let forward follow its inputs (device=x.device); --device chooses the target of the plan.",
        )
    return (
        f"{name} could not be captured: {text}",
        "Run the model once in eager mode: if that works, its Python is beyond what torch.compile traces.",
    )


def _headline(error: BaseException) -> str:
    if isinstance(error, torch._dynamo.exc.TorchRuntimeError) and (found := _FAILED_OP.search(str(error))):
        return f"{found[1]}: {' '.join(found[3].split())}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _user_line(outer: BaseException, inner: BaseException, spec: ModelSpec) -> str:
    """The last line of the model's file that the error passed through, else of any file outside of torch and effcc."""
    from .fx_locations import is_users

    frames: list[traceback.FrameSummary] = []
    for error in (outer, inner):
        frames += list(getattr(error, "real_stack", None) or ()) + list(traceback.extract_tb(error.__traceback__))
    own = {str(path) for path in spec.sources}
    found = [frame for frame in frames if frame.filename in own]
    found = found or [frame for frame in frames if is_users(frame.filename)]
    return f'{found[-1].filename}:{found[-1].lineno} "{found[-1].line}"' if found else str(next(iter(spec.sources), ""))
