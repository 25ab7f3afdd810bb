"""The schema of a vision run; importing it loads no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from emoe_med.config import KIND, RoutedConfig, Section, SingleGatedConfig, TrackingConfig, TrainingConfig

Dataset = Literal["digits", "cifar10", "cifar100", "tiny_imagenet", "imagenet"]
ALWAYS_LEARN = ("head.", "fc.", ".moe.")  # parts of parameter names that no freezing holds


class ImageDataConfig(Section):
    """From files to 8-bit squares."""

    dataset: Dataset = "digits"
    resize: int = Field(ge=1, description="edge that images are read at; the model sees image_size of it")
    mean: tuple[float, ...] | None = Field(None, description="of the pixels in 0 to 1; None: of the weights or the set")
    std: tuple[float, ...] | None = None
    val_share: float = Field(0.1, gt=0, lt=0.5, description="share of each training class kept to select on")
    train_images: int | None = Field(None, ge=1, description="learn from so many of the others; None is all")
    split_seed: int = Field(0, ge=0, description="who is in which part; one for all arms and training seeds")


class ImageAugmentConfig(Section):
    """Random changes of training images; see `data.image_augment`."""

    crop: Literal["none", "pad", "resized"] = "none"
    pad: int = Field(4, ge=0, description="pixels around the image for crop: pad")
    smallest: float = Field(0.08, gt=0, le=1, description="least share of the area for crop: resized")
    flip: float = Field(0.0, ge=0, le=1, description="probability of a mirror image")
    operations: int = Field(0, ge=0, le=8, description="RandAugment operations in a row")
    magnitude: float = Field(9.0, ge=0, le=10, description="of these")
    mixup: float = Field(0.0, ge=0, description="alpha; 0 is off")
    cutmix: float = Field(0.0, ge=0, description="alpha; 0 is off")
    erase: float = Field(0.0, ge=0, le=1, description="probability of an erased box")


class LossConfig(Section):
    """The loss beside the routers' own."""

    label_smoothing: float = Field(0.0, ge=0, lt=1)


class BlockMoEConfig(RoutedConfig):
    """Routed layers in blocks of a transformer."""

    blocks: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        min_length=1, description="from 0; if not given, the six before the last (or as many as there are)"
    )
    placement: Literal["after_block", "parallel_ffn", "replace_ffn"] = "parallel_ffn"
    route_prefix: bool = Field(False, description="send class token and registers through the layer too (V-MoE)")


class NetConfig(Section):
    """What every network has."""

    image_size: int = Field(224, ge=1)
    weights: str | None = Field(None, description="file written by import-weights, to start from")
    freeze: tuple[str, ...] = Field((), description="parameter-name prefixes to hold; head and routed layers learn")


class ViTConfig(NetConfig):
    """A vision transformer, its routed layers, and where its weights come from."""

    kind: Literal["vit"] = "vit"
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
        self.options(3)
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

    def options(self, channels: int) -> Any:
        """Return the `ViTOptions` for images [C, H, W]."""
        from emoe_med.models.vit import ViTOptions

        names = ("patch_size", "width", "depth", "heads", "class_token", "registers", "pool")
        chosen = {name: getattr(self, name) for name in names}
        return ViTOptions(image_size=(self.image_size, self.image_size), in_channels=channels, **chosen)


class ResNetConfig(NetConfig):
    """A residual network; see `models.resnet.ResNetOptions`."""

    kind: Literal["resnet"] = "resnet"
    depth: Literal[18, 50] = 18
    stem: Literal["imagenet", "cifar"] = "imagenet"
    width: float = Field(1.0, gt=0, le=8, description="factor on all channels")
    inner: float = Field(1.0, gt=0, le=8, description="further factor on the channels inside a block")
    single_gated: SingleGatedConfig | None = None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        self.options(3)
        if self.single_gated is not None and self.single_gated.stages > 4:
            raise ValueError(f"single_gated.stages {self.single_gated.stages}: the net has 4")
        return self

    def options(self, channels: int) -> Any:
        """Return the `ResNetOptions` for images [C, H, W]."""
        from emoe_med.models.resnet import ResNetOptions

        return ResNetOptions(self.depth, channels, self.stem, self.width, self.inner)


def _kind(values: Any) -> str:
    kind = values.get("kind", "vit") if isinstance(values, dict) else getattr(values, "kind", "vit")
    return f"{KIND}{kind}"


AnyNetConfig = Annotated[
    Annotated[ViTConfig, Tag(f"{KIND}vit")] | Annotated[ResNetConfig, Tag(f"{KIND}resnet")],
    Discriminator(_kind, custom_error_type="kind", custom_error_message="kind is not one of vit, resnet"),
]


class VisionEvaluationConfig(Section):
    """How predictions are scored."""

    bootstrap: int = Field(2000, ge=1000, description="draws over images")
    routing_images: int = Field(2000, ge=1, description="test images that the routed layers are judged on")


class VisionConfig(Section):
    """One vision run."""

    name: str = Field(pattern=r"^[A-Za-z]([0-9]{0,3}[A-Za-z_.-])*[0-9]{0,3}$", max_length=60)
    data: ImageDataConfig
    augment: ImageAugmentConfig = ImageAugmentConfig()
    loss: LossConfig = LossConfig()
    model: AnyNetConfig
    training: TrainingConfig
    evaluation: VisionEvaluationConfig = VisionEvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _large_enough(self) -> Self:
        if self.data.resize < self.model.image_size:
            raise ValueError(f"data.resize {self.data.resize} is below model.image_size {self.model.image_size}")
        if isinstance(self.model, ResNetConfig) and self.model.single_gated is not None:
            self.model.single_gated.base_epochs(self.training)
        if (self.data.mean is None) != (self.data.std is None):
            raise ValueError("data.mean and data.std go together")
        return self
