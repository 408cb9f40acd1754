"""One replica: local steps on its shard. It knows neither Spark nor sockets."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sparkdeep import seams
from sparkdeep.data.batches import Batch
from sparkdeep.data.order import steps_per_epoch
from sparkdeep.data.schema import Schema
from sparkdeep.data.shards import Shard
from sparkdeep.errors import CheckpointError, SparkdeepError
from sparkdeep.models.carried import Carried, pooling_of
from sparkdeep.models.denominators import BatchLoss
from sparkdeep.models.losses import LossFunction, single_row_norms
from sparkdeep.models.modes import Modes
from sparkdeep.models.program import Program, inner_optimizer, other_modules
from sparkdeep.models.validation import Evaluator
from sparkdeep.models.watching import AttributeWatch
from sparkdeep.optim.drift import CONTROL, term_of
from sparkdeep.optim.schedule import stretches
from sparkdeep.protocol.messages import RoundSpec, Update
from sparkdeep.replica.gradients import GradientWork, accumulate
from sparkdeep.replica.reading import Progress, Reader
from sparkdeep.replica.state import RandomState, begin_anew, group_settings, set_mode, traveling, write_inner_state
from sparkdeep.replica.update import LocalResult, LocalUpdate
from sparkdeep.settings.run import LocalSettings
from sparkdeep.tensors.parameters import Layout, fill, float_dtype_of
from sparkdeep.tensors.pooling import Pooling
from sparkdeep.tensors.state_dicts import pack, pack_tensors, unpack_dict, unpack_tensors

__all__ = ["Replica"]

_NOTHING = nullcontext()
_NO_BUFFERS = pack_tensors({})
_MOST_NAMES = 20


class Replica:
    """A model, its inner optimizer and its place in the data.

    Args:
        program: the user's objects; the model's tensors are loaded by `load_tensors`.
        settings: of the local work.
        schema: of the shard.
        shard: this replica's rows.
        number: which replica this is, from 0.
        device: where it computes.
        beat: called with (rows, steps) of the round so far, at most every half second of local work.
    """

    def __init__(
        self,
        program: Program,
        settings: LocalSettings,
        schema: Schema,
        shard: Shard,
        *,
        number: int,
        device: torch.device,
        beat: Callable[[int, int], None] = lambda _rows, _steps: None,
    ) -> None:
        self.number = number
        self.shard = shard
        self.model: nn.Module = program.model.to(device)
        for module in other_modules(program).values():
            module.to(device)
        self.layout = Layout.of(self.model)
        self._program = program
        self._settings = settings
        self.device = device
        self._beat = beat
        self._loss = LossFunction(program, weighted=any(f.role == "weight" for f in schema.fields))
        self._random = RandomState(settings.seed + number, device)
        self._parameters: list[Tensor] = [p for _, p in self.model.named_parameters() if p.requires_grad]
        self.exchange = LocalUpdate(self.layout, settings, self._parameters)
        self._modes = Modes(program)
        self._carried = Carried(program)
        self._watch = AttributeWatch(program)
        self._own_buffers: dict[str, Tensor] | None = None
        self.begun: dict[str, Tensor] = {}
        """The state beside the parameters that the round began with."""
        self._drift = term_of(settings.drift_correction, self._parameters)
        self._reader = Reader(program, settings, schema, shard, device=device, float_dtype=float_dtype_of(self.model))
        self._gradients = GradientWork(self._modes, self._reader, self._parameters, self.layout, self._loss_of)
        self.train_rows = shard.info.rows["train"]
        self.steps_per_epoch = steps_per_epoch(
            self.train_rows, batch_size=settings.batch_size, accumulate_batches=settings.accumulate_batches
        )
        self._start_optimizer(0)

    # -- state ---------------------------------------------------------------------------------------------------

    def load_tensors(self, data: bytes) -> None:
        """Load the parameters that do not travel with every round, as `state_dicts.pack_tensors`; b"" when there are none.

        Raises:
            ProtocolError: one has another shape than the model's.
        """
        fill(self.model, unpack_tensors(data) if data else {})
        self._carried.settle()

    def restart(self, scheduler_steps: int) -> None:
        """Begin with a fresh optimizer and random stream, the learning-rate clock at `scheduler_steps`."""
        self._random = RandomState(self._settings.seed + self.number, self.device)
        self._start_optimizer(scheduler_steps)
        self.exchange.restart()
        self._own_buffers = None
        if scheduler_steps:  # in mid-run
            self._drift.restart()

    def save_state(self) -> bytes:
        """Optimizer, learning-rate clock and random stream, without pickle."""
        scheduler = self._scheduler.state_dict() if self._scheduler is not None else None
        return pack(
            {
                "optimizer": self._optimizer.state_dict(),
                "scheduler": scheduler,
                "random": self._random.state_dict(),
                "exchange": self.exchange.state_dict(),
                "buffers": self._own_buffers,
                "clock": self._clock,
                "drift": self._drift.state_dict(),
            }
        )

    def load_state(self, data: bytes) -> None:
        """Go on from `save_state`'s bytes.

        Raises:
            CheckpointError: the bytes are damaged, or are of another optimizer, scheduler or model.
        """
        state = unpack_dict(data)
        try:
            self._optimizer.load_state_dict(state["optimizer"])
            if self._scheduler is not None:
                self._scheduler.load_state_dict(state["scheduler"])
            self._random.load_state_dict(state["random"])
            with self._random.borrowed():
                pass  # so that a position which no generator accepts is refused here, and not in mid-round
            self.exchange.load_state_dict(state["exchange"])
            self._own_buffers = state["buffers"]
            self._clock = int(state["clock"])
            self._drift.load_state_dict(state["drift"])
        except SparkdeepError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"the state of replica {self.number} ({len(data)} bytes) cannot be gone on from: {type(error).__name__}: {error}"
            ) from error

    def _start_optimizer(self, scheduler_steps: int) -> None:
        self._optimizer, self._scheduler = inner_optimizer(self._program)
        self._fresh = group_settings(self._optimizer)
        set_mode(self._optimizer, "eval")  # between rounds the parameters are those that score
        self._clock = scheduler_steps
        for _ in range(scheduler_steps if self._scheduler is not None else 0):
            self._scheduler.step()

    # -- one round -----------------------------------------------------------------------------------------------

    def begin_round(self, buffers: bytes | None) -> None:
        """Take over what the next round starts from.

        Args:
            buffers: the pooled ones, safetensors; None while they are still on their way (`overlap`). A replica that runs
                ahead keeps its own, as its parameters are its own too.
        """
        self.exchange.begin()
        if self._own_buffers is not None:
            self.begun = self._own_buffers
        elif buffers is not None:
            self.begun = unpack_tensors(buffers)
        else:
            return
        self._carried.write(self.begun)

    def load_for_scoring(self, parameters: Tensor, buffers: bytes) -> None:
        """Take over global parameters, (numel,), and buffers until the next round begins."""
        self.exchange.write(parameters)
        self._carried.write(unpack_tensors(buffers))

    def load_inner_state(self, sections: list[str], values: Tensor) -> None:
        """Take over averaged optimizer state, shape (len(sections) * numel,)."""
        size = self.layout.numel
        parts = [self.layout.views(values[i * size : (i + 1) * size]) for i in range(len(sections))]
        if CONTROL in sections:
            self._drift.take(parts.pop(sections.index(CONTROL)))
            sections = [name for name in sections if name != CONTROL]
        write_inner_state(self._optimizer, self._parameters, sections, parts)

    def train(self, spec: RoundSpec, between: Callable[[float], None] = lambda _share: None) -> LocalResult:
        """Do this replica's part of a round, from the parameters it holds.

        Args:
            spec: of the round.
            between: called before every step with the share of the steps that is done, and with 1 before the update is
                made; raises to give up.
        """
        if self._settings.inner_state == "reset":
            begin_anew(self._optimizer, self._fresh)
        # In some rounds only, as it takes time; in which ones depends on no clock.
        self._marks = self._watch.marks() if spec.round & (spec.round - 1) == 0 else None
        progress = Progress(self._beat)
        seams.reach("train", round_number=spec.round, replica=self.number)
        if spec.gradient:
            with self._random.borrowed() if spec.gradient == "all" else self._random.installed():
                began = time.perf_counter()
                gradient = self._gradients.mean(spec, self.steps_per_epoch, progress, between)
            return self._result(spec, progress, began, gradient)
        self._modes.train()
        set_mode(self._optimizer, "train")
        self._drift.begin()
        with self._random.installed():
            began = time.perf_counter()  # replicas of one process take turns, and that is no work
            for epoch, first, last in stretches(spec, self.steps_per_epoch):
                with self._reader.training(epoch, first, last) as steps:
                    for _ in range(first, last):
                        late = spec.budget_s is not None and time.perf_counter() - began >= spec.budget_s
                        if late and progress.steps:
                            break
                        between(progress.steps / spec.num_steps)
                        seams.reach("step", round_number=spec.round, replica=self.number)
                        self._local_step(self._batches(steps, progress), progress)
            self._clock += progress.steps
            if not spec.own_clock:
                self._keep_time(spec.num_steps - progress.steps)
        set_mode(self._optimizer, "eval")
        between(1.0)  # not while the generators are held: it may wait for other replicas of this process
        return self._result(spec, progress, began)

    def skip(self, spec: RoundSpec) -> None:
        """Be where a replica is that a round went on without: no step is taken, and the common clock goes on."""
        if not spec.own_clock:
            self._keep_time(spec.num_steps)

    def aside(self) -> AbstractContextManager[None]:
        """For a `between` that waits for others: meanwhile the process's random generators are not this replica's."""
        return self._random.aside()

    def forget_logged(self) -> None:
        """Drop what the model logged in a round that was undone."""
        self._loss.take_logged(training=True)

    def catch_up(self, clock: int) -> None:
        """Advance the learning-rate clock to where it is without this replica, which missed rounds."""
        self._keep_time(max(0, clock - self._clock))

    def _keep_time(self, num_steps: int) -> None:
        """A replica that is out of rows keeps the common clock of the learning rate all the same."""
        self._clock += num_steps
        for _ in range(num_steps if self._scheduler is not None else 0):
            self._scheduler.step()

    def _local_step(self, batches: list[Batch], progress: Progress) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        if len(batches) == 1:  # left alone, so that the step is a plain torch loop's to the last bit
            loss = self._loss_of(batches[0])
            loss.mean.backward()
            progress.add(batches[0].rows, loss)
        else:
            accumulate(batches, self._loss.count, self._loss_of, self._parameters, progress)
        self._drift.adjust()
        if self._settings.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._settings.clip_grad_norm)
        self._optimizer.step()
        self._drift.stepped(self._optimizer.param_groups)
        if self._scheduler is not None:
            self._scheduler.step()
        progress.end_step()

    def _loss_of(self, batch: Batch) -> BatchLoss:
        alone = batch.rows == 1 and self.train_rows == 1
        with self._autocast(), single_row_norms(self.model) if alone else _NOTHING:
            return self._loss(self.model, batch)

    def _batches(self, steps: Iterator[list[Batch]], progress: Progress) -> list[Batch]:
        began = time.perf_counter()
        batches = next(steps)
        progress.input_s += time.perf_counter() - began
        return batches

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._settings.precision is None:
            return _NOTHING
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _result(self, spec: RoundSpec, progress: Progress, began: float, gradient: Tensor | None = None) -> LocalResult:
        sections: list[str] = []
        vector, buffers, finite = self.layout.empty(0), b"", True
        if self.exchange.overlap:
            self._own_buffers = self._carried.read()
            vector = self.exchange.end()
        weight, loss_sum = progress.sums()
        if weight > 0:
            sections, state = traveling(self._drift, self._settings, self._optimizer, self._parameters)
            if sections:
                vector = self.exchange.end(len(sections))
                for i, tensors in enumerate(state):
                    start = (i + 1) * self.layout.numel
                    for view, tensor in zip(self.layout.views(vector[start:]), tensors, strict=True):
                        view.copy_(tensor)
            elif not self.exchange.overlap:
                vector = self.exchange.end() if gradient is None else gradient
            buffers = self._packed_buffers()
            finite = math.isfinite(loss_sum) and self.exchange.finite(vector) and not self._carried.spoiled()
        update = Update(
            round=spec.round,
            rows=progress.rows,
            weight=weight,
            steps=progress.steps,
            loss_sum=loss_sum if math.isfinite(loss_sum) else 0.0,
            finite=finite,
            sections=sections,
            buffer_bytes=len(buffers),
            compute_s=time.perf_counter() - began,
            input_s=progress.input_s,
            changed=[] if self._marks is None else self._watch.changed(self._marks)[:_MOST_NAMES],
            logged={name: total / rows for name, (total, rows) in self._loss.take_logged(training=True).items()},
        )
        return LocalResult(update=update, vector=vector, buffers=buffers, exchange=self.exchange, replica=self.number)

    def _packed_buffers(self) -> bytes:
        state = self._carried.read() if self._own_buffers is None else self._own_buffers
        return pack_tensors(state) if state else _NO_BUFFERS

    def pooling(self) -> Pooling:
        """How replicas' state becomes one."""
        return pooling_of(self._program)

    # -- validation ----------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, Any]:
        """Score the model as it is on this shard's validation rows, in eval mode; as `state_dicts.pack` takes it."""
        evaluator = Evaluator(self._loss, self._program.metrics or {}, has_step=self._program.training_step is not None)
        self._modes.eval()
        progress = Progress(self._beat)
        with torch.no_grad(), self._random.borrowed():
            for batch in self._reader.validation():
                with self._autocast():
                    evaluator.add(self.model, batch)
                progress.add(batch.rows)
        return evaluator.scores()
