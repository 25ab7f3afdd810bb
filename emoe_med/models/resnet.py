"""ResNet-18 and -50 for images, narrow or wide, with stages that other networks may cut at.

Parameters have torchvision's names, so that published weights load by name. MONAI's ResNet is not used: its blocks
have no width of their own inside, and its forward pass cannot be cut. Source: He et al. 2016, arXiv 1512.03385.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from emoe_med.models.gates import Place
from emoe_med.models.output import ModelOutput
from emoe_med.moe import MoELayer

# blocks of each stage, and whether they are bottlenecks
DEPTHS = {18: ((2, 2, 2, 2), False), 50: ((3, 4, 6, 3), True)}
WIDTHS = (64, 128, 256, 512)  # of the stages; a bottleneck puts out four times as many channels


@dataclass(frozen=True)
class ResNetOptions:
    """Options of `ResNet`; the defaults are ResNet-18 for ImageNet.

    Attributes:
        depth: 18 or 50.
        in_channels: C.
        stem: `imagenet`: 7 x 7, stride 2, and a max-pool of stride 2; `cifar`: 3 x 3, for images of about 32 pixels.
        width: factor on all channels.
        inner: further factor on the channels inside a block, between its convolutions; 2 at depth 50 is torchvision's
            wide_resnet50_2.
    """

    depth: Literal[18, 50] = 18
    in_channels: int = 3
    stem: Literal["imagenet", "cifar"] = "imagenet"
    width: float = 1.0
    inner: float = 1.0

    def __post_init__(self) -> None:
        if min(self.width, self.width * self.inner) * WIDTHS[0] < 1:
            raise ValueError(f"width {self.width} and inner {self.inner} leave no channel")

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> ResNetOptions:
        """Tell the options from weights by name.

        Raises:
            KeyError: The names are not those of a residual network.
        """
        stem, inner = tensors["conv1.weight"], tensors["layer1.0.conv1.weight"]
        depth = 50 if "layer1.0.conv3.weight" in tensors else 18
        kind = "imagenet" if stem.shape[2] == 7 else "cifar"
        return cls(depth, stem.shape[1], kind, len(stem) / WIDTHS[0], len(inner) / len(stem))


class ResNet(nn.Module):
    """Stem -> four stages of residual blocks -> mean -> linear.

    A stage is named `layer1` to `layer4`; `until` and `beyond` cut the net behind any of them.
    """

    def __init__(self, outputs: int, options: ResNetOptions) -> None:
        super().__init__()
        self.options = options
        blocks, bottleneck = DEPTHS[options.depth]
        widths = [round(options.width * width) for width in WIDTHS]
        small = options.stem == "cifar"
        self.conv1 = _convolution(options.in_channels, widths[0], 3 if small else 7, 1 if small else 2)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)
        before = widths[0]
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True), start=1):
            inner, after = round(width * options.inner), width * (4 if bottleneck else 1)
            layer = nn.Sequential()
            for number in range(count):
                stride = 2 if stage > 1 and number == 0 else 1
                layer.append(ResidualBlock(before, inner, after, stride, bottleneck))
                before = after
            self.add_module(f"layer{stage}", layer)
        self.fc = nn.Linear(before, outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def train(self, mode: bool = True) -> ResNet:
        """As every module; a norm whose scale is held keeps its statistics too, or it would go on learning by them."""
        super().train(mode)
        for module in self.modules():
            # also SyncBatchNorm, which several GPUs put in its place
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.weight.requires_grad:
                module.eval()
        return self

    @property
    def stages(self) -> list[nn.Sequential]:
        """The four stages, in order."""
        return [self.get_submodule(f"layer{stage}") for stage in range(1, 5)]  # ty: ignore[invalid-explicit-return]

    def forward(self, image: Tensor) -> ModelOutput:
        """Map images [B, C, H, W] to logits [B, O]."""
        features = self.beyond(self.until(image, 4), 4)
        return ModelOutput(self.answer(features), features.new_zeros(()), {}, {})

    @property
    def num_features(self) -> int:
        """Pooled features that an answer is read from."""
        return self.fc.in_features

    def until(self, image: Tensor, stages: int) -> Tensor:
        """Return the feature map [B, C', H', W'] behind the first so many stages; 0 is the stem alone."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(image))))
        return _through(self.stages[:stages], x)

    def beyond(self, x: Tensor, stages: int) -> Tensor:
        """Return the pooled features [B, F] of a map behind so many stages: what `fc` sees."""
        return _through(self.stages[stages:], x).mean(dim=(2, 3))

    def answer(self, features: Tensor) -> Tensor:
        """Map pooled features [B, F] to logits [B, O]."""
        return self.fc(features)

    def tail(self, stages: int) -> ResNet:
        """Return a copy of what stands behind so many stages, for `beyond` and `answer` alone."""
        copy = deepcopy(self)
        for name in ("conv1", "bn1", *(f"layer{stage}" for stage in range(1, 1 + stages))):
            copy.set_submodule(name, nn.Sequential())
        return copy

    def probed(self, image: Tensor) -> dict[str, Tensor]:
        """Return what a head could see of images [B, F]: the pooled features."""
        return {"mean": self.beyond(self.until(image, 4), 4)}

    def routed_layers(self) -> dict[str, MoELayer]:
        """Return none: a convolution routes no tokens."""
        return {}

    def places(self) -> dict[str, Place]:
        """Return where the convolutions stand; see `gates.Place`."""
        found = {"conv1": Place(self.conv1, self.bn1, None, inner=False)}
        entry: str | None = "conv1"  # past the first block a shortcut stands beside every gated channel
        for number, stage in enumerate(self.stages, start=1):
            for place, block in enumerate(stage):
                assert isinstance(block, ResidualBlock)
                source, name = entry, f"layer{number}.{place}"
                for part, (convolution, norm) in block.pairs().items():
                    found[f"{name}.{part}"] = Place(convolution, norm, source, part != block.convolutions[-1])
                    source = f"{name}.{part}"
                if block.downsample is not None:
                    found[f"{name}.downsample.0"] = Place(block.downsample[0], None, entry, inner=False)
                entry = None
        return found


class ResidualBlock(nn.Module):
    """x + conv-norm-ReLU-conv-norm, then ReLU; a bottleneck has a 1 x 1 convolution on either side of its 3 x 3.

    The stride is in the first 3 x 3 convolution, as torchvision has it.
    """

    def __init__(self, before: int, inner: int, after: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        self.convolutions = [f"conv{number}" for number in range(1, len(kernels) + 1)]
        widths = [before, *[inner] * (len(kernels) - 1), after]
        for number, ((a, b), kernel) in enumerate(zip(pairwise(widths), kernels, strict=True), start=1):
            here = stride if number == kernels.index(3) + 1 else 1
            self.add_module(f"conv{number}", _convolution(a, b, kernel, here))
            self.add_module(f"bn{number}", nn.BatchNorm2d(b))
        self.downsample: nn.Sequential | None = None
        if stride > 1 or before != after:
            self.downsample = nn.Sequential(_convolution(before, after, 1, stride), nn.BatchNorm2d(after))

    def pairs(self) -> dict[str, tuple[nn.Module, nn.Module]]:
        """Return each convolution with the norm behind it, by name of the convolution."""
        names = {name: name.replace("conv", "bn") for name in self.convolutions}
        return {name: (self.get_submodule(name), self.get_submodule(norm)) for name, norm in names.items()}

    def forward(self, x: Tensor) -> Tensor:
        """Map feature maps [B, C, H, W]."""
        y = x
        for number, (convolution, norm) in enumerate(self.pairs().values()):
            y = norm(convolution(y if number == 0 else F.relu(y)))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


def _convolution(before: int, after: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, kernel, stride=stride, padding=kernel // 2, bias=False)


def _through(stages: list[nn.Sequential], x: Tensor) -> Tensor:
    for stage in stages:
        x = stage(x)
    return x
