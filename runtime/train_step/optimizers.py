"""Whether an optimizer may be applied to one parameter at a time, and doing so."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch

from ... import torch_internals
from ...errors import TrainStepError

#: Settings of a group that choose an implementation for many parameters at once.
_TOGETHER = ("foreach", "fused")


def alone(group: dict[str, Any], parameters: list[torch.Tensor]) -> dict[str, Any]:
    """A group of an optimizer with other ``parameters``, updated one by one."""
    plain = {name: False for name in _TOGETHER if name in group}
    return {**group, **plain, "params": parameters}


@contextlib.contextmanager
def only(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> Iterator[None]:
    """While it lasts, ``group`` is all that ``optimizer`` has."""
    groups = optimizer.param_groups
    optimizer.param_groups = [group]
    try:
        yield
    finally:
        optimizer.param_groups = groups


def apply_to(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: torch.Tensor) -> None:
    """One step of ``optimizer`` for ``parameter`` of ``group``, whose gradient is there. Its own hooks do not run."""
    with only(optimizer, alone(group, [parameter])):
        torch_internals.unhooked_step(optimizer)()


def check(optimizer: torch.optim.Optimizer) -> None:
    """Raises TrainStepError for an optimizer that one parameter at a time would change the results of.

    It is tried: a few steps on two small parameters, together and apart, must give the same bits.
    """
    name = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TrainStepError(
            f"the optimizer is {name}, which is not a torch.optim.Optimizer",
            where="effcc.train_step(optimizer=...)",
            remedy="Give an optimizer made of the model's parameters: torch.optim.AdamW(model.parameters()).",
        )
    for group in optimizer.param_groups:
        if group.get("differentiable"):
            raise _refused(name, "differentiable=True keeps every update for a later backward")
        try:
            same = _agree(optimizer, group)
        except Exception as error:
            # Whatever an optimizer of the user's raises: why it cannot be used is in its own words.
            if isinstance(optimizer, torch.optim.LBFGS):
                reason = "it evaluates the loss again and again, with all parameters moved together"
            elif isinstance(optimizer, torch.optim.SparseAdam):
                reason = "its gradients are sparse, and their size is not known before they are there"
            else:
                reason = f"a step of one small parameter fails: {type(error).__name__}: {error}"
            raise _refused(name, reason) from error
        if not same:
            raise _refused(name, "its result for one parameter depends on the others")


def _refused(name: str, reason: str) -> TrainStepError:
    return TrainStepError(
        f"{name} cannot be applied to one parameter at a time: {reason}",
        where="effcc.train_step(optimizer=...)",
        remedy="Choose one that treats each parameter by itself, such as SGD, AdamW or Adafactor.",
    )


def twin(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameters: list[torch.Tensor]) -> Any:
    """A new optimizer of the same kind, with one group like ``group`` for ``parameters``."""
    kind: Any = type(optimizer)
    known = inspect.signature(kind.__init__).parameters
    settings = {key: value for key, value in group.items() if key in known and key not in ("params", *_TOGETHER)}
    try:
        made = kind(parameters, **settings)
    except (TypeError, ValueError):
        # Settings that its constructor does not take by these names.
        made = copy.copy(optimizer)
        made.state = type(optimizer.state)(dict)
    made.param_groups = [alone(group, parameters)]
    return made


def _agree(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether three steps of two parameters together equal those of each by itself."""
    random = torch.Generator().manual_seed(0)
    shapes = ((4, 3), (5, 2))
    begin = [torch.randn(shape, generator=random) for shape in shapes]
    gradients = [[torch.randn(shape, generator=random) for shape in shapes] for _ in range(3)]

    def run(chosen: tuple[int, ...]) -> list[torch.Tensor]:
        parameters: list[torch.Tensor] = [torch.nn.Parameter(begin[i].clone()) for i in chosen]
        made = twin(optimizer, _copied(group), parameters)
        for step in gradients:
            for parameter, i in zip(parameters, chosen, strict=True):
                parameter.grad = step[i].clone()
            torch_internals.unhooked_step(made)()
        return [parameter.detach() for parameter in parameters]

    together = run((0, 1))
    apart = run((0,)) + run((1,))
    return all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


def _copied(group: dict[str, Any]) -> dict[str, Any]:
    """The group without its parameters, and with its own copies of what a step may change (``lr`` as a tensor)."""
    return {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}


def state_bytes(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: torch.Tensor) -> list[int]:
    """Bytes of each tensor that the optimizer will keep for ``parameter``, found on the meta device; empty where the
    optimizer needs values for that (a disk that is too small is then noticed when the state is written)."""
    empty = torch.nn.Parameter(
        torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"), requires_grad=parameter.requires_grad
    )
    made = twin(optimizer, _copied(group), [empty])
    empty.grad = torch.empty_like(empty)
    try:
        torch_internals.unhooked_step(made)()
    except RuntimeError:  # what torch raises for the value of a tensor that has none
        return []
    return [value.nbytes for value in made.state[empty].values() if isinstance(value, torch.Tensor)]


def first_state(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: torch.Tensor) -> dict[str, Any]:
    """What the optimizer's constructor keeps for ``parameter``: nothing for most."""
    made = twin(optimizer, _copied(group), [parameter])
    return dict(made.state.get(parameter, {}))
