"""What moves a run: one optimiser step, one validation, the end of an epoch."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from emoe_med.config import TrainingConfig
from emoe_med.errors import DivergedError, Fault
from emoe_med.moe import StepSums
from emoe_med.training import optim, runtime
from emoe_med.training.loader import ResumableSampler, augmentation_keys, make_loader, mixed, read_batches
from emoe_med.training.pictures import Picture
from emoe_med.training.ranks import Machine
from emoe_med.training.task import Batch, Record, Task

LOG = logging.getLogger("emoe_med")
POINTS_PER_EPOCH = 50  # step metrics in the record: enough to draw a curve


class Stopped(Exception):
    """A stop signal came during validation."""


@dataclass
class Position:
    """How far a run is: what a resume needs besides weights, moments and random state."""

    epoch: int = 0  # epochs finished
    batch: int = 0  # micro-batches of the running epoch that were trained on
    step: int = 0  # optimiser steps, left-out ones included
    left_out: int = 0  # steps without an update because something was not finite
    updates: int = 0  # updates in the running epoch
    totals: dict[str, float] = field(default_factory=dict)  # sums of the loss parts over these updates
    best: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """Hold model, optimiser, moving average and position of a run, and move them."""

    def __init__(self, task: Task, config: TrainingConfig, machine: Machine, tracker: Record) -> None:
        self.task, self.config, self.machine, self.tracker = task, config, machine, tracker
        on_cuda, ranks = machine.device.type == "cuda", machine.world_size
        self.sampler = ResumableSampler(
            len(task.train_data), config.batch_size, config.seed, config.accumulate, machine.rank, ranks
        )
        self._train_loader = make_loader(task.train_data, self.sampler, config.workers, pin_memory=on_cuda)
        self._val_loader = make_loader(mixed(task.val_data), config.batch_size, config.workers, pin_memory=on_cuda)
        model = task.build_model().to(machine.device)
        if on_cuda and ranks > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model: nn.Module = model
        if config.channels_last:
            _convolutions_channels_last(model)
        self.average: AveragedModel | None = None
        if config.ema_decay is not None:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        self.optimizer = optim.build_optimizer(model, config.lr, config.weight_decay)
        self._ranked: nn.Module = model
        self._learning: list[bool] = []  # of each parameter, as the ranks know it
        self.position = Position()
        self._shapes = "none yet"
        self._pictures: list[Picture] = []  # of the last validation
        self._pace = (0.0, 0)  # start of the epoch in this session, samples since
        self._trained_s = 0.0  # from there to the validation
        runtime.seed_rank(config.seed, machine.rank)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        # an error's traceback keeps the trainer: torch then took the wrapper apart after the group of ranks,
        # as the process ended, and hung there now and then
        self._ranked = self.model

    @property
    def served(self) -> nn.Module:
        """The model that is validated and kept: the moving average, where there is one."""
        return self.model if self.average is None else self.average.module

    def describe_batch(self) -> str:
        """Tell the sizes that memory depends on."""
        sizes = f"batch_size {self.config.batch_size}, accumulate {self.config.accumulate}"
        return f"{sizes}, last batch {self._shapes}"

    def describe(self, metrics: Mapping[str, float] | None = None) -> str:
        """Tell position and loss; after an epoch also what it is selected by."""
        at, name = self.position, self.task.selection[0]
        if metrics is None:
            loss = at.totals.get("loss", math.nan) / max(1, at.updates)
            return f"epoch {at.epoch + 1}/{self.config.epochs}  loss {loss:.4g}"
        loss = at.history[-1]["values"].get("train/loss")
        loss = math.nan if loss is None else loss
        best = f"best {at.best['value']:.4g} (epoch {at.best['epoch']})" if at.best else "no best yet"
        seconds = time.monotonic() - self._pace[0]
        head = f"epoch {at.epoch}/{self.config.epochs}  step {at.step}  train/loss {loss:.4g}"
        return f"{head}  {name} {metrics[name]:.4g}  {best}  {seconds:.1f} s"

    def steps_left(self) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each optimiser step that the running epoch still has."""
        self.model.train()
        begin_epoch = getattr(self.task, "begin_epoch", None)
        if begin_epoch is not None:
            begin_epoch(self.model, self.position.epoch)
        self._join_ranks()
        self._pace = (time.monotonic(), 0)
        self.sampler.epoch, self.sampler.cursor = self.position.epoch, self.position.batch
        if self.position.batch < len(self.sampler):
            batches = read_batches(self._train_loader)
            while step := self._read(batches):
                yield step

    def _join_ranks(self) -> None:
        """Wrap the model for several ranks, and anew where other parameters learn: each that does is waited for."""
        learning = [parameter.requires_grad for parameter in self.model.parameters()]
        if self.machine.world_size > 1 and learning != self._learning:
            self._ranked, self._learning = DistributedDataParallel(self.model), learning

    def _read(self, batches: Iterator[Batch]) -> list[Batch]:
        """Read the micro-batches of one step; where one rank cannot, none goes on."""
        step: list[Batch] = []
        with self.machine.together():
            step = list(islice(batches, self.config.accumulate))
        return step

    def train_step(self, batches: list[Batch]) -> None:
        """Take one optimiser step on micro-batches, or none if loss or gradient is not finite.

        Raises:
            DivergedError: Not finite, more often than `skip_nonfinite` permits.
        """
        at, options = self.position, self.config
        lr = optim.set_schedule(self.optimizer, at.step, options.epochs * self.sampler.steps, options)
        buffers = [buffer.clone() for buffer in self.model.buffers()] if options.skip_nonfinite else []
        self.optimizer.zero_grad(set_to_none=True)
        names, losses = self._backward(batches)  # losses [micro-batches, 1 + parts]
        norm = optim.clip_gradients(self.model, options.clip_norm)
        at.step += 1
        at.batch += len(batches)
        self._pace = (self._pace[0], self._pace[1] + sum(len(batch["row"]) for batch in batches))
        if self.machine.any(not (torch.isfinite(losses).all() & torch.isfinite(norm)))[0]:
            self._leave_out(batches, names, losses, norm, buffers)
            return
        optim.update(self.optimizer, self.model)
        if self.average is not None:
            self.average.update_parameters(self.model)
            optim.after_step(self.average.module)  # an average of orthonormal frames is none until retracted
        means = (self.machine.total(losses.mean(0)) / self.machine.world_size).tolist()
        for name, value in zip(names, means, strict=True):
            at.totals[name] = at.totals.get(name, 0.0) + value
        at.updates += 1
        if (at.step - 1) % max(1, self.sampler.steps // POINTS_PER_EPOCH) == 0:
            values = {"train/step_loss": means[0], "train/lr": lr, "train/gradient_norm": float(norm)}
            self.tracker.metrics(at.step, values)

    def _backward(self, batches: list[Batch]) -> tuple[list[str], Tensor]:
        """Add up the gradients of the mean loss; returns the names `loss`, parts... and their values."""
        values, names = [], ["loss"]
        for number, batch in enumerate(batches, start=1):
            with self._gradients_apart(number < len(batches)):
                prepared = self._prepare(batch, train=True)
                with self._autocast():
                    loss, parts = self.task.loss(self._ranked, prepared)
                (loss / len(batches)).backward()
            names = ["loss", *parts]
            values.append(torch.stack([value.detach().float() for value in (loss, *parts.values())]))
        return names, torch.stack(values)

    def _gradients_apart(self, apart: bool) -> AbstractContextManager[None]:
        """Leave the gradients of the ranks unsummed until the last micro-batch."""
        ranked = self._ranked
        return ranked.no_sync() if apart and isinstance(ranked, DistributedDataParallel) else nullcontext()

    def _autocast(self) -> torch.autocast:
        bf16 = self.config.precision == "bf16"
        return torch.autocast(self.machine.device.type, dtype=torch.bfloat16, enabled=bf16)

    def _prepare(self, batch: Batch, train: bool) -> Batch:
        keys = augmentation_keys(self.config.seed, self.position.epoch if train else 0, batch["row"])
        moved = {name: self._to_device(value) for name, value in batch.items()}
        prepared = self.task.prepare(moved, train, keys)
        tensors = {name: value for name, value in prepared.items() if isinstance(value, Tensor)}
        self._shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        if self.config.channels_last:
            prepared = {**prepared, **{name: _channels_last(tensor) for name, tensor in tensors.items()}}
        return prepared

    def _to_device(self, value: Any) -> Any:
        return value.to(self.machine.device, non_blocking=True) if isinstance(value, Tensor) else value

    def _leave_out(
        self, batches: list[Batch], names: list[str], losses: Tensor, norm: Tensor, buffers: list[Tensor]
    ) -> None:
        """Make no update, tell rows and loss parts, and stop unless the options permit to go on."""
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(self.model.buffers(), buffers, strict=bool(buffers)):
            buffer.copy_(before)  # running statistics have seen the bad batch
        for module in self.model.modules():
            if isinstance(module, StepSums):
                module.clear()  # and so have token counts
        at = self.position
        at.left_out += 1
        rows = self.machine.gather([row for batch in batches for row in batch["row"].tolist()])
        rows = sorted(row for rank in rows for row in rank)
        parts = [dict(zip(names, map(str, values), strict=True)) for values in losses.tolist()]
        dump = {"rows": rows, "losses": parts, "gradient_norm": str(float(norm))}
        self.tracker.note("nonfinite", step=at.step, epoch=at.epoch + 1, **dump)
        where = f"step {at.step} (epoch {at.epoch + 1})"
        LOG.error("loss or gradient not finite at %s, no update made: %s", where, dump)
        if at.left_out > self.config.skip_nonfinite:
            shown = ", ".join(map(str, rows[:20])) + (" ..." if len(rows) > 20 else "")
            reason = f"loss or gradient not finite at {where}, rows {shown}; no update was made"
            self.machine.agree(DivergedError(Fault("NUM-NONFINITE", reason, hint="local.log has the loss parts")))

    def validate(self, stop: runtime.StopSignal) -> dict[str, float]:
        """Measure the served model; the random state of training is the same after it as before.

        Raises:
            Stopped: A signal came (a single process stops between batches; ranks validate to the end).
        """
        self._trained_s = time.monotonic() - self._pace[0]
        model, device = self.served, self.machine.device
        model.eval()
        before = runtime.random_state(device)
        try:
            with torch.no_grad():
                with self._autocast():
                    metrics = self.task.validate(model, self._validation_batches(stop))
                    draw = getattr(self.task, "pictures", None)
                    self._pictures = draw(model) if draw else []
                # what a basis is, not what it would be in bfloat16
                return metrics | self.task.end_of_epoch(model)
        finally:
            runtime.set_random_state(before, device)

    def _validation_batches(self, stop: runtime.StopSignal) -> Iterator[Batch]:
        batches = read_batches(self._val_loader)
        while True:
            # the consumer runs under autocast, which would reach in here and spoil the collation of float16
            with torch.autocast(self.machine.device.type, enabled=False):
                batch = next(batches, None)
                if batch is None:
                    return
                prepared = self._prepare(batch, train=False)
            if stop.code and self.machine.world_size == 1:
                raise Stopped
            yield prepared

    def end_epoch(self, metrics: Mapping[str, float]) -> bool:
        """Record an epoch and go to the next; returns whether its validation is the best so far."""
        at, (name, better) = self.position, self.task.selection
        if name not in metrics:
            raise KeyError(f"selection metric {name} is not among {sorted(metrics)}")
        means = {f"train/{part}": total / at.updates for part, total in at.totals.items()}
        values = {**means, **metrics}
        self.tracker.metrics(at.step, {**values, **self._speed()})
        for picture in self._pictures:
            self.tracker.picture(at.step, picture)
        at.epoch += 1
        at.batch, at.updates, at.totals = 0, 0, {}
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        at.history.append({"epoch": at.epoch, "step": at.step, "values": finite})
        value = finite[name]
        sign = 1 if better == "min" else -1
        is_best = value is not None and (at.best is None or sign * value < sign * at.best["value"])
        if is_best:
            at.best = {"epoch": at.epoch, "step": at.step, "value": value}
        return is_best

    def _speed(self) -> dict[str, float]:
        samples = self._pace[1] * self.machine.world_size
        return {"system/samples_per_second": samples / max(self._trained_s, 1e-9)} if samples else {}


def _channels_last(tensor: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if tensor.ndim not in formats:
        return tensor
    return tensor.contiguous(memory_format=formats[tensor.ndim])


def _convolutions_channels_last(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.weight.data = _channels_last(module.weight.data)
