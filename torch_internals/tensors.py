"""Who holds a tensor and its memory, tensors that answer for themselves, and an optimizer's step without its hooks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch


def storage_owners(storage: torch.UntypedStorage) -> int:
    """How many tensors and Python objects own ``storage``, the argument included."""
    return int(torch._C._storage_Use_Count(storage._cdata))


def tensor_owners(tensor: torch.Tensor) -> int:
    """How many own ``tensor`` itself: 1 for Python, and one for each autograd node that keeps it."""
    with plain_tensors():
        return int(tensor._use_count())


def storage_key(tensor: torch.Tensor) -> int:
    """Identifies the memory of ``tensor``, whatever its size becomes."""
    with plain_tensors():
        return int(tensor.untyped_storage()._cdata)


def weak_storage(tensor: torch.Tensor) -> Any:
    """A reference whose ``expired()`` says whether the memory is gone; until it is dropped, no other memory has the
    same ``storage_key``."""
    from torch.multiprocessing.reductions import StorageWeakRef

    return StorageWeakRef(tensor.untyped_storage())


def record_offset(tensor: torch.Tensor) -> int | None:
    """Where the storage of ``tensor``, which ``torch.load`` put on the meta device, begins in the file; None where
    that is not known (formats before zip)."""
    found: int | None = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    return found


def plain_tensors() -> AbstractContextManager[None]:
    """Within it, subclasses of tensors are treated as plain ones."""
    return torch._C.DisableTorchFunctionSubclass()


def compiled_entry(module: torch.nn.Module) -> str | None:
    """The attribute of a compiled module whose call runs compiled code; None for a module that is not compiled."""
    if isinstance(module, torch._dynamo.OptimizedModule):
        return "forward"
    return "_compiled_call_impl" if module._compiled_call_impl is not None else None


def unhooked_step(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """``optimizer.step`` without the hooks that users and schedulers have put around it."""
    step: Any = type(optimizer).step
    if getattr(step, "hooked", False):
        step = step.__wrapped__
    return lambda: step(optimizer)
