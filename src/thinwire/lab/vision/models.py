"""SimpleCNN and ResNets.

The ResNets are those of He et al. 2016 (arXiv:1512.03385) with the stride in the 3 x 3 convolution of a bottleneck
(version 1.5), named and initialised as torchvision's, so that weights can be exchanged. ``stem="cifar"`` is their usual
form for 32 x 32 images: one 3 x 3 convolution without stride or pooling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from thinwire.errors import MisuseError
from thinwire.lab.vision.config import VisionConfig

__all__ = ["ResNet", "SimpleCNN", "make_model", "resnet18", "resnet50"]


@final
class SimpleCNN(nn.Module):
    """Two convolutions with pooling, and two linear layers; 421,642 weights for MNIST at a width of 32.

    >>> model = SimpleCNN((1, 28, 28), classes=10)
    >>> sum(weight.numel() for weight in model.parameters()), tuple(model(torch.zeros(2, 1, 28, 28)).shape)
    (421642, (2, 10))
    """

    def __init__(self, shape: tuple[int, int, int], classes: int, *, width: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        channels, height, side = shape
        if min(height, side) < 4:
            raise MisuseError(f"images of {height} x {side} pixels are too small; simple-cnn needs 4 x 4")
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Linear(2 * width * (height // 4) * (side // 4), 4 * width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(4 * width, classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, channels, height, width]``."""
        logits: Tensor = self.classifier(self.features(images).flatten(1))
        return logits


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)


@final
class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and the way around them."""

    expansion: ClassVar[int] = 1

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _convolution(inputs, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = _convolution(planes, planes, 3), nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` to ``[B, planes, H / stride, W / stride]``."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return torch.relu_(out + self.downsample(x))


@final
class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions, and the way around them; four times as many channels go out."""

    expansion: ClassVar[int] = 4

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        outputs = self.expansion * planes
        self.conv1, self.bn1 = _convolution(inputs, planes, 1), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = _convolution(planes, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = _convolution(planes, outputs, 1), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` to ``[B, 4 * planes, H / stride, W / stride]``."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return torch.relu_(out + self.downsample(x))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(_convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


@final
class ResNet(nn.Module):
    """``blocks`` residual blocks in each of four stages. With ``zero_init_residual`` each block starts as its shortcut
    (Goyal et al. 2017, arXiv:1706.02677, section 5.1)."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: tuple[int, int, int, int],
        *,
        classes: int,
        channels: int = 3,
        stem: str = "imagenet",
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = _convolution(channels, 64, 3) if stem == "cifar" else _convolution(channels, 64, 7, stride=2)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, stride=2, padding=1)
        inputs = 64
        for stage, (planes, count) in enumerate(zip((64, 128, 256, 512), blocks, strict=True)):
            strides = [1 if stage == 0 else 2] + [1] * (count - 1)
            layer = nn.Sequential()
            for stride in strides:
                layer.append(block(inputs, planes, stride))
                inputs = block.expansion * planes
            self.add_module(f"layer{stage + 1}", layer)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes)
        self._initialise(zero_init_residual)

    def _initialise(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)
            elif zero_init_residual and isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, channels, height, width]``."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def resnet18(
    *, classes: int = 1000, channels: int = 3, stem: str = "imagenet", zero_init_residual: bool = False
) -> ResNet:
    """ResNet-18; 11,689,512 weights with 1000 classes and the ImageNet stem.

    >>> sum(weight.numel() for weight in resnet18().parameters())
    11689512
    """
    return ResNet(
        BasicBlock, (2, 2, 2, 2), classes=classes, channels=channels, stem=stem, zero_init_residual=zero_init_residual
    )


def resnet50(
    *, classes: int = 1000, channels: int = 3, stem: str = "imagenet", zero_init_residual: bool = False
) -> ResNet:
    """ResNet-50; 25,557,032 weights with 1000 classes and the ImageNet stem.

    >>> sum(weight.numel() for weight in resnet50().parameters())
    25557032
    """
    return ResNet(
        Bottleneck, (3, 4, 6, 3), classes=classes, channels=channels, stem=stem, zero_init_residual=zero_init_residual
    )


def make_model(config: VisionConfig, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The model that ``config`` names, for images of ``shape`` (channels, height, width), its weights drawn from
    torch's global random state."""
    if config.model == "simple-cnn":
        return SimpleCNN(shape, classes, width=config.width, dropout=config.dropout)
    makers: dict[str, Callable[..., ResNet]] = {"resnet18": resnet18, "resnet50": resnet50}
    return makers[config.model](
        classes=classes,
        channels=shape[0],
        stem=config.stem_of(shape[1]),
        zero_init_residual=config.zero_init_residual,
    )
