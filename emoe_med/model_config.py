"""The parts of a configuration that describe networks, for all tasks.

Importing this module loads neither torch nor MONAI; options are checked against their own dataclasses when a file is
read.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, TypeAdapter, field_validator, model_validator

if TYPE_CHECKING:
    from emoe_med.models.vit import ViT
    from emoe_med.moe import MoELayer

KIND = "kind="  # begins the tag of a union's member, which stands in no file and in no path of a key


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def by_kind(default: str, *others: str) -> Discriminator:
    """Choose the member of a union, tagged `KIND + kind`, by the section's `kind`."""

    def tag(values: Any) -> str:
        found = values.get("kind", default) if isinstance(values, dict) else getattr(values, "kind", default)
        return f"{KIND}{found}"

    message = f"kind is not one of {', '.join((default, *others))}"
    return Discriminator(tag, custom_error_type="kind", custom_error_message=message)


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


class BlockMoEConfig(RoutedConfig):
    """Routed layers in blocks of a transformer."""

    blocks: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        min_length=1, description="from 0; if not given, the six before the last (or as many as there are)"
    )
    placement: Literal["after_block", "parallel_ffn", "replace_ffn"] = "parallel_ffn"
    route_prefix: bool = Field(False, description="send class token and registers through the layer too (V-MoE)")


class TransformerConfig(Section):
    """A vision transformer and its routed layers; each task adds what its input is like."""

    size: Literal["Ti", "S", "B", "L", "H"] | None = Field(None, description="or give width, depth and heads")
    width: int = Field(ge=1)
    depth: int = Field(ge=1)
    heads: int = Field(ge=1)
    patch_size: int = Field(16, ge=1)
    class_token: bool = True
    registers: int = Field(0, ge=0)
    pool: Literal["token", "mean"] = "token"
    moe: BlockMoEConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Write out what a size and missing blocks stand for, so that a run's file tells."""
        from emoe_med.models.vit import SIZES

        if not isinstance(values, dict):
            return values
        filled = dict(values)
        if filled.get("size") in SIZES:
            for name, value in zip(("width", "depth", "heads"), SIZES[filled["size"]], strict=True):
                if filled.setdefault(name, value) != value:
                    raise ValueError(f"{name} {filled[name]} is not that of size {filled['size']}, {value}")
        moe, depth = filled.get("moe"), filled.get("depth")
        if isinstance(moe, dict) and moe.get("blocks") is None and isinstance(depth, int):
            filled["moe"] = {**moe, "blocks": range(max(0, depth - 7), max(1, depth - 1))}
        return filled

    @model_validator(mode="after")
    def _possible(self) -> Self:
        self.options(1)
        moe = self.moe
        if moe is None:
            return self
        if len(set(moe.blocks)) < len(moe.blocks) or max(moe.blocks) >= self.depth:
            raise ValueError(f"moe.blocks {list(moe.blocks)}: each from 0 to {self.depth - 1}, once")
        bypassed = (self.class_token or self.registers) and not moe.route_prefix
        if self.pool == "token" and bypassed and self.depth - 1 in moe.blocks:
            raise ValueError(
                f"moe.blocks {self.depth - 1}: behind the last attention nothing reaches the class token, so that this "
                "layer would never learn; leave it out, or set route_prefix: true or pool: mean"
            )
        if moe.placement == "replace_ffn" and bypassed:
            raise ValueError("moe.placement replace_ffn needs route_prefix: true, else the class token loses its FFN")
        return self

    @property
    def edges(self) -> tuple[int, ...]:
        """Edges of the input."""
        raise NotImplementedError

    def options(self, channels: int) -> Any:
        """Return the `ViTOptions` for inputs of so many channels."""
        from emoe_med.models.vit import ViTOptions

        names = ("patch_size", "width", "depth", "heads", "class_token", "registers", "pool")
        chosen = {name: getattr(self, name) for name in names}
        return ViTOptions(image_size=self.edges, in_channels=channels, **chosen)

    def build(self, outputs: int, channels: int) -> ViT:
        """Build the network; the dense part first, so that arms of one seed start from the same weights."""
        from emoe_med.models.vit import ViT

        net = ViT(outputs, self.options(channels))
        if self.moe is not None:
            layers = {block: self.moe.build(self.width) for block in self.moe.blocks}
            net.insert(layers, self.moe.placement, self.moe.route_prefix)
        return net


class GatingConfig(Section):
    """Gates on the channels of convolutions, told by a shallow network (DeepMoE)."""

    embedding: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (64, 128, 256, 512), min_length=1, description="channels of the shallow network's convolutions of stride 2"
    )
    sparsity: float = Field(1e-3, ge=0, description="weight of the gates' L1 norm, a mean over samples")
    embedding_loss: float = Field(1.0, ge=0, description="weight of the loss of the shallow network's own answer")
    held_share: float = Field(
        0.2, ge=0, lt=1, description="last part of the epochs, in which gating stands still and both weights are 0"
    )

    def options(self) -> Any:
        """Return the `DeepMoEOptions`."""
        from emoe_med.models.deep_moe import DeepMoEOptions

        known = DeepMoEOptions.__dataclass_fields__
        return DeepMoEOptions(**{name: value for name, value in self if name in known})

    def holds(self, epoch: int, epochs: int) -> bool:
        """Whether gating stands still in an epoch, counted from 0."""
        return epoch >= round(epochs * (1 - self.held_share))

    def check(self, epochs: int) -> None:
        """See that both stages have an epoch.

        Raises:
            ValueError: One has none.
        """
        if self.held_share and (self.holds(0, epochs) or not self.holds(epochs - 1, epochs)):
            reason = f"training.epochs {epochs}: one of DeepMoE's two stages has none"
            raise ValueError(f"{reason}; held_share 0 leaves the second out")


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

    def base_epochs(self, epochs: int) -> int:
        """Return which of the run's epochs are left for the network itself.

        Raises:
            ValueError: None is left.
        """
        left = epochs - self.gate_epochs - self.expert_epochs
        if left < 1:
            raise ValueError(f"training.epochs {epochs}: gate and experts leave none for the network itself")
        return left

    def check(self, stages: int, others: dict[str, Any]) -> None:
        """See that a network of so many stages can be cut so, and that nothing else is to be put into it.

        Raises:
            ValueError: It cannot, or something is.
        """
        if self.stages > stages:
            raise ValueError(f"single_gated.stages {self.stages}: the net has {stages}")
        given = [name for name, other in others.items() if other is not None]
        if given:
            raise ValueError(f"single_gated and {given[0]}: one of them")


def check_epochs(gating: GatingConfig | None, single_gated: SingleGatedConfig | None, epochs: int) -> None:
    """See that every stage or phase of a run has an epoch.

    Raises:
        ValueError: One has none.
    """
    if gating is not None:
        gating.check(epochs)
    if single_gated is not None:
        single_gated.base_epochs(epochs)
