"""The optimizer, one parameter at a time: each is updated as soon as its gradient is complete and nobody needs its old
values any more, and the gradient is gone.

Where the update must wait, for a norm over all gradients or for more microbatches, gradients go to the tier below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...errors import TrainStepError
from . import optimizers
from .adoption import adopt_state, adoptable
from .replay import Block
from .residency import Home, Residency
from .saved import SMALLEST
from .stores import Store


@dataclass
class Entry:
    """One parameter within a step. ``group``: the optimizer's, None for one that it does not have."""

    name: str
    parameter: nn.Parameter
    group: dict[str, Any] | None = None
    #: Whether something outside of replays uses it, and whether a gradient has come from there.
    outside: bool = True
    arrived_outside: bool = False
    #: Replays that have not yet read it again.
    waiting: int = 0
    done: bool = False
    #: Its gradient in the tier below, and that gradient's norm.
    stored: Any = None
    norm: torch.Tensor | None = None
    #: The handle of what is called when a gradient comes.
    hook: Any = None


@dataclass(frozen=True)
class Clipping:
    """``norm``: the most that the norm of all gradients together may be; ``value``: of each element."""

    norm: float | None = None
    value: float | None = None


class Updates:
    """Gradients and updates of one training step."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        residency: Residency | None,
        store: Store | None,
        clipping: Clipping,
        accumulate: int,
    ) -> None:
        self.model, self.optimizer, self.residency, self.store = model, optimizer, residency, store
        self.clipping, self.accumulate = clipping, accumulate
        #: The parameters that get gradients, the model's in its order, by id.
        self.entries: dict[int, Entry] = {}
        self.look_again()
        self.active = self.last = self.rehearsing = False
        self.in_replay = False
        #: How many parameters were updated in this step.
        self.updated = 0
        #: Parameters that a rehearsal updated before all of their gradient was there.
        self.late: set[int] = set()
        #: Bytes of state that a rehearsal has made, and that would not leave.
        self.state_to_stay = 0
        #: Told what is being updated.
        self.watch: Callable[[str], None] | None = None

    def look_again(self) -> None:
        """Which parameters get gradients may change from step to step, as layers are thawed and groups are added."""
        named = {id(p): (name, p) for name, p in self.model.named_parameters() if p.requires_grad}
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p.requires_grad and id(p) not in named:
                    named[id(p)] = f"optimizer parameter {len(named)}", p
        before, self.entries = self.entries, {}
        for key, (name, parameter) in named.items():
            entry = before.pop(key, None)
            if entry is None:
                entry = Entry(name, parameter)
                register: Any = parameter.register_post_accumulate_grad_hook
                entry.hook = register(self._arrived)
            self.entries[key] = entry
        for entry in before.values():
            self._release(entry)
            entry.hook.remove()

    def check_no_gradients(self) -> None:
        """Raises TrainStepError for a gradient from outside, which nobody could tell from this step's own."""
        for entry in self.entries.values():
            if entry.parameter.grad is not None:
                raise TrainStepError(
                    f"{entry.name} has a gradient before the step begins",
                    where=entry.name,
                    remedy="Drop it with optimizer.zero_grad(). To add gradients of several batches, give accumulate=.",
                )

    def begin(self, outside: set[int], last: bool, rehearsing: bool = False) -> None:
        """A forward begins. ``outside``: ids of the parameters that are used outside of replays. ``last``: the
        optimizer is applied at its end, not only gradients added."""
        self.active, self.last, self.rehearsing, self.updated = True, last, rehearsing, 0
        self.state_to_stay = 0
        for key, entry in self.entries.items():
            entry.group, entry.arrived_outside, entry.waiting, entry.done = None, False, 0, False
            entry.outside = key in outside
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in self.entries:
                    self.entries[id(parameter)].group = group

    def block_begun(self, block: Block) -> None:
        for entry in self._read_by(block):
            entry.waiting += 1

    def block_again(self, block: Block) -> None:
        for entry in self._read_by(block):
            entry.waiting -= 1

    def block_ended(self, block: Block) -> None:
        for entry in self._read_by(block):
            self._take_if_ready(entry)

    def end(self) -> None:
        """The backward is over: what has waited for more is complete."""
        for entry in self.entries.values():
            if not entry.done and entry.parameter.grad is not None:
                self._take(entry)
        if self.clipping.norm is not None and self.last:
            self._clip_and_apply(self.clipping.norm)
        self.active = False

    def abandon(self) -> None:
        """The step has failed: gradients of it are dropped."""
        self.active = False
        for entry in self.entries.values():
            entry.parameter.grad = None

    def set_aside(self) -> Callable[[], None]:
        """Hide what earlier microbatches have left; the result brings it back."""
        kept = {key: entry.stored for key, entry in self.entries.items()}
        for entry in self.entries.values():
            entry.stored = None

        def bring_back() -> None:
            self.forget_gradients()
            for key, stored in kept.items():
                self.entries[key].stored = stored

        return bring_back

    def forget_gradients(self) -> None:
        for entry in self.entries.values():
            if entry.stored is not None:
                self._release(entry)

    def _read_by(self, block: Block) -> Iterator[Entry]:
        return (self.entries[key] for key in block.reads if key in self.entries)

    def _arrived(self, parameter: torch.Tensor) -> None:
        """Autograd has put a gradient, or one more part of it, into ``parameter.grad``."""
        entry = self.entries.get(id(parameter))
        if not self.active or entry is None:
            return
        if entry.done and self.rehearsing:
            self.late.add(id(parameter))
            parameter.grad = None
            return
        if entry.done:
            raise TrainStepError(
                f"{entry.name} got one more gradient after it was updated",
                where=entry.name,
                remedy="The model uses it in another way than when the step was rehearsed. Make a new train_step for "
                "each way in which the model runs.",
            )
        entry.arrived_outside |= not self.in_replay
        self._take_if_ready(entry)

    def _take_if_ready(self, entry: Entry) -> None:
        home = self._home(entry.parameter)
        needed = entry.waiting > 0 or (entry.outside and not entry.arrived_outside) or (home is not None and home.saved)
        if not entry.done and not needed and entry.parameter.grad is not None:
            self._take(entry)

    def _home(self, tensor: torch.Tensor) -> Home | None:
        return self.residency.home_of(tensor) if self.residency is not None else None

    def _take(self, entry: Entry) -> None:
        """A gradient is complete: use it or store it."""
        entry.done = True
        parameter = entry.parameter
        if entry.group is None and self.clipping.norm is None:
            parameter.grad = None
            return
        with torch.no_grad():
            if self.rehearsing and self.accumulate > 1:
                # What needs most is rehearsed: a microbatch after another.
                gradient = parameter.grad
                self._store(entry)
                parameter.grad = gradient
                del gradient
            self._add_stored(entry)
            if not self.last or self.clipping.norm is not None:
                self._store(entry)
            else:
                self._apply(entry)

    def _add_stored(self, entry: Entry) -> None:
        """Add to the gradient what earlier microbatches have left."""
        if entry.stored is None:
            return
        sum_ = self._load(entry)
        if entry.parameter.grad is not None:
            sum_.add_(entry.parameter.grad)
        entry.parameter.grad = sum_

    def _store(self, entry: Entry) -> None:
        gradient = entry.parameter.grad
        assert gradient is not None
        if gradient.layout != torch.strided:
            raise TrainStepError(
                f"the gradient of {entry.name} is sparse and cannot wait for the others",
                where=entry.name,
                remedy="Without clipping by norm and with accumulate=1, sparse gradients are applied at once.",
            )
        if self.clipping.norm is not None and self.last:
            entry.norm = torch.linalg.vector_norm(gradient)
        if self.store is None or gradient.nbytes < SMALLEST:
            entry.stored = gradient.detach()
        else:
            gradient = gradient.detach()
            whole = gradient if _dense(gradient) else gradient.contiguous()
            place = self.store.reserve(whole.nbytes)
            entry.stored = _Stored(place, whole.size(), whole.stride(), whole.dtype, whole.device)
            start = int(whole.storage_offset()) * whole.element_size()
            self.store.write(place, whole.untyped_storage(), start).wait()
            del whole
        entry.parameter.grad = None

    def _load(self, entry: Entry) -> torch.Tensor:
        stored = entry.stored
        if isinstance(stored, _Stored):
            assert self.store is not None
            gradient = torch.empty_strided(stored.size, stored.stride, dtype=stored.dtype, device=stored.device)
            self.store.read(stored.place, gradient.untyped_storage()).wait()
        else:
            gradient = stored
        self._release(entry)
        result: torch.Tensor = gradient
        return result

    def _release(self, entry: Entry) -> None:
        if isinstance(entry.stored, _Stored):
            assert self.store is not None
            self.store.release(entry.stored.place)
        entry.stored = None

    def _clip_and_apply(self, most: float) -> None:
        """As ``torch.nn.utils.clip_grad_norm_``, with one gradient in memory at a time."""
        waiting = [entry for entry in self.entries.values() if entry.stored is not None]
        norms = [entry.norm for entry in waiting if entry.norm is not None]
        if not norms:
            return
        with torch.no_grad():
            total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
            factor = torch.clamp(most / (total + 1e-6), max=1.0)
            for entry in waiting:
                if entry.group is None:
                    self._release(entry)
                    continue
                gradient = self._load(entry)
                gradient.mul_(factor.to(gradient.device))
                entry.parameter.grad = gradient
                del gradient
                self._apply(entry)

    def _apply(self, entry: Entry) -> None:
        parameter, state = entry.parameter, self.optimizer.state
        assert entry.group is not None and parameter.grad is not None
        if self.watch is not None:
            self.watch(f"the update of {entry.name}")
        if self.clipping.value is not None:
            parameter.grad.clamp_(-self.clipping.value, self.clipping.value)
        own = [value for value in state.get(parameter, {}).values() if isinstance(value, torch.Tensor)]
        homes = [home for home in map(self._home, [parameter, *own]) if home is not None]
        forgettable, used = set(), []
        undo = None
        try:
            for home in homes:
                home.residency.bring_in(home)
                if home.residency.idle(home) and not home.dirty:
                    forgettable.add(home.key)
                home.users += 1
                used.append(home)
            undo = self._undo(parameter, own, forgettable) if self.rehearsing else None
            optimizers.apply_to(self.optimizer, entry.group, parameter)
        finally:
            parameter.grad = None
            for home in used:
                home.users, home.dirty = home.users - 1, True
            if undo is not None:
                undo()
        self.updated += not self.rehearsing
        if self.residency is not None:
            if not self.rehearsing:
                adopt_state(self.residency, self.optimizer, parameter, entry.name)
            self.residency.trim()

    def _undo(self, parameter: nn.Parameter, own: list[torch.Tensor], forgettable: set[int]) -> Callable[[], None]:
        """What takes the update that follows back: values that are also in the tier below are simply forgotten."""
        state = self.optimizer.state
        before = dict(state[parameter]) if parameter in state else None
        tensors = [parameter, *own]
        dropped = [home for home in map(self._home, tensors) if home is not None and home.key in forgettable]
        copies = [(tensor, tensor.detach().clone()) for tensor in tensors if id(tensor) not in forgettable]

        def undo() -> None:
            if before is None:
                made = [value for value in state.pop(parameter, {}).values() if isinstance(value, torch.Tensor)]
                there = self.residency
                self.state_to_stay += sum(v.nbytes for v in made if there is None or not adoptable(v, there))
            else:
                state[parameter] = before
            for tensor, copy in copies:
                tensor.data.copy_(copy)
            for home in dropped:
                home.residency.drop(home)

        return undo


@dataclass(frozen=True)
class _Stored:
    """A gradient in the tier below."""

    place: Any
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def _dense(value: torch.Tensor) -> bool:
    """Whether the elements of ``value`` fill its memory from the first to the last without gaps."""
    span = sum((size - 1) * step for size, step in zip(value.size(), value.stride(), strict=True)) + 1
    return span == value.numel() and torch.empty_like(value, device="meta").stride() == value.stride()
