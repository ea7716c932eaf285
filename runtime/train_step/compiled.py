"""Modules that ``torch.compile`` has compiled: their parameters come in together, before the compiled code runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ... import torch_internals
from .away import homes


def compiled_modules(model: nn.Module) -> list[nn.Module]:
    """The outermost compiled modules of ``model``."""
    if torch_internals.compiled_entry(model) is not None:
        return [model]
    return [found for child in model.children() for found in compiled_modules(child)]


@contextlib.contextmanager
def in_use(module: nn.Module) -> Iterator[None]:
    """While it lasts, all parameters of ``module`` are here. Compiled code takes their memory as it is."""
    used = []
    try:
        for parameter in module.parameters():
            home = homes.get(id(parameter))
            if home is not None:
                home.users += 1
                used.append(home)
                home.residency.bring_in(home)
        yield
    finally:
        for home in used:
            home.users -= 1
        for residency in {home.residency for home in used}:
            residency.trim()


def prepare_compiled(model: nn.Module) -> None:
    """From now on compiled modules of ``model`` bring their parameters in before they run, in a step or not."""
    for module in compiled_modules(model):
        name = torch_internals.compiled_entry(module) or "forward"
        run = getattr(module, name)
        if not isinstance(run, _WithParameters):
            setattr(module, name, _WithParameters(module, run))


class _WithParameters:
    """``run``, compiled code of ``module``, with its parameters there."""

    def __init__(self, module: nn.Module, run: Callable[..., Any]) -> None:
        self.module, self.run = module, run

    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with in_use(self.module):
            return self.run(*args, **kwargs)
