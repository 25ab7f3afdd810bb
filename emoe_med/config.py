"""One file is one run: the schema of a run's configuration, and a YAML reader that refuses surprises.

Unknown keys are refused with their exact path; every default that a run used ends up in its `config.yaml`.
Importing this module loads neither torch nor MONAI; router and expert options are checked against their own
dataclasses when a file is read.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from emoe_med.errors import ConfigError, Fault

if TYPE_CHECKING:
    from emoe_med.moe import MoELayer

MAX_CONFIG_BYTES = 1_000_000
KIND = "kind="  # begins the tag of a union's member, which stands in no file and in no path of a key


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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


class RoutedConfig(Section):
    """A routed layer: which router, which experts. Each network adds where it stands."""

    num_experts: int = Field(8, ge=1)
    top_k: int = Field(1, ge=1)
    router: dict[str, Any] = Field({"kind": "eigen"}, validate_default=True, description="kind and options")
    experts: dict[str, Any] = Field({"kind": "mlp"}, validate_default=True, description="kind and options")
    normalise: bool = Field(True, description="layer norm before router and experts; the published code has none")

    @field_validator("router", "experts")
    @classmethod
    def _known_options(cls, value: dict[str, Any], info: Any) -> dict[str, Any]:
        from emoe_med.moe import EXPERTS, ROUTERS

        table = ROUTERS if info.field_name == "router" else EXPERTS
        kind = value.get("kind")
        if kind not in table:
            raise ValueError(f"kind {kind!r} is not one of {', '.join(table)}")
        _, options = table[kind]
        given = {key: item for key, item in value.items() if key != "kind"}
        unknown = given.keys() - options.__dataclass_fields__.keys()
        if unknown:
            raise ValueError(f"{kind} has no option {', '.join(sorted(unknown))}")
        return {"kind": kind, **asdict(TypeAdapter(options).validate_python(given))}

    @model_validator(mode="after")
    def _enough_experts(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} is larger than num_experts {self.num_experts}")
        return self

    @model_validator(mode="after")
    def _experts_with_a_basis(self) -> Self:
        from emoe_med.moe import EXPERTS, ROUTERS

        if ROUTERS[self.router["kind"]][0].needs_basis and not EXPERTS[self.experts["kind"]][0].has_basis:
            with_basis = ", ".join(kind for kind, (experts, _) in EXPERTS.items() if experts.has_basis)
            raise ValueError(f"router {self.router['kind']} needs experts with a basis: kind {with_basis}")
        return self

    def build(self, width: int) -> MoELayer:
        """Build the layer for tokens of a given width; random weights come from torch's global generator."""
        from emoe_med.moe import EXPERTS, ROUTERS, MoELayer

        router, router_options = ROUTERS[self.router["kind"]]
        experts, expert_options = EXPERTS[self.experts["kind"]]
        chosen, given = ({k: v for k, v in part.items() if k != "kind"} for part in (self.router, self.experts))
        return MoELayer(
            router(width, self.num_experts, self.top_k, router_options(**chosen)),
            experts(width, self.num_experts, expert_options(**given)),
            normalise=self.normalise,
        )


class MoEConfig(RoutedConfig):
    """The routed layer of SFCN."""

    after_block: int = Field(ge=1)


class SingleGatedConfig(Section):
    """A gate on a frozen network and experts for its clusters; `training.epochs` are shared with the network itself."""

    num_experts: int = Field(4, ge=1)
    stages: int = Field(ge=0, description="blocks or stages that all experts share; each has its own copy of the rest")
    gate_epochs: int = Field(1, ge=1, description="of training.epochs")
    expert_epochs: int = Field(ge=1, description="of training.epochs; over all experts one epoch sees each sample once")
    expert_lr_share: float = Field(0.3, gt=0, le=1, description="of training.lr: experts start as trained copies")
    noise: float = Field(0.1, ge=0, le=1, description="share of the samples that train an expert drawn at random")
    tau: float | None = Field(
        None, ge=0, le=1, description="confidence at which the network answers alone; None: never, one expert each"
    )

    def base_epochs(self, training: TrainingConfig) -> int:
        """Return the epochs that are left for the network itself.

        Raises:
            ValueError: None is left.
        """
        left = training.epochs - self.gate_epochs - self.expert_epochs
        if left < 1:
            raise ValueError(f"training.epochs {training.epochs}: gate and experts leave none for the network itself")
        return left


class ModelConfig(Section):
    """SFCN, plain, with one routed layer, or as the base of a single-gated mixture."""

    channels: tuple[Annotated[int, Field(ge=1)], ...] = (32, 64, 128, 256, 256)
    pooled: int = Field(5, ge=0, description="how many blocks halve the map")
    neck: int = Field(64, ge=1)
    stem: int = Field(1, ge=1, le=4, description="edge of the voxel cube folded into channels; 1 is off")
    dropout: float = Field(0.5, ge=0, lt=1)
    head: Literal["soft_label", "l1"] = "soft_label"
    moe: MoEConfig | None = None
    single_gated: SingleGatedConfig | None = None

    @model_validator(mode="after")
    def _layer_in_net(self) -> ModelConfig:
        if self.moe is not None and self.moe.after_block > len(self.channels):
            raise ValueError(f"moe.after_block {self.moe.after_block}: the net has {len(self.channels)} blocks")
        gated = self.single_gated
        if gated is not None and self.moe is not None:
            raise ValueError("single_gated and moe: one of them")
        if gated is not None and gated.stages > len(self.channels):
            raise ValueError(f"single_gated.stages {gated.stages}: the net has {len(self.channels)} blocks")
        if gated is not None and gated.tau is not None and self.head == "l1":
            raise ValueError("single_gated.tau needs head: soft_label; one number does not tell how sure it is")
        return self


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
    model: ModelConfig = ModelConfig()
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _epochs_suffice(self) -> Self:
        if self.model.single_gated is not None:
            self.model.single_gated.base_epochs(self.training)
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
