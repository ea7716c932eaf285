"""Blocks that run again in the backward: between, only their inputs are kept.

A block is a module of a ``ModuleList`` or ``Sequential`` that has modules of its own, as a transformer's layers are. A
replay starts from the same inputs and the same state of the random generators and must give the same outputs, bit by
bit; where it does not, the block is not one that may run again.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ... import torch_internals
from ...errors import TrainStepError
from ..swap_file import tensor_checksum
from .buffers import Buffers, Place


class ReplayError(Exception):
    """A block's second run differs from its first; ``name`` is the block's, ``why`` a reason in words."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name}: {why}")
        self.name, self.why = name, why


@dataclass(eq=False)
class Block:
    """A module that may be replayed. Of its last replay: ``saved_bytes`` for the backward within it, ``seconds`` of
    its forward."""

    name: str
    module: nn.Module
    saved_bytes: int = 0
    seconds: float = 0.0
    #: Which of its buffers its forward changes; None before that was looked at.
    changing: set[Place] | None = None
    #: Parameters whose values the block reads, besides its own: found while a step is rehearsed.
    reads: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.reads |= {id(parameter) for parameter in self.module.parameters()}


def find_blocks(model: nn.Module) -> list[Block]:
    """The outermost repeated modules of ``model`` that have parameters to train."""
    found: list[Block] = []

    def walk(module: nn.Module, path: str) -> None:
        repeats = isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1
        if torch_internals.compiled_entry(module) is not None:
            return  # what is inside cannot be got at
        for name, child in module.named_children():
            own = f"{path}.{name}" if path else name
            nested = any(True for _ in child.children())
            if repeats and nested and any(parameter.requires_grad for parameter in child.parameters()):
                found.append(Block(own, child))
            else:
                walk(child, own)

    walk(model, "")
    return found


def used_outside(model: nn.Module, blocks: list[Block], replayed: list[Block]) -> set[int]:
    """Ids of the parameters that modules outside of ``replayed`` have, or that other blocks read."""
    inside = {id(module) for block in replayed for module in block.module.modules()}
    outside = (module for module in model.modules() if id(module) not in inside)
    found = {id(parameter) for module in outside for parameter in module.parameters(recurse=False)}
    for block in blocks:
        if block not in replayed:
            found |= block.reads
    return found


@dataclass
class Replays:
    """The blocks of one training step. ``begun`` is called when a block runs for the first time, ``again`` when its
    second forward is done, ``ended`` when its backward is; ``within`` says whether a block's code is running now."""

    begun: Callable[[Block], None]
    again: Callable[[Block], None]
    ended: Callable[[Block], None]
    #: Called with True before a second run and with False after it. Returns bytes saved so far.
    switch: Callable[[bool], int]
    #: While it lasts, what autograd saves is dropped.
    dropping: Callable[[], AbstractContextManager[None]]
    within: Block | None = None

    @contextlib.contextmanager
    def installed(self, blocks: list[Block]) -> Iterator[None]:
        """While it lasts, ``blocks`` are replayed."""
        with contextlib.ExitStack() as stack:
            for block in blocks:
                stack.enter_context(replaced(block.module, functools.partial(self._wrapped, block)))
            yield

    def _wrapped(self, block: Block, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.within is not None or not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            leaves, spec = tree_flatten((args, kwargs))
            call = _Call(self, block, forward, leaves, spec)
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            device = next((t.device for t in tensors), torch.device("cpu"))
            # Without an input that requires a gradient, autograd would not see the parameters inside.
            anchor = torch.empty(0, device=device, requires_grad=True)
            outputs = _Replay.apply(call, anchor, *tensors)  # type: ignore[no-untyped-call]
            return call.pack(outputs)

        return run


class _Call:
    """One call of a block: everything that its second run needs, but for the tensors."""

    def __init__(
        self, replays: Replays, block: Block, forward: Callable[..., Any], leaves: list[Any], spec: Any
    ) -> None:
        self.replays, self.block, self.forward, self.spec = replays, block, forward, spec
        self.leaves = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        self.random = _random_state()
        self.autocast = _autocast_state()
        self.first: list[int | None] = []
        #: Buffers that the block's forward changes, as they were before.
        self.buffers = Buffers(block.module, block.changing)
        self.output_leaves: list[Any] = []
        self.output_spec: Any = None

    def run(self, tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """The block's forward; returns the tensors among its outputs."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self.spec)
        self.replays.within = self.block
        try:
            outputs = self.forward(*args, **kwargs)
        finally:
            self.replays.within = None
        self.output_leaves, self.output_spec = tree_flatten(outputs)
        return [leaf for leaf in self.output_leaves if isinstance(leaf, torch.Tensor)]

    def pack(self, tensors: tuple[torch.Tensor, ...]) -> Any:
        found = iter(tensors)
        leaves = [next(found) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.output_leaves]
        self.output_leaves = []
        return tree_unflatten(leaves, self.output_spec)


@contextlib.contextmanager
def replaced(module: nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """While it lasts, ``module`` runs ``wrap`` of what it ran before."""
    name = torch_internals.compiled_entry(module) or "forward"
    before = getattr(module, name)
    own = name in vars(module)
    setattr(module, name, wrap(before))
    try:
        yield
    finally:
        if own:
            setattr(module, name, before)
        else:
            delattr(module, name)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, anchor: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        versions = [tensor._version for tensor in tensors]
        if torch_internals.compiled_entry(call.block.module) is None:
            outputs = call.run(tensors)
        else:
            # Compiled code without gradients is other code than with them, and may round differently.
            with torch.enable_grad(), call.replays.dropping():
                inputs = tuple(tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors)
                outputs = [output.detach() for output in call.run(inputs)]
                del inputs
        if call.block.changing is None:
            call.block.changing = call.buffers.changed()
            call.buffers.forget_all_but(call.block.changing)
        if versions != [tensor._version for tensor in tensors]:
            raise ReplayError(call.block.name, "it changes its inputs in place")
        call.first = [_checksum(output) for output in outputs]
        ctx.call = call
        ctx.requires = [tensor.requires_grad for tensor in tensors]
        ctx.save_for_backward(*tensors)
        call.replays.begun(call.block)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        call: _Call = ctx.call
        replays, block = call.replays, call.block
        inputs = [
            tensor.detach().requires_grad_(requires)
            for tensor, requires in zip(ctx.saved_tensors, ctx.requires, strict=True)
        ]
        before = replays.switch(True)
        try:
            begin = time.perf_counter()
            with torch.enable_grad(), _as_it_was(call):
                try:
                    outputs = call.run(tuple(inputs))
                except (RuntimeError, ValueError, IndexError, TypeError) as error:
                    raise ReplayError(block.name, f"it fails when it runs again: {error}") from error
            block.seconds = time.perf_counter() - begin
            if [_checksum(output) for output in outputs] != call.first:
                raise ReplayError(block.name, "its outputs differ when it runs again")
            block.saved_bytes = replays.switch(True) - before
            replays.again(block)
            pairs = [(out, g) for out, g in zip(outputs, gradients, strict=True) if g is not None and out.requires_grad]
            del outputs
            if pairs:
                torch.autograd.backward([out for out, _ in pairs], [g for _, g in pairs])
        finally:
            call.output_leaves = []
            replays.switch(False)
        replays.ended(block)
        return None, None, *(tensor.grad for tensor in inputs)


def failed(error: ReplayError) -> TrainStepError:
    """What the user is told of a replay that went wrong where it had gone well before."""
    return TrainStepError(
        f"the block {error.name} cannot be computed again for the backward: {error.why}",
        where=error.name,
        remedy="Name what differs between two calls with equal inputs (a cache, a counter), or raise the memory "
        "budget so that blocks need not run again.",
    )


def _checksum(value: torch.Tensor) -> int | None:
    """Of a CPU tensor: elsewhere sums may be taken in another order each time."""
    return tensor_checksum(value) if value.device.type == "cpu" else None


def _random_state() -> tuple[torch.Tensor, list[torch.Tensor]]:
    return torch.get_rng_state(), cuda_random_state()


def cuda_random_state() -> list[torch.Tensor]:
    """Of each GPU; none where CUDA is not in use."""
    used = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.get_rng_state_all() if used else []


def _set_random_state(state: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


def _autocast_state() -> list[tuple[str, torch.dtype]]:
    kinds = ("cpu", "cuda")
    return [(kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)]


@contextlib.contextmanager
def _as_it_was(call: _Call) -> Iterator[None]:
    """The random generators, autocast and the block's buffers as they were at the first run."""
    now = _random_state()
    changed = Buffers(call.block.module, call.block.changing)
    with contextlib.ExitStack() as stack:
        for kind, dtype in call.autocast:
            stack.enter_context(torch.autocast(kind, dtype=dtype))
        _set_random_state(call.random)
        call.buffers.restore()
        try:
            yield
        finally:
            _set_random_state(now)
            changed.restore()
