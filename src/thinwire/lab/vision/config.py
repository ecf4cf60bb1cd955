"""The options of ``thinwire train vision``. Importing this imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from thinwire.errors import MisuseError
from thinwire.lab.config import option
from thinwire.lab.trainer.options import TrainingOptions

__all__ = ["VisionConfig"]

_TASK = "Data and model"


@dataclass(frozen=True, kw_only=True)
class VisionConfig(TrainingOptions):
    """Which images, shared out how, and which model; all else is in :class:`TrainingOptions`.

    >>> VisionConfig(data="cifar10", model="resnet18").stem_of(32)
    'cifar'

    Raises:
        MisuseError: an option has a value that it cannot have, or two contradict each other.
    """

    sections: ClassVar[tuple[str, ...]] = (_TASK,)  # come first in help and YAML

    data: str = option("digits", "digits (comes with scikit-learn), mnist, cifar10, or hf:NAME of a Hugging Face data "
                       "set or a folder that it can read.", _TASK)  # fmt: skip
    data_root: str | None = option(None, "Folder that holds mnist/ and cifar10/; default: $THINWIRE_DATA.", _TASK)
    cache: str | None = option(None, "Folder for decoded images; default: $THINWIRE_CACHE, else ~/.cache/thinwire.",
                               _TASK)  # fmt: skip
    train_limit: int | None = option(None, "Train on the first so many samples only.", _TASK, least=1)
    test_limit: int | None = option(None, "Test on the first so many samples only.", _TASK, least=1)
    skew: float = option(0.0, "Share of a worker's samples that are of its own classes; 0: all are drawn alike.", _TASK,
                         least=0, most=1)  # fmt: skip
    augment: str = option("auto", "Random crops and flips; auto: both for cifar10 and hf, else none.", _TASK,
                          choices=("auto", "none", "crop", "crop-flip"))  # fmt: skip
    model: str = option("simple-cnn", "Model.", _TASK, choices=("simple-cnn", "resnet18", "resnet50"))
    width: int = option(32, "Channels of simple-cnn's first convolution.", _TASK, least=1)
    dropout: float = option(0.0, "Dropout before simple-cnn's last layer.", _TASK, least=0, below=1)
    stem: str = option("auto", "First layers of a ResNet; auto: cifar below 64 pixels, else imagenet.", _TASK,
                       choices=("auto", "cifar", "imagenet"))  # fmt: skip
    zero_init_residual: bool = option(False, "Start each residual branch of a ResNet at zero.", _TASK)
    channels_last: bool = option(False, "Lay out filters as tensor cores like them.", _TASK)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data not in ("digits", "mnist", "cifar10") and not self.data.startswith("hf:"):
            raise MisuseError(f"data is {self.data!r}; give digits, mnist, cifar10 or hf:NAME", option="data")

    def stem_of(self, pixels: int) -> str:
        """The stem for images of ``pixels`` rows."""
        return self.stem if self.stem != "auto" else "cifar" if pixels < 64 else "imagenet"

    @property
    def augmentation(self) -> str:
        """none, crop or crop-flip."""
        if self.augment != "auto":
            return self.augment
        return "crop-flip" if self.data == "cifar10" or self.data.startswith("hf:") else "none"
