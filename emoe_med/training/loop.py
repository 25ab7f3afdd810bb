"""The training loop, shared by all tasks. Read `fit` from top to bottom; a step is `Trainer.train_step`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from emoe_med.config import TrainingConfig
from emoe_med.training.checkpoint import load_model_state, load_model_weights
from emoe_med.training.progress import EpochProgress
from emoe_med.training.resume import Keeper
from emoe_med.training.runtime import StopSignal, give_back_memory, memory_told, prepared
from emoe_med.training.task import Record, Task
from emoe_med.training.trainer import Stopped, Trainer


@dataclass(frozen=True)
class FitResult:
    """What training gave.

    Attributes:
        model: The model with the selected weights, in evaluation mode, on the run's device.
        checkpoint: Folder that these weights are kept in.
        step: Optimiser steps made.
        best: `epoch`, `step` and `value` of the best validation; None where it never was a number.
        history: `epoch`, `step` and `values` of each epoch; a value that was not finite is None.
    """

    model: nn.Module
    checkpoint: Path
    step: int
    best: dict[str, Any] | None
    history: list[dict[str, Any]]


def fit(task: Task, config: TrainingConfig, run_dir: Path, tracker: Record, resume: bool = False) -> FitResult:
    """Train a task's model and return it with the selected weights.

    Args:
        task: Data, model, loss, validation.
        config: Options.
        run_dir: Run folder, seen by all ranks; checkpoints go to its `checkpoints/`.
        tracker: Entered tracker of this run folder.
        resume: Go on from the last checkpoint, on a CPU bit for bit; start where there is none.

    Raises:
        ConfigError: The folder holds a run and `resume` is off, or the data do not fill one step.
        CheckpointError: Damaged, or of another configuration, manifest or number of ranks.
        DivergedError: Loss or gradient not finite; no update was made.
        OutOfMemoryError: Device or host memory; batch sizes are never changed silently.
        StorageError: A write failed; the last checkpoint is whole.
        Interrupted: SIGINT or SIGTERM; the state was saved.
    """
    with (
        prepared(seed=config.seed, deterministic=config.deterministic, threads=config.threads) as machine,
        StopSignal() as stop,
        EpochProgress(active=machine.first) as progress,
    ):
        with memory_told(machine.device, lambda: "building the model"):
            trainer = Trainer(task, config, machine, tracker)
        with trainer, memory_told(machine.device, trainer.describe_batch):
            keeper = Keeper(trainer, run_dir, config.checkpoint_minutes)
            keeper.begin(resume)
            while trainer.position.epoch < config.epochs:
                for batches in trainer.steps_left():
                    trainer.train_step(batches)
                    progress.step(trainer.position.batch, len(trainer.sampler), trainer.describe())
                    keeper.after_step(stop)
                try:
                    metrics = trainer.validate(stop)
                except Stopped:
                    keeper.stop(stop.code)
                is_best = trainer.end_epoch(metrics)
                progress.line(trainer.describe(metrics))
                keeper.after_epoch(stop, is_best)
                tracker.flush()
                give_back_memory()
        folder = keeper.selected(config.select)
        model, at = trainer.model, trainer.position
        load_model_weights(model, load_model_state(folder)[0], folder)
        return FitResult(model.eval(), folder, at.step, at.best, at.history)
