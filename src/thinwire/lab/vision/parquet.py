"""Images in Arrow tables, as Hugging Face lays them out: a column of encoded files, and one of labels.

Decoding 60,000 small images takes about ten seconds, so the arrays are kept in a cache folder, under the digest of the
file that they came from.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from thinwire.errors import MalformedError, MisuseError
from thinwire.sync.files import staged_file

if TYPE_CHECKING:
    import pyarrow

__all__ = ["Arrays", "decode_table", "read_parquet"]

Arrays = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]
"""Images uint8 ``[N, channels, height, width]`` and labels int64 ``[N]``."""

_IMAGES = ("image", "img", "images")
_LABELS = ("label", "labels", "fine_label")
_SIDE_MAX = 1024
_BYTES_MAX = 1 << 35
_VERSION = "v1"


def read_parquet(path: Path, cache: Path) -> Arrays:
    """The images and labels of a parquet file, decoded once and then read from ``cache``.

    Raises:
        MisuseError: pyarrow or Pillow is not installed, or there are no columns of images and labels.
        MalformedError: the file or an image in it is damaged, or the images differ in size.
    """
    from blake3 import blake3

    digest = blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()[:32]
    names = [cache / f"{_VERSION}-{digest}.{part}.npy" for part in ("images", "labels")]
    found = _cached(names)
    if found is None:
        found = decode_table(_table(path), str(path))
        cache.mkdir(parents=True, exist_ok=True)
        _save(names[0], found[0])
        _save(names[1], found[1])
    return found


def _save(path: Path, array: npt.NDArray[Any]) -> None:
    with staged_file(path) as temporary, temporary.open("xb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


def _cached(names: list[Path]) -> Arrays | None:
    """What the cache holds, if it is whole; a damaged entry is written anew."""
    try:
        images, labels = (np.load(name, allow_pickle=False) for name in names)
    except (FileNotFoundError, ValueError, EOFError):
        return None
    whole = images.dtype == np.uint8 and images.ndim == 4 and labels.dtype == np.int64
    return (images, labels) if whole and labels.shape == images.shape[:1] else None


def _table(path: Path) -> pyarrow.Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise MisuseError(f"reading {path.name} needs pyarrow: pip install 'thinwire[train]'") from None
    try:
        return pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise MalformedError(f"{path} is no whole parquet file: {error}; get it again", path=str(path)) from error


def decode_table(table: pyarrow.Table, source: str) -> Arrays:
    """The images and labels of a table; ``source`` names it in errors.

    An image is a PNG, JPEG or other file that Pillow reads, as bytes or as ``{bytes, path}``. All must be of one size
    and mode, grey or colour; anything else is made colour.

    Raises:
        MisuseError: Pillow is not installed, or there are no columns of images and labels.
        MalformedError: an image or a label is damaged or missing, or the images differ in size.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise MisuseError("decoding images needs Pillow: pip install 'thinwire[train]'") from None
    files = _column(table, _IMAGES, source)
    labels = np.asarray(_column(table, _LABELS, source).to_numpy())
    if labels.dtype.kind not in "iu" or not len(labels) or labels.min() < 0:
        raise MalformedError(f"{source}: labels must be whole numbers from 0, and none may be missing", source=source)
    images: npt.NDArray[np.uint8] | None = None
    for k, item in enumerate(files):
        data = item.as_py()
        if isinstance(data, dict):
            data = data.get("bytes") or _file(data.get("path"), source)
        try:
            with Image.open(io.BytesIO(data)) as image:  # reads the header only
                if max(image.size) > _SIDE_MAX:
                    raise MalformedError(f"{source}: image {k} is {image.size} pixels; at most {_SIDE_MAX}", row=k)
                mode = "L" if image.mode in ("1", "L") else "RGB"
                pixels = np.asarray(image.convert(mode)).reshape(image.height, image.width, -1).transpose(2, 0, 1)
        except (OSError, SyntaxError, TypeError, ValueError) as error:
            raise MalformedError(f"{source}: image {k} cannot be decoded: {error}", source=source, row=k) from error
        if images is None:
            if len(labels) * pixels.size > _BYTES_MAX:
                raise MalformedError(f"{source}: {len(labels)} images of {pixels.size} bytes do not fit into memory")
            images = np.empty((len(labels), *pixels.shape), dtype=np.uint8)
        if pixels.shape != images.shape[1:]:
            raise MalformedError(
                f"{source}: image {k} is {pixels.shape} and the first is {images.shape[1:]}; resize them to one size",
                source=source, row=k,
            )  # fmt: skip
        images[k] = pixels
    assert images is not None
    return images, labels.astype(np.int64)


def _column(table: pyarrow.Table, names: tuple[str, ...], source: str) -> Any:
    for name in names:
        if name in table.column_names:
            return table.column(name)
    raise MisuseError(
        f"{source} has columns {', '.join(table.column_names)}; one of {', '.join(names)} is needed", source=source
    )


def _file(path: object, source: str) -> bytes:
    """The file that a row names instead of holding it."""
    if not isinstance(path, str):
        raise MalformedError(f"{source}: an image is missing", source=source)
    return Path(path).read_bytes()
