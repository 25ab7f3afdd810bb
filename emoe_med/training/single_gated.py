"""Train a single-gated mixture of experts: one run folder, whose phases are runs of the one loop.

    base   the network as it would be alone, for its share of the epochs; frozen from then on
    gate   k-means on its features of the training samples; a linear gate learns to tell the clusters apart
    E00..  the experts, copies of the network's last stages, each alone on the samples that the gate sends to it

Each phase has a folder `phases/<name>` of its own. On a resume a finished phase is taken as it is and a stopped one
goes on; once the whole is kept as the checkpoint of the run, the phases' folders go. No expert waits for another.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from emoe_med.config import TrainingConfig
from emoe_med.errors import ConfigError, Fault, Interrupted
from emoe_med.model_config import SingleGatedConfig
from emoe_med.models.single_gated import ClusterGate, SingleGated
from emoe_med.training.checkpoint import CheckpointFolder, load_model_state, load_model_weights
from emoe_med.training.loader import derived_seed, make_loader, read_batches
from emoe_med.training.loop import FitResult, fit
from emoe_med.training.parts import ExpertOnBase, GateOnBase, GateTask, PartTask, PhaseRecord
from emoe_med.training.ranks import Machine, joined
from emoe_med.training.run_folder import write_environment
from emoe_med.training.runtime import StopSignal, prepared
from emoe_med.training.task import MapDataset, Record, Task
from emoe_med.training.trainer import Position

LOG = logging.getLogger("emoe_med")
PHASES = "phases"


class PhasedTask(Task, Protocol):
    """A task of a single-gated mixture, whose network can be taken out of its model and replaced."""

    @property
    def meta(self) -> Mapping[str, Any]:
        """What the checkpoint carries."""
        ...

    def plain(self) -> PhasedTask:
        """Return the same task for the base network alone."""
        ...

    def inside(self, model: Any) -> Any:
        """Return the network in a model that `build_model` built."""
        ...

    def around(self, network: nn.Module) -> nn.Module:
        """Return a model like those of `build_model`, with this network in it."""
        ...


def fit_run(
    task: PhasedTask,
    config: TrainingConfig,
    options: SingleGatedConfig | None,
    run_dir: Path,
    tracker: Record,
    resume: bool = False,
) -> FitResult:
    """Train in one go, or a single-gated mixture in phases; arguments, result and errors are those of `loop.fit`."""
    if options is None:
        return fit(task, config, run_dir, tracker, resume)
    with joined() as machine:
        folder = None
        with machine.together():
            folder = CheckpointFolder(run_dir).find("last") if resume else None
        if folder is None:
            folder = _Phases(task, config, options, run_dir, tracker, machine).train(resume)
        if machine.first:
            shutil.rmtree(run_dir / PHASES, ignore_errors=True)
    weights, state = load_model_state(folder)
    model, position = task.build_model(), Position(**state["position"])
    load_model_weights(model, weights, folder)
    return FitResult(model.eval(), folder, position.step, position.best, position.history)


def noisy(sent: np.ndarray, num_experts: int, share: float, seed: int) -> np.ndarray:
    """Redraw the expert of a share of the samples [n] uniformly: what the experts learn from, as a regularisation."""
    rng = np.random.default_rng(derived_seed(seed, num_experts))
    redrawn, other = rng.random(len(sent)) < share, rng.integers(num_experts, size=len(sent))
    return np.where(redrawn, other, sent)


@dataclass(frozen=True)
class _Phases:
    task: PhasedTask
    config: TrainingConfig
    options: SingleGatedConfig
    run_dir: Path
    tracker: Record
    machine: Machine

    def train(self, resume: bool) -> Path:
        """Train what is not trained yet, put the whole together, and return its checkpoint."""
        task, options, count, machine = self.task, self.options, self.options.num_experts, self.machine
        with machine.together():
            if len(task.train_data) < count:
                reason = f"{count} experts need as many training samples; there are {len(task.train_data)}"
                raise ConfigError(Fault("CFG-EXPERTS", reason, hint="lower single_gated.num_experts"))
            if machine.first:
                facts = {"seed": self.config.seed, "precision": self.config.precision, "world_size": machine.world_size}
                write_environment(self.run_dir, machine.device, {**facts, **task.digests})
        base = self._fit("base", task.plain(), resume, epochs=options.base_epochs(self.config.epochs))
        network = task.inside(base.model).requires_grad_(False)
        digests = {**task.digests, "base": _digest(base)}
        features, held_out = self._features(network, task.train_data), self._features(network, task.val_data)

        def gate_on_base() -> nn.Module:
            return GateOnBase(network, ClusterGate.fit(features.numpy(), count, self.config.seed))

        gate = self._fit("gate", GateTask(task, gate_on_base, digests), epochs=options.gate_epochs, select="last")
        digests = {**digests, "gate": _digest(gate)}

        train, val = (machine.from_first(_sent(gate.model, part)).numpy() for part in (features, held_out))
        train = noisy(train, count, options.noise, self.config.seed)
        where = [tuple(np.flatnonzero(part == k) for part in (train, val)) for k in range(count)]
        experts = [self._expert(k, network, *samples, digests) for k, samples in enumerate(where)]
        steps = base.step + gate.step + sum(steps for _, steps in experts)
        return self._keep(base, gate, [expert for expert, _ in experts], steps)

    def _fit(self, name: str, task: Task, resume: bool = True, **changes: Any) -> FitResult:
        """Run one phase, or take it up; none but the first asks whether there is anything to take up."""
        folder = self.run_dir / PHASES / name
        folder.mkdir(parents=True, exist_ok=True)
        LOG.info("phase %s: %d samples", name, len(task.train_data))
        record = self.tracker if name == "base" else PhaseRecord(self.tracker, name)
        return fit(task, self.config.model_copy(update=changes), folder, record, resume)

    def _expert(
        self, number: int, network: Any, train: np.ndarray, val: np.ndarray, digests: Mapping[str, str]
    ) -> tuple[Any, int]:
        """Train one expert; returns it with its steps. Without two samples a rank it stays the copy that it is."""
        name, config, stages = f"E{number:02d}", self.config, self.options.stages
        self.tracker.metrics(0, {f"expert/{name}/samples": len(train)})
        share = len(train) // self.machine.world_size
        if share < 2:  # batch norm needs them
            LOG.warning("expert %s has %d training samples: it stays as the network", name, len(train))
            return network.tail(stages), 0
        task = PartTask(
            self.task, lambda: self.task.around(ExpertOnBase(network, stages)), digests, train.tolist(), val.tolist()
        )
        batch = min(config.batch_size, share)
        found = self._fit(
            name,
            task,
            epochs=self.options.expert_epochs,
            lr=config.lr * self.options.expert_lr_share,
            batch_size=batch,
            accumulate=min(config.accumulate, share // batch),
        )
        return self.task.inside(found.model).expert, found.step

    def _features(self, network: Any, data: MapDataset) -> Tensor:
        """Return the pooled features [n, F] of samples as they are, on the CPU; to the last bit alike on all ranks."""
        config, machine, parts = self.config, self.machine, []
        flags = {"seed": config.seed, "deterministic": config.deterministic, "threads": config.threads}
        with prepared(**flags), StopSignal() as stop, torch.no_grad():
            for batch in read_batches(make_loader(data, config.batch_size, config.workers)):
                moved = {k: v.to(machine.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                image = self.task.prepare(moved, False, torch.zeros_like(batch["row"]))["image"]
                with torch.autocast(machine.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    features = network.beyond(network.until(image, 0), 0)
                parts.append(features.float().flatten(1).cpu())
                if machine.any(stop.code)[0]:
                    fault = Fault("RUN-STOPPED", "stopped between phases", str(self.run_dir), hint="resume to go on")
                    machine.agree(Interrupted(stop.code, fault) if stop.code else None)
        return machine.from_first(torch.cat(parts))

    def _keep(self, base: FitResult, gate: FitResult, experts: list[Any], steps: int) -> Path:
        """Put the parts together and keep the whole as the run's checkpoint."""
        model = self.task.build_model()
        whole: SingleGated = self.task.inside(model)
        parts: list[Any] = [(whole.base, self.task.inside(base.model)), (whole.gate, gate.model.gate)]
        for mine, trained in [*parts, *zip(whole.experts, experts, strict=True)]:
            mine.load_state_dict(trained.state_dict())
        position = Position(epoch=self.config.epochs, step=steps, best=base.best, history=base.history)
        about = {"digests": dict(self.task.digests), "meta": self.task.meta}
        state = {"step": steps, "position": asdict(position), **about}
        checkpoints = CheckpointFolder(self.run_dir)
        with self.machine.together():
            if self.machine.first:
                written = checkpoints.save(model.state_dict(), {}, state, best=True)
                self.tracker.note("checkpoint", folder=written.name)
        folder = checkpoints.find("last")
        assert folder is not None
        return folder


@torch.no_grad()
def _sent(model: Any, features: Tensor) -> Tensor:
    """Return the expert [n] that the gate sends samples to, from their pooled features [n, F]."""
    return model.gate(features.to(model.gate.weight.device)).argmax(1).cpu()


def _digest(phase: FitResult) -> str:
    return load_model_state(phase.checkpoint)[1]["files"]["model.safetensors"]["sha256"]
