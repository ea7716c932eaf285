"""One rank of a pipeline: runs its passes in the schedule's order.

Forward and backward of a stage are its module and torch's autograd; the passes of a sharded vocabulary are
``output_layer`` and ``input_layer``. Between ranks go what ``communication`` moves. The schedule decides the order and
nothing else: any schedule gives the same gradients.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ...errors import PipelineError
from ...formatting import first_line
from ...passes.pipeline_parallel.schedule import Pass, Schedule
from ...passes.pipeline_parallel.vocabulary_cascade import output_cascade
from ..context_parallel.exchange import SequenceGroup
from ..mesh_layout import MeshLayout, summed
from ..rank_watch import RankWatch
from .communication import Lane, Transfers
from .gradients import GradientSums
from .losses import loss_weights
from .output_layer import Microbatch, OutputLayer, Shard
from .parameters import RankParameters
from .stages import Stage, Stages, Value, digest


@dataclass
class StepReport:
    """What a step did. ``loss``: of the whole batch, on every rank. ``barriers``: microbatch -> collectives of all
    ranks' work that this rank's compute waited for; ``live``: most microbatches between forward and backward, per
    stage."""

    loss: float = 0.0
    barriers: Counter[int] = field(default_factory=Counter)
    live: dict[int, int] = field(default_factory=dict)


@dataclass
class _Held:
    """What a stage keeps of a microbatch: the leaves that gradients come back to, its outputs, their gradients."""

    leaves: list[torch.Tensor]
    outputs: list[torch.Tensor]
    gradients: list[torch.Tensor] = field(default_factory=list)


class PipelineRank:
    """``model_state``: parameters and buffers by path, of which only this rank's are kept. ``scale``: what the loss is
    multiplied with, such as a GradScaler's. ``mesh``: of axes ``pp``, ``dp`` and ``cp``; replicas take their own
    microbatches each, and their gradients are added up. ``sequence``: with ``cp``, where attentions exchange keys.
    ``timeout``: after which a rank that does not answer ends the others, which then name it. Every process of the
    default group must make one, at once. Raises PipelineError where processes, schedule, stages and mesh do not fit.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Stages,
        model_state: Mapping[str, torch.Tensor],
        *,
        scale: float = 1.0,
        timeout: timedelta = timedelta(seconds=300),
        mesh: DeviceMesh | None = None,
        sequence: SequenceGroup | None = None,
    ) -> None:
        schedule.check()
        self.layout = MeshLayout.of(mesh, "pp", PipelineError)
        self.rank, self.ranks = self.layout.rank, self.layout.ranks
        if self.ranks != schedule.ranks:
            raise PipelineError(
                f"the schedule is for {schedule.ranks} ranks, {self.ranks} are running",
                where=self.layout.name,
                remedy=f"start {schedule.ranks} processes" + (" a replica" if mesh is not None else ""),
            )
        if len(stages.stages) != schedule.stages or bool(schedule.vocabulary) != (stages.output is not None):
            raise PipelineError(
                "schedule and stages were not made for each other", remedy="cut the step for the schedule"
            )
        self.schedule, self.stages, self.scale = schedule, stages, scale
        self.watch = RankWatch(
            timeout.total_seconds(), PipelineError,
            "see that rank's own output, and start the step again from the last checkpoint; PipelineRank has a timeout",
        )  # fmt: skip
        if sequence is not None:
            sequence.watch = self.watch
        remedy = "give all ranks the same plan and build the same model"
        self.watch.check_equal("the plan or model", digest(schedule, stages), remedy)
        self.parameters = RankParameters(schedule, stages, model_state, self.rank)
        with self.watch.waiting("making groups"):
            self.transfers = Transfers(schedule.stages, self._group(timeout))
            names = ("rows", "barrier 0", "barrier 1", "embedding", "gradient")
            self.lanes = {name: Lane(name, self._group(timeout)) for name in names}
            self.sums = GradientSums(schedule, self.parameters, self.layout, timeout)
        self.output: OutputLayer | None = None
        if stages.output is not None:
            kind = "two-barriers" if schedule.vocabulary == "interlaced" else schedule.vocabulary
            cascade = output_cascade(kind, stages.output.loss.label_smoothing)
            shard = Shard.of(self.rank, self.ranks, stages.output.size)
            self.output = OutputLayer(cascade, self.parameters.output_shard(), shard)
        self._run: dict[str, Callable[[Pass], None]] = {
            "F": self._forward, "B": self._backward, "I": self._backward_input, "W": self._backward_weight,
            "S": self._output_start, "T": self._output_finish, "E": self._embed, "D": self._embed_gradient,
        }  # fmt: skip

    def _group(self, timeout: timedelta) -> dist.ProcessGroup:
        found = self.layout.row_group(timeout)
        assert found is not None
        return found

    def step(self, microbatches: Sequence[Sequence[Any]]) -> StepReport:
        """Run the schedule once: gradients are added to those of ``parameters``. Each rank gets all microbatches'
        inputs of its replica; only the ranks that use one read it. Raises PipelineError naming rank and pass."""
        if len(microbatches) != self.schedule.microbatches:
            said = f"the schedule has {self.schedule.microbatches} microbatches, the batch {len(microbatches)}"
            raise self._failed("the begin of a step", said, "cut the batch into as many, or plan for that number")
        self.inputs = microbatches
        self.report = StepReport()
        self.held: dict[tuple[int, int], _Held] = {}
        self.handed: dict[tuple[int, int, bool], list[torch.Tensor]] = {}
        self.micro: dict[int, Microbatch] = {}
        self.needed: dict[int, int] = {}
        self.waiting: dict[tuple[str, int], Future[Any]] = {}
        self.sent: list[Future[Any]] = []
        self.sums.begin()
        try:
            self.watch.doing("the begin of a step")
            self.weights = loss_weights(self.stages, self.inputs, self.scale, self.layout.replicas, self._over_replicas)
            self._post_receives()
            self.losses = torch.zeros((), dtype=torch.float64)
            for each in self.schedule.orders[self.rank]:
                self.watch.doing(f"pass {each}")
                self._run[each.kind](each)
                self.sums.after(each)
            with self.watch.waiting("the end of the step"):
                self._finish()
        except (RuntimeError, ValueError, IndexError) as error:  # of this rank's own; what waits has its explanation
            said = f"{type(error).__name__}: {first_line(error)}"
            raise self._failed(self.watch.state.place, said, "the cause is above") from error
        except PipelineError:
            self.close()
            raise
        return self.report

    def _over_replicas(self, count: int) -> int:
        if self.sums.lane is None:
            return count
        group = self.sums.lane.group
        return self.watch.collective("counting the batch's tokens", lambda: int(summed(torch.tensor(count), group)))

    def _finish(self) -> None:
        """Wait for what no pass of this rank has waited for, and add up gradients and losses."""
        for future in (*self.waiting.values(), *self.sent):
            future.result()
        self.transfers.finish()
        self.sums.finish()
        if self.output is None:
            summed(self.losses, self.transfers.group)
        if self.sums.lane is not None:
            summed(self.losses, self.sums.lane.group)
        self.report.loss = float(self.losses)

    def _failed(self, step: str, said: str, remedy: str) -> PipelineError:
        """This rank's own error; the others are told."""
        self.watch.failed(step, said)
        self.close()
        return PipelineError(said, where=f"{self.layout.name}, {step} ({self.schedule.name})", remedy=remedy)

    def close(self) -> None:
        """End the threads. Collectives that have begun end by themselves, within the time limit."""
        self.watch.close()
        for lane in (*self.lanes.values(), *([self.sums.lane] if self.sums.lane is not None else [])):
            lane.close()

    # --- F, B, I, W

    def _forward(self, each: Pass) -> None:
        stage, microbatch = self.stages.stages[each.stage], each.microbatch
        received = self._take(stage.receives, each, True) if each.stage else []
        leaves = [
            tensor.detach().requires_grad_(value.differentiable)
            for tensor, value in zip(received, stage.receives, strict=True)
        ]
        given = {value.name: leaf for value, leaf in zip(stage.receives, leaves, strict=True)}
        if each.stage == 0 and self.stages.embedded is not None:
            embedded = self._await("embedding", microbatch).detach().requires_grad_()
            leaves.append(embedded)
            given[self.stages.embedded.name] = embedded
        with torch.enable_grad():
            results = stage.module(
                *(self._argument(stage, index, microbatch, given) for index in range(len(stage.arguments)))
            )
        outputs = [results[0]] if each.stage == self.schedule.last else list(results)
        self.held[each.stage, microbatch] = _Held(leaves, outputs)
        live = sum(held_stage == each.stage for held_stage, _ in self.held)
        self.report.live[each.stage] = max(live, self.report.live.get(each.stage, 0))
        if each.stage < self.schedule.last:
            self._give(outputs, each.stage + 1, microbatch, True)
        elif self.output is not None:
            self._broadcast("rows", microbatch, outputs[0])
        else:
            self.losses += (outputs[0].detach() * self.weights[microbatch]).double()

    def _gradients(self, each: Pass, held: _Held) -> list[torch.Tensor]:
        """Gradients of a stage's outputs."""
        if each.stage < self.schedule.last:
            sends = self.stages.stages[each.stage].sends
            return self._take(tuple(value for value in sends if value.differentiable), each, False)
        if self.output is None:
            return [torch.as_tensor(self.weights[each.microbatch], dtype=held.outputs[0].dtype)]
        self._await_barrier(len(self.output.cascade.meetings) - 1, each.microbatch)
        gradient = self.output.input_gradient(self.micro[each.microbatch]).reshape(held.outputs[0].shape)
        self._done_with(each.microbatch)
        return [gradient]

    def _backward(self, each: Pass) -> None:
        held = self.held[each.stage, each.microbatch]
        torch.autograd.backward(self._differentiable(each, held), self._gradients(each, held))
        self._send_gradients(each, held, [self._gradient_of(leaf) for leaf in held.leaves if leaf.requires_grad])
        del self.held[each.stage, each.microbatch]

    def _backward_input(self, each: Pass) -> None:
        """The gradients of what the stage received; the graph stays for W, which walks it again for the weights."""
        held = self.held[each.stage, each.microbatch]
        held.gradients = self._gradients(each, held)
        leaves = [leaf for leaf in held.leaves if leaf.requires_grad]
        found: Sequence[torch.Tensor | None] = ()
        if leaves:
            found = torch.autograd.grad(
                self._differentiable(each, held), leaves, held.gradients, retain_graph=True, allow_unused=True
            )
        filled = [torch.zeros_like(leaf) if value is None else value for leaf, value in zip(leaves, found, strict=True)]
        self._send_gradients(each, held, filled)

    def _backward_weight(self, each: Pass) -> None:
        held = self.held.pop((each.stage, each.microbatch))
        parameters = self.parameters.of_stage(each.stage)
        if parameters:
            torch.autograd.backward(self._differentiable(each, held), held.gradients, inputs=parameters)

    def _differentiable(self, each: Pass, held: _Held) -> list[torch.Tensor]:
        if each.stage == self.schedule.last:
            return held.outputs
        sends = self.stages.stages[each.stage].sends
        return [tensor for tensor, value in zip(held.outputs, sends, strict=True) if value.differentiable]

    def _send_gradients(self, each: Pass, held: _Held, gradients: list[torch.Tensor]) -> None:
        if each.stage == 0 and self.stages.embedded is not None:
            self._broadcast("gradient", each.microbatch, gradients.pop())
        if each.stage:
            self._give(gradients, each.stage - 1, each.microbatch, False)

    # --- S, T

    def _output_start(self, each: Pass) -> None:
        assert self.output is not None and self.stages.targets is not None
        loss, microbatch, rows = self.stages.loss, each.microbatch, self.stages.rows
        assert loss is not None
        source = self.schedule.placement[self.schedule.last]
        hidden = self._await("rows", microbatch)
        targets = self.stages.targets(*self.inputs[microbatch]).flatten()
        counted = targets != loss.ignore_index
        scale = counted.to(rows.dtype) * self.weights[microbatch]
        started = self.output.start(hidden.reshape(-1, rows.shape[-1]), torch.where(counted, targets, -1), scale)
        self.micro[microbatch] = started
        self.needed[microbatch] = 1 + (self.rank == source)
        self._exchange(0, microbatch)

    def _output_finish(self, each: Pass) -> None:
        assert self.output is not None
        microbatch = each.microbatch
        self._await_barrier(0, microbatch)
        started = self.micro[microbatch]
        self.losses += self.output.loss(started).double()
        self.parameters.add_gradient(self.output.weight, self.output.finish(started))
        if len(self.output.cascade.meetings) > 1:
            self._exchange(1, microbatch)
        self._done_with(microbatch)

    def _exchange(self, meeting: int, microbatch: int) -> None:
        output, started = self.output, self.micro[microbatch]
        assert output is not None
        self._submit(f"barrier {meeting}", microbatch, lambda lane: output.exchange(started, meeting, lane.all_reduce))

    def _await_barrier(self, meeting: int, microbatch: int) -> None:
        """Compute goes on when all ranks have brought their part."""
        if (f"barrier {meeting}", microbatch) in self.waiting:
            self._await(f"barrier {meeting}", microbatch)
            self.report.barriers[microbatch] += 1

    def _done_with(self, microbatch: int) -> None:
        """One of the passes on this rank that need a microbatch's logits is through: T, and B where the last stage is.
        With the last of them the logits go."""
        self.needed[microbatch] -= 1
        if not self.needed[microbatch]:
            del self.micro[microbatch]

    # --- E, D

    def _embed(self, each: Pass) -> None:
        assert self.stages.indices is not None and self.stages.embedded is not None
        microbatch = each.microbatch
        place, inside = self._rows_here(microbatch)
        found = self.parameters.input_shard().detach()[place] * inside.unsqueeze(-1)
        self._submit("embedding", microbatch, lambda lane: lane.all_reduce(found, "sum"))

    def _embed_gradient(self, each: Pass) -> None:
        microbatch = each.microbatch
        assert self.stages.input is not None
        gradient = self._await("gradient", microbatch)
        place, inside = self._rows_here(microbatch)
        inside = inside & (self._indices(microbatch) != self.stages.input.padding)
        weight = self.parameters.input_shard()
        total = torch.zeros_like(weight)
        total.index_add_(0, place[inside], gradient[inside])
        self.parameters.add_gradient(weight, total)

    def _indices(self, microbatch: int) -> torch.Tensor:
        assert self.stages.indices is not None
        return self.stages.indices(*self.inputs[microbatch])

    def _rows_here(self, microbatch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where in this rank's shard the indices lie (0 for others), and which do."""
        assert self.stages.input is not None
        shard = Shard.of(self.rank, self.ranks, self.stages.input.size)
        place = self._indices(microbatch) - shard.first
        inside = (place >= 0) & (place < shard.rows)
        return torch.where(inside, place, 0), inside

    # --- what goes between passes

    def _argument(self, stage: Stage, index: int, microbatch: int, given: Mapping[str, torch.Tensor]) -> Any:
        argument = stage.arguments[index]
        if argument.kind in ("received", "embedded"):
            return given[argument.name]
        if argument.kind == "input":
            return self.inputs[microbatch][self.stages.input_names.index(argument.name)]
        return self.parameters.value(argument)

    def _take(self, values: Sequence[Value], each: Pass, forward: bool) -> list[torch.Tensor]:
        """What the neighbouring stage has given for this pass."""
        other = each.stage - 1 if forward else each.stage + 1
        source = self.schedule.placement[other]
        if source == self.rank:
            return self.handed.pop((each.stage, each.microbatch, forward))
        shapes = [(value.shape, value.dtype) for value in values]
        with self.watch.waiting(f"pass {each}, from rank {source} of the pipeline"):
            return self.transfers.receive(shapes, source, each.stage, each.microbatch, forward, torch.device("cpu"))

    def _give(self, tensors: list[torch.Tensor], stage: int, microbatch: int, forward: bool) -> None:
        target = self.schedule.placement[stage]
        if target == self.rank:
            self.handed[stage, microbatch, forward] = [tensor.detach() for tensor in tensors]
        else:
            self.transfers.send(tensors, target, stage, microbatch, forward)

    def _broadcast(self, lane: str, microbatch: int, tensor: torch.Tensor) -> None:
        """Hand a tensor to all ranks. This one goes on with it at once: others may be in no hurry."""
        whole = tensor.detach().contiguous()
        self.sent.append(self.lanes[lane].submit(lambda: self.lanes[lane].broadcast(whole, self.rank)))
        known: Future[torch.Tensor] = Future()
        known.set_result(whole)
        self.waiting[lane, microbatch] = known

    def _post_receives(self) -> None:
        """Take part in all broadcasts of other ranks as they come, so that no sender waits for this rank's compute."""
        for lane, value, stage in (
            ("rows", self.stages.rows, self.schedule.last),
            ("gradient", self.stages.embedded, 0),
        ):
            source = self.schedule.placement[stage]
            if value is None or source == self.rank or (lane == "rows" and self.output is None):
                continue
            for microbatch in range(self.schedule.microbatches):
                self._submit(lane, microbatch, functools.partial(_receive, value=value, source=source))

    def _submit(self, lane: str, microbatch: int, collective: Callable[[Lane], Any]) -> None:
        self.waiting[lane, microbatch] = self.lanes[lane].submit(lambda: collective(self.lanes[lane]))

    def _await(self, lane: str, microbatch: int) -> Any:
        future = self.waiting.pop((lane, microbatch))
        with self.watch.waiting(f"{self.watch.state.place}, at {lane} of microbatch {microbatch}"):
            return future.result()

    @staticmethod
    def _gradient_of(leaf: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _receive(lane: Lane, *, value: Value, source: int) -> torch.Tensor:
    return lane.broadcast(torch.empty(value.shape, dtype=value.dtype), source)
