"""Values that several results of a region are computed from are stored where ``cost_model.shared_values`` says so."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from pathlib import Path

from .. import torch_internals
from ..cost_model import shared_values as model
from ..cost_model.devices import Device


def shared_values(device: Device) -> contextlib.AbstractContextManager[None]:
    """Inside, regions store what is better stored on ``device`` than computed for each of its readers."""

    def choose(value: torch_internals.ReadValue) -> bool:
        return model.better_stored(model.SharedValue(*value), device)

    return torch_internals.values_stored(choose, f"effcc shared values of a {device.kind} {_digest()}")


@functools.cache
def _digest() -> str:
    """Of the rule: code that another version chose is not taken from the code cache."""
    return hashlib.sha256(Path(str(model.__file__)).read_bytes()).hexdigest()[:16]
