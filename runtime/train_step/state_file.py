"""Model and optimizer in one safetensors file, written and read with one tensor in memory at a time.

Tensors are named ``model.<name>`` and ``optimizer.<index>.<key>``, with the optimizer's own numbering of parameters
(that of its ``state_dict``). What is not a tensor (groups, counts) is JSON in the file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import TrainStepError
from .checkpoint import Checkpoint, write_tensors

_KEY = "effcc.train_step"


def save_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raises OutputError where the file cannot be written (one that was there stays); TrainStepError for a state that
    holds something else than tensors and plain values."""
    named: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            named[f"model.{name}"] = value
    packed = optimizer.state_dict()
    plain: dict[str, dict[str, Any]] = {}
    for index, state in packed["state"].items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                named[f"optimizer.{index}.{key}"] = value
            else:
                plain.setdefault(str(index), {})[key] = value
    groups = [{key: _plain(value) for key, value in group.items()} for group in packed["param_groups"]]
    try:
        text = json.dumps({"groups": groups, "plain": plain})
    except TypeError as error:
        raise TrainStepError(
            f"the optimizer's state cannot be written: {error}",
            where=str(path),
            remedy="Save state_dict() with torch.save.",
        ) from error
    write_tensors(path, named, {_KEY: text})


def load_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settle: Callable[[torch.Tensor], None]
) -> None:
    """Put the file's values into model and optimizer; ``settle`` is called with each parameter whose state is there.

    Raises TrainStepError for a file that is something else, or of another model or optimizer, before anything changes.
    """
    source = Checkpoint(path)
    if _KEY not in source.metadata:
        raise TrainStepError(
            "the file does not hold a training step's state",
            where=str(path),
            remedy="Give what TrainStep.save wrote; weights alone are given as checkpoint=.",
        )
    facts = json.loads(source.metadata[_KEY])
    by_identity: dict[int, tuple[torch.Tensor, list[str]]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        by_identity.setdefault(id(value), (value, []))[1].append(f"model.{name}")
    sources = {key: next((n for n in names if n in source.places), None) for key, (_, names) in by_identity.items()}
    lost = [
        by_identity[key][1][0]
        for key, found in sources.items()
        if found is None or source.places[found].size != by_identity[key][0].shape
    ]
    order = [p for group in optimizer.param_groups for p in group["params"]]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if lost or sizes != [len(group["params"]) for group in facts["groups"]]:
        what = f"it has no {lost[0]} of that shape" if lost else "its optimizer has other groups"
        raise TrainStepError(
            f"the file is of another training step: {what}",
            where=str(path),
            remedy="Build model and optimizer as they were when it was written.",
        )
    for key, (value, names) in by_identity.items():
        _fill(source, sources[key] or names[0], value)
    states: dict[int, list[str]] = {}
    for name in source.places:
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            states.setdefault(int(rest.partition(".")[0]), []).append(name)
    for index, parameter in enumerate(order):
        _load_one(source, optimizer.state, parameter, states.get(index, []), facts["plain"].get(str(index), {}))
        settle(parameter)
    for group, given in zip(optimizer.param_groups, facts["groups"], strict=True):
        for key, value in given.items():
            if key != "params":
                group[key] = _as(group.get(key), value)


def _load_one(
    source: Checkpoint, states: Any, parameter: torch.Tensor, names: list[str], plain: Mapping[str, Any]
) -> None:
    """One parameter's state: in place where it is there already."""
    if not names and not plain:
        states.pop(parameter, None)
        return
    state = states[parameter]
    wanted = {name.split(".", 2)[2]: name for name in names}
    for key in [key for key in state if key not in wanted and key not in plain]:
        del state[key]
    for key, name in wanted.items():
        there = state.get(key)
        if isinstance(there, torch.Tensor) and there.shape == source.places[name].size:
            _fill(source, name, there)
        else:
            # A tensor with a storage of its own, which can be sent away; what was read is a view of bytes.
            state[key] = _read(source, name).clone()
    state.update(plain)


def _fill(source: Checkpoint, name: str, target: torch.Tensor) -> None:
    with torch.no_grad():
        target.copy_(_read(source, name, target.shape))


def _read(source: Checkpoint, name: str, shape: torch.Size | None = None) -> torch.Tensor:
    found = source.read(name)
    if found is None or (shape is not None and found.shape != shape):
        raise TrainStepError(
            f"{name} has another shape in the file, or is not there",
            where=str(source.path),
            remedy="Build model and optimizer as they were when it was written.",
        )
    return found


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def _as(old: Any, value: Any) -> Any:
    """A value as JSON has it, in the type that it had."""
    if isinstance(old, torch.Tensor):
        return torch.full_like(old, value)
    return tuple(value) if isinstance(old, tuple) else value
