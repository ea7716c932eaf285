"""Building a model without allocating its weights.

Inside ``without_weights()`` a tensor of more than ``threshold`` bytes comes out fake (shape, dtype and strides, no
storage); smaller ones are real, since many modules read them while they are built (``.item()``, ``linspace(...)[i]``,
a loop over a table). What is computed from a fake tensor is fake. Devices named in the model's code (``.cuda()``,
``device="cuda"``) become the CPU: the capture is device-neutral, and the target is set afterwards.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import unittest.mock
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Bytes up to which a tensor is real.
DEFAULT_THRESHOLD = 1 << 16


class _OnCpu(TorchFunctionMode):
    """Every accelerator that is named becomes the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            self.devices.add("cuda")
            return args[0]
        if "device" in kwargs:
            kwargs["device"] = self._replace(kwargs["device"])
        if func is torch.Tensor.to:
            args = tuple(self._replace(value) for value in args)
        if func is torch.Tensor.pin_memory:
            return args[0]
        kwargs.pop("pin_memory", None)
        return func(*args, **kwargs)

    def _replace(self, value: Any) -> Any:
        if isinstance(value, str | torch.device):
            with contextlib.suppress(RuntimeError):
                device = torch.device(value)
                if device.type not in ("cpu", "meta"):
                    self.devices.add(device.type)
                    return torch.device("cpu")
        return value


class _LargeIsFake(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, fake_mode: FakeTensorMode, threshold: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake_mode = fake_mode
        self.threshold = threshold

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with self.fake_mode:
                return func(*args, **kwargs)
        if _allocates(func):
            with contextlib.suppress(Exception), self.fake_mode:
                # Ops whose result depends on data raise here; their inputs are small, so they run for real.
                result = func(*args, **kwargs)
                if any(_bytes(leaf) > self.threshold for leaf in tree_leaves(result)):
                    return result
        return func(*args, **kwargs)


def _allocates(func: Any) -> bool:
    """Neither a view nor an in-place op."""
    return not any(returned.alias_info is not None for returned in func._schema.returns)


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


@contextlib.contextmanager
def _converting_fake_parameters() -> Iterator[None]:
    """``module.to(dtype)`` for fake parameters. Torch swaps their contents in place, which their fake mode's references
    forbid; here the module gets a new parameter, the same one wherever the old one was shared."""
    original: Callable[..., Any] = torch.nn.Module._apply
    thread = threading.get_ident()
    converted: dict[int, tuple[torch.Tensor, Any]] = {}
    depth = 0

    def apply(module: torch.nn.Module, fn: Callable[[Any], Any], recurse: bool = True) -> torch.nn.Module:
        nonlocal depth
        if threading.get_ident() != thread:
            original(module, fn, recurse)
            return module
        depth += 1
        try:
            if recurse:
                children: Iterable[Any] = module.children()
                for child in children:
                    child._apply(fn)
            for key, parameter in module._parameters.items():
                if isinstance(parameter, FakeTensor):
                    if id(parameter) not in converted:
                        with torch.no_grad():
                            result = fn(parameter)
                        if result is not parameter:
                            result = torch.nn.Parameter(result, parameter.requires_grad)
                        converted[id(parameter)] = (parameter, result)
                    module._parameters[key] = converted[id(parameter)][1]
            held = {key: value for key, value in module._parameters.items() if isinstance(value, FakeTensor)}
            order = list(module._parameters)
            for key in held:
                del module._parameters[key]
            try:
                original(module, fn, False)
            finally:
                values = {**module._parameters, **held}
                module._parameters.clear()
                module._parameters.update({key: values[key] for key in order})
        finally:
            depth -= 1
            if depth == 0:
                converted.clear()
        return module

    with unittest.mock.patch.object(torch.nn.Module, "_apply", apply):
        yield


_original_truncated_normal: Callable[..., Any] = torch.nn.init._no_grad_trunc_normal_


def _truncated_normal(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Torch draws until all values are within bounds, which for a fake tensor is never decided."""
    return tensor if isinstance(tensor, FakeTensor) else _original_truncated_normal(tensor, *args, **kwargs)


class Weightless:
    """The modes of one capture: ``fake_mode`` owns all its fake tensors, ``devices`` are those that the code names."""

    def __init__(self, threshold: int = DEFAULT_THRESHOLD) -> None:
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.threshold = threshold
        self._on_cpu = _OnCpu()

    @property
    def devices(self) -> frozenset[str]:
        return frozenset(self._on_cpu.devices)

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Tensors made inside are fake when large. The random state of the process is left as it was."""
        with (
            torch.random.fork_rng(devices=[]),
            _converting_fake_parameters(),
            unittest.mock.patch.object(torch.nn.init, "_no_grad_trunc_normal_", _truncated_normal),
            _LargeIsFake(self.fake_mode, self.threshold),
            self._on_cpu,
        ):
            yield

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Autocast regions of the model's code that name an accelerator (``torch.autocast("cuda")``) count for the
        CPU's tensors. The graph keeps the name, which does not count in its structure."""
        original: Callable[..., Any] = torch.amp.autocast_mode._enter_autocast

        @functools.wraps(original)
        def enter(device_type: str, dtype: torch.dtype | None = None, *rest: Any) -> Any:
            if device_type == "cpu":
                return original(device_type, dtype, *rest)
            self._on_cpu.devices.add(device_type)
            return original("cpu", dtype or torch.get_autocast_dtype(device_type), *rest)

        patch = unittest.mock.patch.object
        with patch(torch.amp, "_enter_autocast", enter), patch(torch.amp.autocast_mode, "_enter_autocast", enter):
            yield

    def runner(self, gm: torch.fx.GraphModule) -> Callable[..., Any]:
        """``gm`` with everything it computes fake."""

        def run(*args: Any) -> Any:
            with self.fake_mode:
                return _FakeInterpreter(gm).run(*args)

        return run


class _FakeInterpreter(torch.fx.Interpreter):
    """Numbers that Dynamo passes as real tensors of one element (float attributes, with dynamic shapes) are read."""

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target == "item" and not isinstance(args[0], FakeTensor):
            with unset_fake_temporarily():
                return args[0].item()
        return super().call_method(target, args, kwargs)
