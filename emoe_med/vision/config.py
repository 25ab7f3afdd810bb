"""The schema of a vision run; importing it loads no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, Tag, model_validator

from emoe_med.config import TrackingConfig, TrainingConfig
from emoe_med.model_config import (
    KIND,
    GatingConfig,
    Section,
    SingleGatedConfig,
    TransformerConfig,
    by_kind,
    check_epochs,
)
from emoe_med.models.normalisation import flaw

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


class NetConfig(Section):
    """What every network has."""

    image_size: int = Field(224, ge=1)
    weights: str | None = Field(None, description="file written by import-weights, to start from")
    freeze: tuple[str, ...] = Field((), description="parameter-name prefixes to hold; head and routed layers learn")


class ViTConfig(NetConfig, TransformerConfig):
    """A vision transformer, its routed layers, and where its weights come from."""

    kind: Literal["vit"] = "vit"

    @property
    def edges(self) -> tuple[int, ...]:
        """Edges of the input."""
        return (self.image_size, self.image_size)


class BlockGatingConfig(GatingConfig):
    """Gates in residual blocks."""

    convolutions: Literal["inner", "all"] = Field("all", description="inner: those before the last one of a block")


class ResNetConfig(NetConfig):
    """A residual network, see `models.resnet.ResNetOptions`: plain, a DeepMoE, or under a single gate."""

    kind: Literal["resnet"] = "resnet"
    depth: Literal[18, 50] = 18
    stem: Literal["imagenet", "cifar"] = "imagenet"
    width: float = Field(1.0, gt=0, le=8, description="factor on all channels")
    inner: float = Field(1.0, gt=0, le=8, description="further factor on the channels inside a block")
    gating: BlockGatingConfig | None = None
    single_gated: SingleGatedConfig | None = None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        self.options(3)
        if self.single_gated is not None:
            self.single_gated.check(4, {"gating": self.gating})
        return self

    def options(self, channels: int) -> Any:
        """Return the `ResNetOptions` for images [C, H, W]."""
        from emoe_med.models.resnet import ResNetOptions

        return ResNetOptions(self.depth, channels, self.stem, self.width, self.inner)


AnyNetConfig = Annotated[
    Annotated[ViTConfig, Tag(f"{KIND}vit")] | Annotated[ResNetConfig, Tag(f"{KIND}resnet")],
    by_kind("vit", "resnet"),
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
        if isinstance(self.model, ResNetConfig):
            check_epochs(self.model.gating, self.model.single_gated, self.training.epochs)
        if (self.data.mean is None) != (self.data.std is None):
            raise ValueError("data.mean and data.std go together")
        if self.data.mean is not None and self.data.std is not None and (reason := flaw(self.data.mean, self.data.std)):
            raise ValueError(f"data.mean and data.std: {reason}")
        return self
