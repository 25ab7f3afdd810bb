"""One file is one run: the schema of a run's configuration, and a YAML reader that refuses surprises.

Unknown keys are refused with their exact path; every default that a run used ends up in its `config.yaml`.
Importing this module loads neither torch nor MONAI.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import Field, Tag, ValidationError, model_validator

from emoe_med.errors import ConfigError, Fault
from emoe_med.model_config import (
    KIND,
    GatingConfig,
    RoutedConfig,
    Section,
    SingleGatedConfig,
    TransformerConfig,
    by_kind,
    check_epochs,
)

MAX_CONFIG_BYTES = 1_000_000


class DataConfig(Section):
    """From manifest to tensors."""

    spacing_mm: float = Field(1.0, gt=0, le=16, description="voxel edge of the model's input")
    oversample: int = Field(1, ge=1, le=4, description="volumes are cached this many times finer")
    align: Literal["affine", "centred"] = Field("affine", description="to the MNI template, or centre only")
    mask: Literal["auto", "brain", "head"] = Field(
        "auto", description="auto: the manifest's masks where every row has one, else the whole head"
    )
    folds: int = Field(5, ge=2, description="cross-validation folds over persons")
    val_share: float = Field(0.1, gt=0, lt=0.5, description="share of the non-test persons kept for validation")
    split_seed: int = Field(0, description="who is in which fold; one for all arms and training seeds")


class AugmentConfig(Section):
    """Random changes of a training volume."""

    flip: float = Field(0.5, ge=0, le=1, description="probability of a left-right mirror image")
    shift_voxels: int = Field(0, ge=0, le=8, description="largest shift along each axis, in cached voxels")
    gain: float = Field(0.0, ge=0, le=0.5, description="half-width of a factor on the intensity")


class MoEConfig(RoutedConfig):
    """The routed layer of SFCN."""

    after_block: int = Field(ge=1)


class ModelConfig(Section):
    """SFCN: plain, with one routed layer, with gates on its channels (a DeepMoE), or under a single gate."""

    kind: Literal["sfcn"] = "sfcn"
    channels: tuple[Annotated[int, Field(ge=1)], ...] = (32, 64, 128, 256, 256)
    pooled: int = Field(5, ge=0, description="how many blocks halve the map")
    neck: int = Field(64, ge=1)
    stem: int = Field(1, ge=1, le=4, description="edge of the voxel cube folded into channels; 1 is off")
    dropout: float = Field(0.5, ge=0, lt=1)
    head: Literal["soft_label", "l1"] = "soft_label"
    moe: MoEConfig | None = None
    gating: GatingConfig | None = None
    single_gated: SingleGatedConfig | None = None

    @model_validator(mode="after")
    def _layer_in_net(self) -> ModelConfig:
        if self.moe is not None and self.moe.after_block > len(self.channels):
            raise ValueError(f"moe.after_block {self.moe.after_block}: the net has {len(self.channels)} blocks")
        if self.moe is not None and self.gating is not None:
            raise ValueError("moe and gating: one of them")
        if self.single_gated is not None:
            self.single_gated.check(len(self.channels), {"moe": self.moe, "gating": self.gating})
            if self.single_gated.tau is not None and self.head == "l1":
                raise ValueError("single_gated.tau needs head: soft_label; one number does not tell how sure it is")
        return self


class VolumeViTConfig(TransformerConfig):
    """A vision transformer for volumes."""

    kind: Literal["vit"] = "vit"
    image_size: tuple[int, int, int] = Field(description="voxels of the model's box at data.spacing_mm")
    head: Literal["soft_label", "l1"] = "soft_label"

    @property
    def edges(self) -> tuple[int, ...]:
        """Edges of the input."""
        return self.image_size


AnyModelConfig = Annotated[
    Annotated[ModelConfig, Tag(f"{KIND}sfcn")] | Annotated[VolumeViTConfig, Tag(f"{KIND}vit")],
    by_kind("sfcn", "vit"),
]


class TrainingConfig(Section):
    """The optimisation, shared by all tasks."""

    epochs: int = Field(ge=1)
    batch_size: int = Field(8, ge=1, description="samples per step and rank, before accumulation")
    accumulate: int = Field(1, ge=1, description="batches per optimiser step")
    lr: float = Field(gt=0, description="peak learning rate")
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["cosine", "one_cycle"] = Field(
        "cosine", description="cosine after linear warm-up; or one cycle with counter-moving momentum (1708.07120)"
    )
    warmup_share: float = Field(0.1, ge=0, lt=1)
    final_lr_share: float = Field(0.0, ge=0, le=1)
    clip_norm: float = Field(1.0, gt=0)
    ema_decay: float | None = Field(None, gt=0, lt=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = True
    deterministic: bool = True
    threads: int | None = Field(None, ge=1, description="CPU threads; None leaves torch's choice")
    workers: int = Field(0, ge=0, description="loader processes")
    checkpoint_minutes: float = Field(5.0, ge=0)
    skip_nonfinite: int = Field(0, ge=0, description="non-finite steps to skip before stopping")
    select: Literal["best", "last"] = Field("best", description="epoch by validation, or the last one")
    seed: int = Field(0, ge=0, le=999)


class EvaluationConfig(Section):
    """How predictions are made and scored."""

    flip_average: bool = Field(False, description="average the prediction with that of the mirrored head")
    average_phases: bool = Field(False, description="average over all positions of the model's grid on the cached")
    bootstrap: int = Field(2000, ge=1000, description="draws over persons")
    maps: bool = Field(True, description="make the expert maps after training; `maps --run` makes them at any time")


class TrackingConfig(Section):
    """Where metrics go besides the run folder."""

    mlflow: bool = True
    allow_remote: bool = Field(False, description="permit an https tracking server that is not on loopback")


class BrainAgeConfig(Section):
    """One brain-age run."""

    # names appear in the tracking server: no four digits in a row, which could be a participant number
    name: str = Field(pattern=r"^[A-Za-z]([0-9]{0,3}[A-Za-z_.-])*[0-9]{0,3}$", max_length=60)
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    model: AnyModelConfig = ModelConfig()
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _epochs_suffice(self) -> Self:
        if isinstance(self.model, ModelConfig):
            check_epochs(self.model.gating, self.model.single_gated, self.training.epochs)
        return self

    @model_validator(mode="after")
    def _fills_the_box(self) -> Self:
        from emoe_med.data.grid import box_grid

        if isinstance(self.model, VolumeViTConfig):
            shape, _ = box_grid(self.data.spacing_mm)
            if shape != self.model.image_size:
                raise ValueError(f"model.image_size {self.model.image_size}: at this spacing the box is {shape}")
        return self


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses doubled keys and aliases, and reads 1e-3 as the number it is."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} stands twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 wants a dot and a signed exponent in a float, so that 1e-3 would become text
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse(text: str) -> Any:
    loader = _StrictLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ConfigError: Missing, larger than 1 MB, not YAML, a doubled key, an alias, a tag, or no mapping.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(Fault("CFG-SIZE", "configuration is larger than 1 MB", str(path)))
        values = _parse(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(Fault("CFG-MISSING", error.strerror or "cannot be read", str(path))) from error
    except UnicodeDecodeError as error:
        raise ConfigError(Fault("CFG-YAML", "not UTF-8 text", str(path))) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error)
        row = None if mark is None else mark.line + 1
        raise ConfigError(Fault("CFG-YAML", reason, str(path), row)) from error
    if not isinstance(values, dict):
        raise ConfigError(Fault("CFG-YAML", "the file holds no mapping of keys to values", str(path)))
    return values


def override(values: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Apply `a.b=c` assignments to a nested mapping; c is read as YAML.

    Raises:
        ConfigError: Not of the form key=value.
    """
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(Fault("CFG-SET", f"--set {assignment}: expected key=value, e.g. training.lr=1e-3"))
        *parents, leaf = key.split(".")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ConfigError(Fault("CFG-SET", f"--set {assignment}: {parent} is not a section"))
        try:
            section[leaf] = _parse(text)
        except yaml.YAMLError as error:
            raise ConfigError(Fault("CFG-SET", f"--set {assignment}: the value is not YAML")) from error
    return values


Schema = TypeVar("Schema", bound=Section)


def load_run(path: Path, assignments: list[str] | None = None) -> BrainAgeConfig:
    """Read a brain-age run file and apply `--set` assignments; see `read_run`."""
    return read_run(BrainAgeConfig, path, assignments)


def read_run(schema: type[Schema], path: Path, assignments: list[str] | None = None) -> Schema:
    """Read a run file of any task and apply `--set` assignments.

    Raises:
        ConfigError: All faults of the file at once, each with the path of its key.
    """
    values = override(read_yaml(path), assignments or [])
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        faults = []
        for item in error.errors():
            where = ".".join(part for part in map(str, item["loc"]) if not part.startswith(KIND))
            faults.append(Fault("CFG-KEY", f"{where}: {item['msg']}", str(path)))
        raise ConfigError(*faults) from error


def dump_run(config: Section) -> str:
    """Return the complete configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
