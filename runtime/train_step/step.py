"""``effcc.train_step``: forward, backward and optimizer in one call, within a budget for all of it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ...errors import BudgetError, TrainStepError
from ...formatting import bytes_text, first_line
from . import optimizers, rehearsal
from .adoption import adopt_parameter, adopt_parameters, adopt_state, reserve_state
from .checkpoint import fill_meta, write_safetensors
from .compiled import prepare_compiled
from .replay import Block, ReplayError, Replays, failed, find_blocks, used_outside
from .residency import Home, Residency
from .saved import SavedValues
from .spending import USUAL_BANDWIDTH, Rehearsed, Spending, least, spend
from .state_file import load_state, save_state
from .stores import FileStore, PinnedStore, Store
from .updates import Clipping, Updates


class TrainStep:
    """One training step of ``model``; what ``effcc.train_step`` returns. Its arguments are explained there.

    Call it with a batch: the model's inputs, then what else the loss takes. Between calls the model and the optimizer
    are the user's, as ever.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Callable[..., torch.Tensor],
        *,
        memory_budget: int | None = None,
        swap: bool = True,
        swap_dir: str | os.PathLike[str] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        accumulate: int = 1,
    ) -> None:
        optimizers.check(optimizer)
        self.model, self.optimizer, self.loss_fn = model, optimizer, loss_fn
        #: Bytes; may be set between calls. None: nothing has to leave.
        self.memory_budget = memory_budget
        self.accumulate = accumulate
        self.device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
        self.store: Store | None = None
        self.residency: Residency | None = None
        if swap:
            self.store = PinnedStore(self.device) if self.device.type == "cuda" else FileStore(swap_dir)
            self.residency = Residency(self.store)
        fill_meta(model, optimizer, checkpoint, self._adopt)
        adopt_parameters(self.residency, model)
        if self.store is not None and self.device.type == "cpu":
            reserve_state(self.store, optimizer)
        self.blocks = find_blocks(model)
        self.updates = Updates(
            model, optimizer, self.residency, self.store, Clipping(clip_grad_norm, clip_grad_value), accumulate
        )
        self.saved = SavedValues(self.residency)
        self.replays = Replays(
            self.updates.block_begun,
            self.updates.block_again,
            self.updates.block_ended,
            self._switch,
            self.saved.dropping,
        )
        prepare_compiled(model)
        self.lock = threading.Lock()
        self.microbatch = 0
        self.spending = Spending()
        self.rehearsed: dict[Any, Rehearsed] = {}
        self.notes: list[str] = []
        self._spent: Any = None
        self._failure = ""
        self._forward = False
        #: Ids of parameters that were seen to be read outside of blocks.
        self._read_outside: set[int] = set()
        self._adopt_all()
        rehearsal.give_back()

    def __call__(self, inputs: Any, *targets: Any, **named: Any) -> torch.Tensor:
        """Run the model on ``inputs`` and ``loss_fn(outputs, *targets, **named)``; returns the loss.

        inputs: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.
        Raises: BudgetError, SwapError, TrainStepError; what the model and the loss raise.
        """
        with self._entered():
            batch = (dict(inputs) if isinstance(inputs, Mapping) else inputs, targets, named)
            prepare_compiled(self.model)
            self._adopt_all()
            self.updates.look_again()
            self.updates.check_no_gradients()
            self._plan(batch)
            last = self.microbatch + 1 == self.accumulate
            try:
                loss = self._run(batch, last)
            except BaseException as error:
                self._fail(error)
                if isinstance(error, ReplayError):
                    raise failed(error) from error
                raise
            self.microbatch = 0 if last else self.microbatch + 1
            if last:
                # No gradient is left: what remains are the hooks of users and of schedulers.
                self.optimizer.step()
            return loss

    def parameters(self) -> Iterator[nn.Parameter]:
        """The model's parameters; each comes in when it is used."""
        return self.model.parameters()

    def state_dict(self) -> dict[str, Any]:
        """``{"model": ..., "optimizer": ...}``, their own ``state_dict``s: what is in them is in memory.

        Raises TrainStepError between the microbatches of one update, whose gradients no checkpoint holds.
        """
        with self._entered():
            self._check_whole("state_dict()")
            return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` gave. A step that had failed half-way can be used again afterwards.

        Raises TrainStepError for anything else than such a state; what torch raises for one of another model.
        """
        missing = [key for key in ("model", "optimizer") if key not in state]
        if missing:
            raise TrainStepError(
                f"the state has no {' and no '.join(map(repr, missing))}",
                where="TrainStep.load_state_dict",
                remedy="Give what TrainStep.state_dict returned; the model's alone goes into model.load_state_dict.",
            )
        with self._entered(check=False):
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.updates.forget_gradients()
            self.microbatch, self._failure = 0, ""
            self._adopt_all()
            if self.residency is not None:
                self.residency.trim()

    def save_model(self, path: str | os.PathLike[str]) -> None:
        """Write the model's state dict as a safetensors file, with one tensor in memory at a time: what
        ``checkpoint=`` reads. Raises OutputError; TrainStepError as ``state_dict`` does."""
        with self._entered():
            write_safetensors(Path(path), self.model)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write model and optimizer to one file, with one tensor in memory at a time: what ``load`` reads. Raises
        OutputError; TrainStepError as ``state_dict`` does."""
        with self._entered():
            self._check_whole("save()")
            save_state(Path(path), self.model, self.optimizer)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from what ``save`` wrote, a parameter at a time, also after a failure. Raises TrainStepError."""

        def settle(parameter: torch.Tensor) -> None:
            if self.residency is not None and parameter in self.optimizer.state:
                adopt_state(self.residency, self.optimizer, parameter, "a parameter that was loaded")
                self.residency.trim()

        with self._entered(check=False):
            load_state(Path(path), self.model, self.optimizer, settle)
            self.updates.forget_gradients()
            self.microbatch, self._failure = 0, ""
            self._adopt_all()

    @property
    def floor(self) -> int | None:
        """The least budget, in bytes, that works for all batches so far; None before the first under a budget."""
        return max((each.floor for each in self.rehearsed.values()), default=None)

    def held_bytes(self, *batch: Any) -> int:
        """Bytes in memory now: parameters, gradients, buffers, optimizer state, and the tensors of ``batch``."""
        state = [v for entry in self.optimizer.state.values() for v in entry.values() if isinstance(v, torch.Tensor)]
        own = [*self.model.parameters(), *(entry.parameter for entry in self.updates.entries.values())]
        gradients = [p.grad for p in own if p.grad is not None]
        inputs = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
        return rehearsal.held_by([*own, *gradients, *self.model.buffers(), *state, *inputs])

    def __repr__(self) -> str:
        budget = "no budget" if self.memory_budget is None else bytes_text(self.memory_budget)
        return f"<TrainStep of {type(self.model).__name__} and {type(self.optimizer).__name__}, {budget}>"

    @contextlib.contextmanager
    def _entered(self, check: bool = True) -> Iterator[None]:
        if not self.lock.acquire(blocking=False):
            raise TrainStepError(
                "the step is already running",
                where=repr(self),
                remedy="Call it from one thread, and not from within its own model or loss.",
            )
        try:
            if check and self._failure:
                raise TrainStepError(
                    f"an earlier call failed when part of the parameters had been updated: {self._failure}",
                    where=repr(self),
                    remedy="Go back to a checkpoint with load_state_dict.",
                )
            yield
        finally:
            self.lock.release()

    def _check_whole(self, what: str) -> None:
        if self.microbatch:
            raise TrainStepError(
                f"{what} between microbatches {self.microbatch} and {self.microbatch + 1} of {self.accumulate}",
                where=repr(self),
                remedy="The gradients so far would be lost: call it after the last of them.",
            )

    def _fail(self, error: BaseException) -> None:
        self.updates.abandon()
        self.updates.forget_gradients()
        self.microbatch = 0
        if self.residency is not None:
            self.residency.recover()
        if self.updates.updated:
            self._failure = f"{type(error).__name__}: {first_line(error)}"

    def _adopt(self, tensor: torch.Tensor, name: str) -> None:
        if self.residency is not None:
            adopt_parameter(self.residency, tensor, name)

    def _adopt_all(self) -> None:
        """Parameters and optimizer state that have no home yet get one: all at first, later what was replaced."""
        adopt_parameters(self.residency, self.model)
        if self.residency is not None:
            for parameter in self.optimizer.state:
                entry = self.updates.entries.get(id(parameter))
                name = entry.name if entry is not None else "a parameter"
                adopt_state(self.residency, self.optimizer, parameter, name)
            self.residency.trim()

    def _switch(self, replaying: bool) -> int:
        self.saved.in_replay = self.updates.in_replay = replaying
        return self.saved.saved

    def _run(self, batch: Any, last: bool, rehearsing: bool = False) -> torch.Tensor:
        """Forward and backward, with the updates that they make possible."""
        inputs, targets, named = batch
        updates, spending = self.updates, self.spending
        self.saved.room, self.saved.replay_room = spending.room, spending.replay_room
        updates.begin(used_outside(self.model, self.blocks, spending.replayed) | self._read_outside, last, rehearsing)
        if self.residency is not None:
            self.residency.window = spending.window
            self.residency.begin_step()
        self._forward = True
        try:
            with self.replays.installed(spending.replayed), self.saved.hooks(), torch.enable_grad():
                outputs = _called(self.model, inputs)
                loss = self.loss_fn(outputs, *targets, **named)
                del outputs
                if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
                    raise TrainStepError(
                        "the loss is not a tensor with one element",
                        where="effcc.train_step(loss_fn=...)",
                        remedy="Return the mean or the sum.",
                    )
                result = loss.detach().clone()
                self._forward = False
                if updates.watch is not None:
                    updates.watch("the backward")
                loss.backward()  # type: ignore[no-untyped-call]
                del loss
                updates.end()
            return result
        finally:
            self.saved.in_replay = updates.in_replay = False
            self.replays.within = None
            self._forward = False
            if self.residency is not None:
                self.residency.end_step()

    def _plan(self, batch: Any) -> None:
        """Choose what stays in memory for a batch like this one. Raises BudgetError."""
        if self.memory_budget is None:
            self._spent, self.spending = None, Spending()
            if self.residency is not None and not self.residency.all_stay:
                self.residency.keep(None)
            return
        key = (self.model.training, len(self.updates.entries), *map(_description, tree_leaves(batch)))
        all_homes = self.residency.homes() if self.residency is not None else []
        # The optimizer's state is there after the first update only.
        if (key, self.memory_budget, len(all_homes)) == self._spent:
            return
        if key not in self.rehearsed:
            found = self._rehearse(batch)
            if found is None:
                self._spent = None
                return
            self.rehearsed[key] = found
        rehearsed = self.rehearsed[key]
        if rehearsed.floor > self.memory_budget:
            raise BudgetError(
                f"the step needs {bytes_text(rehearsed.floor)}, more than the memory budget of "
                f"{bytes_text(self.memory_budget)}",
                where=rehearsed.holders,
                remedy=f"The least budget that works is {rehearsed.floor} bytes ({bytes_text(rehearsed.floor)})."
                + (" " if self.residency is not None else " With swap=True it is less. ")
                + "A smaller batch or a narrower dtype needs less.",
            )
        self.spending = spend(self.memory_budget, rehearsed, self.blocks, all_homes, self.residency is not None)
        if self.residency is not None:
            self.residency.keep(self.spending.kept)
        self._spent = (key, self.memory_budget, len(all_homes))

    def _rehearse(self, batch: Any) -> Rehearsed | None:
        """Measure the step with the least memory. None where a profiler is on: this step is then the least one."""
        while True:
            rehearsal.give_back()
            self.spending = least(self.blocks, self.residency is not None)
            if self.residency is not None:
                self.residency.keep([])
                self.residency.window = 0
                self.residency.trim()
            try:
                known = self._known_reads()
                found = self._rehearse_once(batch)
                if found is None or self._known_reads() == known:
                    return found
                # Who reads what decides how long gradients wait: it is measured again with what is known now.
            except ReplayError as error:
                block = next(block for block in self.blocks if block.name == error.name)
                kind = type(block.module)
                self.blocks = [each for each in self.blocks if type(each.module) is not kind]
                self.notes.append(f"{kind.__name__} is not computed again in the backward: {error}")

    def _known_reads(self) -> tuple[set[int], list[set[int]]]:
        """What reads which parameters: outside of blocks, and each block."""
        outside = used_outside(self.model, [], self.blocks) | self._read_outside
        return outside, [set(block.reads) for block in self.blocks]

    def _rehearse_once(self, batch: Any) -> Rehearsed | None:
        here = self.residency.names_here if self.residency is not None else dict
        diary = rehearsal.Diary(here)
        bring_back = self.updates.set_aside()
        held, saved = self.held_bytes(batch), self.saved.saved
        if self.residency is not None:
            self.residency.watch = lambda home: self._watch(diary, home)
        self.updates.watch = diary.note
        try:
            with rehearsal.taken_back(self.model):
                growth, mark = rehearsal.measured(
                    lambda: self._run(batch, last=True, rehearsing=True), diary, self.device
                )
        except BaseException:
            self.updates.abandon()
            if self.residency is not None:
                self.residency.recover()
            raise
        finally:
            self.updates.watch = None
            if self.residency is not None:
                self.residency.watch = None
            bring_back()
        self._read_outside |= self.updates.late
        if growth is None:
            return None
        within = max((block.saved_bytes for block in self.blocks), default=0)
        store = self.store
        bandwidth = store.copied / store.seconds if store is not None and store.seconds else USUAL_BANDWIDTH
        replays = sum(block.saved_bytes for block in self.blocks)
        floor = held + growth + self.updates.state_to_stay + rehearsal.SCALARS
        return Rehearsed(floor, self.saved.saved - saved - replays, within, bandwidth, diary.at(mark, floor))

    def _watch(self, diary: rehearsal.Diary, home: Home) -> None:
        """A home comes in while the step is rehearsed, where everything does that is used."""
        block: Block | None = self.replays.within
        diary.note(f"the block {block.name}" if block is not None else "")
        if block is not None:
            block.reads.add(home.key)
        elif self._forward:
            self._read_outside.add(home.key)


def _called(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def _description(leaf: Any) -> Any:
    """What the memory of a step depends on."""
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.dtype, leaf.requires_grad
    return (type(leaf), leaf) if isinstance(leaf, bool | int | str) else type(leaf)
