"""How a run is kept and taken up again: when a checkpoint is due, what it holds, and how it is put back."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from emoe_med.errors import EXIT_SIGINT, EXIT_SIGTERM, CheckpointError, ConfigError, Fault, Interrupted
from emoe_med.models.state import check_tensors
from emoe_med.storage import storage_error
from emoe_med.training import optim, runtime
from emoe_med.training.checkpoint import Checkpoint, CheckpointFolder, Which
from emoe_med.training.run_folder import write_environment
from emoe_med.training.trainer import Position, Trainer

LOG = logging.getLogger("emoe_med")
ONLINE = "online"  # slot of the trained weights in optim.safetensors, where the model file has their average
GRACE_S = 120  # what a cluster leaves after its signal (`sbatch --signal=B:TERM@120`)


class Keeper:
    """Begin or resume a run, and save it when a checkpoint is due, a validation is best, or a signal came."""

    def __init__(self, trainer: Trainer, run_dir: Path, minutes: float) -> None:
        self.trainer, self.machine, self.tracker = trainer, trainer.machine, trainer.tracker
        self.run_dir = run_dir
        self.checkpoints = CheckpointFolder(run_dir)
        self._period_s = minutes * 60
        self._saved_at = self._stepped_at = time.monotonic()
        self._longest_step_s = 0.0
        self._too_slow = False

    def begin(self, resume: bool) -> None:
        """Take up the last checkpoint, or see that the folder holds no run yet.

        Raises:
            ConfigError: The folder holds a run, and it is not to be resumed.
            CheckpointError: Damaged, or of another configuration, manifest or number of ranks.
        """
        checkpoint = None
        with self.machine.together():
            checkpoint = self.checkpoints.load("last") if resume else None
        taken = self.tracker.begun or self.checkpoints.find("last") is not None
        if not resume and self.machine.any(taken)[0]:
            hint = "resume it, or choose another folder"
            error = ConfigError(Fault("RUN-EXISTS", "this folder holds a run", file=str(self.run_dir), hint=hint))
            self.machine.agree(error)
        with self.machine.together():
            if checkpoint is not None:
                self._restore(checkpoint)
            if self.machine.first:
                self._set_right(checkpoint)
        self.tracker.note("start", step=self.trainer.position.step)

    def _set_right(self, checkpoint: Checkpoint | None) -> None:
        """Leave the folder with the checkpoints that count and the facts of the run."""
        best = self.trainer.position.best
        last = None if checkpoint is None else checkpoint.folder
        try:
            self.checkpoints.tidy(last, None if best is None else best["step"])
        except OSError as error:
            raise storage_error(error, self.checkpoints.path, "checkpoints could not be tidied") from error
        facts = {"seed": self.trainer.config.seed, "precision": self.trainer.config.precision}
        write_environment(self.run_dir, self.machine.device, {**facts, **self._digests()})

    def after_step(self, stop: runtime.StopSignal) -> None:
        """Save if it is time; save and end if a signal came to any rank.

        Raises:
            Interrupted: With the exit code of the signal.
        """
        self._longest_step_s = max(self._longest_step_s, time.monotonic() - self._stepped_at)
        self._save_if(stop)

    def after_epoch(self, stop: runtime.StopSignal, is_best: bool) -> None:
        """Save a best validation, the end of the run, and what is due; end if a signal came meanwhile.

        Raises:
            Interrupted: With the exit code of the signal.
        """
        last = self.trainer.position.epoch == self.trainer.config.epochs
        self._save_if(stop, wanted=is_best or last, is_best=is_best)

    def _save_if(self, stop: runtime.StopSignal, wanted: bool = False, is_best: bool = False) -> None:
        due = self.machine.first and time.monotonic() - self._saved_at >= self._period_s
        interrupted, terminated, save = self.machine.any(
            stop.code == EXIT_SIGINT, stop.code == EXIT_SIGTERM, wanted or due
        )
        if save or interrupted or terminated:
            self._save(is_best)
        if interrupted or terminated:
            self._end(EXIT_SIGTERM if terminated else EXIT_SIGINT)
        self._stepped_at = time.monotonic()

    def stop(self, code: int) -> NoReturn:
        """Save and end.

        Raises:
            Interrupted: Always.
        """
        self._save()
        self._end(code)

    def _end(self, code: int) -> NoReturn:
        self.machine.wait()  # for the rank that writes
        signal = "SIGTERM" if code == EXIT_SIGTERM else "SIGINT"
        reason = f"stopped by {signal} after step {self.trainer.position.step}; the state was saved"
        error = Interrupted(code, Fault("RUN-STOPPED", reason, file=str(self.run_dir), hint="resume to go on"))
        self.machine.agree(error)
        raise error

    def selected(self, which: Which) -> Path:
        """Return the checkpoint folder to use."""
        self.machine.wait()
        folder = self.checkpoints.find(which)
        if folder is None:
            raise CheckpointError(Fault("CKPT-MISSING", "no checkpoint", file=str(self.checkpoints.path)))
        return folder

    def _digests(self) -> dict[str, Any]:
        return {**self.trainer.task.digests, "world_size": self.machine.world_size}

    def _save(self, is_best: bool = False) -> None:
        start, trainer = time.monotonic(), self.trainer
        state = {
            "step": trainer.position.step,
            "position": asdict(trainer.position),
            "random": self.machine.gather(runtime.random_state(self.machine.device)),
            "averaged": 0 if trainer.average is None else int(trainer.average.n_averaged),
            "digests": self._digests(),
            "meta": getattr(trainer.task, "meta", {}),
        }
        with self.machine.together():
            if self.machine.first:
                self._write(state, is_best)
        self._saved_at = time.monotonic()
        if self._longest_step_s + self._saved_at - start > GRACE_S and not self._too_slow:
            self._too_slow = True
            LOG.warning("a step and a save take more than %d s, which a cluster may not wait", GRACE_S)

    def _write(self, state: dict[str, Any], is_best: bool) -> None:
        trainer = self.trainer
        tensors = optim.optimizer_tensors(trainer.optimizer, trainer.model)
        if trainer.average is not None:
            tensors |= {f"{name}/{ONLINE}": value for name, value in trainer.model.state_dict().items()}
        self.tracker.sync_to_disk()  # no checkpoint may know more than the journal
        folder = self.checkpoints.save(trainer.served.state_dict(), tensors, state, is_best)
        self.tracker.note("checkpoint", folder=folder.name)

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Put a checkpoint back; everything is compared before anything is changed."""
        trainer, state, folder = self.trainer, checkpoint.state, checkpoint.folder
        _check_digests(state["digests"], self._digests(), folder)
        shapes = {name: value.shape for name, value in trainer.model.state_dict().items()}
        slots = {name: value for name, value in checkpoint.optim.items() if not name.endswith(f"/{ONLINE}")}
        expected = optim.expected_shapes(trainer.model, slots)
        if trainer.average is not None:
            expected |= {f"{name}/{ONLINE}": shape for name, shape in shapes.items()}
        check_tensors(checkpoint.model, shapes, folder)
        check_tensors(checkpoint.optim, expected, folder)
        trainer.served.load_state_dict(checkpoint.model)
        if trainer.average is not None:
            trainer.model.load_state_dict({name: checkpoint.optim[f"{name}/{ONLINE}"] for name in shapes})
            trainer.average.n_averaged.fill_(state["averaged"])
        optim.load_optimizer_tensors(trainer.optimizer, trainer.model, slots)
        trainer.position = Position(**state["position"])
        runtime.set_random_state(state["random"][self.machine.rank], self.machine.device)


def _check_digests(saved: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Refuse to resume under another configuration, manifest or number of ranks.

    What the version that wrote the checkpoint did not record is not compared.

    Raises:
        CheckpointError: One fault per digest that differs.
    """
    faults = [
        Fault(
            "CKPT-OTHER",
            f"{name} was {saved[name]} when this checkpoint was written and is {now.get(name)} now",
            str(folder),
            hint="resume with what the run was started with, or start a new run",
        )
        for name in sorted(saved)
        if saved[name] != now.get(name)
    ]
    if faults:
        raise CheckpointError(*faults)
