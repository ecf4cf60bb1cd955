"""Data sets of small images, whole in memory as uint8 tensors.

===========  =========================================================  ==========================================
name         what                                                       where it comes from
===========  =========================================================  ==========================================
``digits``   1,797 grey digits of 8 x 8 pixels (Alpaydin & Kaynak)      inside scikit-learn; every sixth is test
``mnist``    70,000 grey digits of 28 x 28 (LeCun, Cortes & Burges)     ``ROOT/mnist/``, the four IDX files
``cifar10``  60,000 colour images of 32 x 32 (Krizhevsky 2009)          ``ROOT/cifar10/``, two parquet files
``hf:NAME``  any data set of equally sized images                       Hugging Face, or a folder that it can read
===========  =========================================================  ==========================================

``ROOT`` is given, or the environment variable ``THINWIRE_DATA``. Nothing is downloaded but by Hugging Face's library.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thinwire.errors import MalformedError, MisuseError, first_line
from thinwire.lab.vision.idx import read_idx
from thinwire.lab.vision.parquet import Arrays, decode_table, read_parquet

__all__ = ["Images", "cache_folder", "load_images"]


@dataclass(frozen=True, slots=True)
class Images:
    """A data set: images uint8 ``[N, channels, height, width]``, labels int64 ``[N]`` in ``range(classes)``.

    ``mean`` and ``deviation`` (float32 ``[channels, 1, 1]``, of pixels in [0, 255]) are those of all training images.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    mean: Tensor
    deviation: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    def first(self, train: int | None, test: int | None) -> Images:
        """The first ``train`` and ``test`` samples; None keeps all."""
        return replace(
            self,
            train_images=self.train_images[:train],
            train_labels=self.train_labels[:train],
            test_images=self.test_images[:test],
            test_labels=self.test_labels[:test],
        )

    def to(self, device: torch.device) -> Images:
        """The same, on a device."""
        tensors = {name: getattr(self, name) for name in self.__slots__ if name != "classes"}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


def load_images(name: str, root: str | None = None, cache: str | None = None) -> Images:
    """The data set called ``name``; ``root`` holds ``mnist/`` and ``cifar10/``, ``cache`` what was decoded from them.

    Raises:
        MisuseError: it is not there, or what reads it is not installed; the message says what to do.
        MalformedError: its files are damaged.

    >>> images = load_images("digits")
    >>> images.shape, images.classes, len(images.train_labels), len(images.test_labels)
    ((1, 8, 8), 10, 1497, 300)
    """
    if name == "digits":
        return _images(*_digits())
    if name == "mnist":
        folder = _folder(name, root, "the four files *-ubyte.gz of the data set")
        parts = [_idx_pair(folder, part) for part in ("train", "t10k")]
        return _images(parts[0], parts[1])
    if name == "cifar10":
        folder = _folder(name, root, "cifar10-train.parquet and cifar10-test.parquet, columns image and label")
        files = [_there(folder / f"cifar10-{part}.parquet") for part in ("train", "test")]
        train, test = (read_parquet(file, cache_folder(cache)) for file in files)
        return _images(train, test)
    if name.startswith("hf:"):
        return _images(*_hugging_face(name.removeprefix("hf:")))
    raise MisuseError(f"there is no data set {name!r}; give digits, mnist, cifar10 or hf:NAME", data=name)


def cache_folder(given: str | None) -> Path:
    """``given``, else what ``THINWIRE_CACHE`` says, else ``~/.cache/thinwire``; images are in ``images`` there."""
    root = given or os.environ.get("THINWIRE_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "thinwire") / "images"


def _images(train: Arrays, test: Arrays) -> Images:
    (train_images, train_labels), (test_images, test_labels) = train, test
    if train_images.shape[1:] != test_images.shape[1:]:
        raise MalformedError(f"train images are {train_images.shape[1:]}, test images {test_images.shape[1:]}")
    sums, squares = _moments(train_images)
    mean = sums
    deviation = np.sqrt(np.maximum(squares - mean**2, 1.0))
    return Images(
        torch.from_numpy(train_images.copy()),
        torch.from_numpy(train_labels.copy()),
        torch.from_numpy(test_images.copy()),
        torch.from_numpy(test_labels.copy()),
        1 + int(max(train_labels.max(), test_labels.max())),
        torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1),
        torch.tensor(deviation, dtype=torch.float32).view(-1, 1, 1),
    )


def _moments(images: np.ndarray[Any, np.dtype[np.uint8]]) -> tuple[Any, Any]:
    """Mean and mean square of each channel, exactly: from the histogram of its bytes."""
    levels = np.arange(256, dtype=np.float64)
    counts = np.stack([np.bincount(images[:, c].ravel(), minlength=256) for c in range(images.shape[1])])
    pixels = counts.sum(axis=1)
    return counts @ levels / pixels, counts @ levels**2 / pixels


def _digits() -> tuple[Arrays, Arrays]:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise MisuseError("the digits come with scikit-learn: pip install 'thinwire[train]'") from None
    found = load_digits()
    images = np.round(found.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = found.target.astype(np.int64)
    test = np.arange(len(labels)) % 6 == 0
    return (images[~test], labels[~test]), (images[test], labels[test])


def _folder(name: str, root: str | None, what: str) -> Path:
    base = root or os.environ.get("THINWIRE_DATA")
    if base and (Path(base) / name).is_dir():
        return Path(base) / name
    where = f"there is no folder {Path(base) / name}" if base else "THINWIRE_DATA is not set"
    raise MisuseError(
        f"{name} is not here: {where}. Put {what} into a folder {name}/ and give the folder that holds it by "
        f"THINWIRE_DATA or --data-root; or use --data hf:{name} where Hugging Face can be reached, or --data digits",
        data=name,
    )


def _there(path: Path) -> Path:
    if not path.is_file():
        raise MisuseError(f"{path} is missing; see docs/training.md for the files that are needed", path=str(path))
    return path


def _idx_pair(folder: Path, part: str) -> Arrays:
    images = read_idx(_there(folder / f"{part}-images-idx3-ubyte.gz"))
    labels = read_idx(_there(folder / f"{part}-labels-idx1-ubyte.gz"))
    if images.ndim != 3 or labels.shape != images.shape[:1] or not labels.size:
        raise MalformedError(f"{folder}: {part} images are {images.shape}, labels {labels.shape}", folder=str(folder))
    return images[:, None], labels.astype(np.int64)


def _hugging_face(name: str) -> tuple[Arrays, Arrays]:
    try:
        import datasets
    except ModuleNotFoundError:
        raise MisuseError(f"hf:{name} needs Hugging Face's datasets: pip install 'thinwire[train]'") from None
    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # the library raises whatever its file systems do
        raise MisuseError(f"Hugging Face has no {name} here: {first_line(error)}", data=name) from error
    parts = []
    for split in ("train", "test"):
        if split not in found:
            raise MisuseError(f"hf:{name} has splits {', '.join(found)}; train and test are needed", data=name)
        rows = found[split]
        for column, feature in rows.features.items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(column, datasets.Image(decode=False))
        parts.append(decode_table(rows.with_format("arrow")[:], f"hf:{name}, {split}"))
    return parts[0], parts[1]
