"""Which experts each token is routed to, recorded while a mixture-of-experts model runs on real inputs.

A MoE block is a module with a child ``experts``. The choice is the integer tensor [tokens, k] that ``experts`` is
called with (transformers' Mixtral, Qwen3-MoE and others); where it is a list of modules, the indices of the last
``torch.topk`` over the experts inside the block. In a model without such a child every module that calls
``torch.topk`` on a table [tokens, experts] counts as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from ..errors import ModelFileError

Ints = NDArray[np.int64]
_TOP_K = (torch.topk, torch.Tensor.topk)
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class RecordedRouting:
    """Rows of a trace; ``names``: the module of each layer."""

    token: Ints
    layer: Ints
    slot: Ints
    expert: Ints
    expert_count: int
    names: tuple[str, ...]


@dataclass
class _Block:
    """A MoE block while it is recorded: choices [tokens, k] of each call, and the table's width in the last one."""

    name: str
    choices: list[Ints] = field(default_factory=list)
    experts: int = 0


class _TopK(TorchFunctionMode):
    """Tells ``seen(width, indices)`` of every top-k along the last dimension of a tensor."""

    def __init__(self, seen: Callable[[int, torch.Tensor], None]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _TOP_K and isinstance(args[0], torch.Tensor) and args[0].dim() >= 2:
            dimension = (kwargs or {}).get("dim", args[2] if len(args) > 2 else -1)
            if dimension in (-1, args[0].dim() - 1):
                self.seen(int(args[0].shape[-1]), result[1])
        return result


class _Recorder:
    def __init__(self, model: torch.nn.Module) -> None:
        self.blocks: dict[str, _Block] = {}
        self.running: list[tuple[str, list[tuple[int, torch.Tensor]]]] = []
        self.mask: torch.Tensor | None = None
        named = dict(model.named_modules())
        blocks = [name for name, module in named.items() if isinstance(_child(module), torch.nn.Module)]
        self.marked = bool(blocks)
        self.handles = []
        for name in blocks or list(named):
            module = named[name]
            self.handles.append(module.register_forward_pre_hook(self._begin(name)))
            self.handles.append(module.register_forward_hook(self._end(name), always_call=True))
            experts = _child(module)
            if self.marked and isinstance(experts, torch.nn.Module) and not isinstance(experts, torch.nn.ModuleList):
                self.handles.append(experts.register_forward_pre_hook(self._given(experts), with_kwargs=True))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def seen(self, width: int, indices: torch.Tensor) -> None:
        if self.running:
            self.running[-1][1].append((width, indices.detach()))

    def _begin(self, name: str) -> Callable[..., None]:
        return lambda module, args: self.running.append((name, []))

    def _given(self, experts: torch.nn.Module) -> Callable[..., None]:
        width = next((int(getattr(experts, key)) for key in _COUNTS if hasattr(experts, key)), 0)

        def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            for value in (*args, *kwargs.values()):
                if isinstance(value, torch.Tensor) and not value.is_floating_point() and value.dim() == 2:
                    known = self.running[-1][1][-1][0] if self.running[-1][1] else 0
                    self.running[-1][1].append((width or known, value.detach()))
                    return

        return hook

    def _end(self, name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            own, found = self.running.pop()
            assert own == name
            if not found:
                return
            width, indices = found[-1]
            rows = indices.reshape(-1, indices.shape[-1]).to("cpu", torch.int64)
            if self.mask is not None and self.mask.numel() == rows.shape[0]:
                rows = rows[self.mask.reshape(-1).to("cpu") != 0]
            block = self.blocks.setdefault(name, _Block(name))
            block.choices.append(rows.numpy())
            block.experts = max(block.experts, width)

        return hook


def _child(module: torch.nn.Module) -> Any:
    return getattr(module, "experts", None)


def record_routing(
    model: torch.nn.Module, batches: Iterable[tuple[tuple[Any, ...], dict[str, Any]]]
) -> RecordedRouting:
    """Run the model on each batch (arguments, keyword arguments) without gradients, as it is used for inference, and
    record the routing. Tokens that a two-dimensional ``attention_mask`` excludes are left out.

    Raises:
        ModelFileError: nothing in the model chooses experts, or its layers see different tokens.
    """
    training = model.training
    model.eval()
    recorder = _Recorder(model)
    try:
        for args, kwargs in batches:
            mask = kwargs.get("attention_mask")
            recorder.mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
            with torch.no_grad(), _TopK(recorder.seen):
                model(*args, **kwargs)
    finally:
        recorder.remove()
        model.train(training)
    # in the order in which the layers ran
    blocks = list(recorder.blocks.values())
    if not blocks:
        raise ModelFileError(
            "no layer of the model routes tokens to experts",
            remedy="a MoE block has a child `experts`, or calls torch.topk on a table [tokens, experts]",
        )
    return _rows(blocks)


def _rows(blocks: list[_Block]) -> RecordedRouting:
    parts = []
    for number, block in enumerate(blocks):
        widths = {choices.shape[1] for choices in block.choices}
        if len(widths) > 1:
            raise ModelFileError(f"{block.name} chooses {sorted(widths)} experts at different times", where=block.name)
        choices = np.concatenate(block.choices)
        row, column = np.indices(choices.shape)
        parts.append(np.stack([row.ravel(), np.full(choices.size, number), column.ravel(), choices.ravel()]))
    table = np.concatenate(parts, axis=1).astype(np.int64)
    count = max(max(block.experts for block in blocks), int(table[3].max()) + 1)
    token, layer, slot, expert = (np.ascontiguousarray(values) for values in table)
    return RecordedRouting(token, layer, slot, expert, count, tuple(block.name for block in blocks))
