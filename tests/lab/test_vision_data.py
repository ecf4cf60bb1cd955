"""Images: what is read is what was written, damage is refused, and what is missing is told."""

from __future__ import annotations

import gzip
import io
import os
import struct
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from thinwire.errors import MalformedError, MisuseError
from thinwire.lab.vision import parquet as parquet_module
from thinwire.lab.vision.data import Images, load_images
from thinwire.lab.vision.idx import read_idx
from thinwire.lab.vision.parquet import decode_table, read_parquet

# --- IDX -----------------------------------------------------------------------------------------------------------


def idx(shape: tuple[int, ...], data: bytes, kind: int = 8) -> bytes:
    return bytes([0, 0, kind, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + data


@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_idx_reads_what_was_written(tmp_path_factory: pytest.TempPathFactory, shape: list[int], seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    path = tmp_path_factory.getbasetemp() / "x.gz"
    path.write_bytes(gzip.compress(idx(tuple(shape), values.tobytes())))
    assert np.array_equal(read_idx(path), values)


@pytest.mark.parametrize(
    "data",
    [
        b"no gzip",
        gzip.compress(b""),
        gzip.compress(idx((2, 2), b"abcd"))[:-9],
        gzip.compress(idx((2, 2), b"abc")),
        gzip.compress(idx((2, 2), b"abcde")),
        gzip.compress(idx((2, 2), b"abcd", kind=13)),
        gzip.compress(idx((2, 2), b"abcd")[:7]),
        gzip.compress(idx((), b"a")),
        gzip.compress(idx((1,) * 5, b"a")),
        gzip.compress(b"\1" + idx((1,), b"a")[1:]),
        gzip.compress(idx((2**32 - 1, 2**32 - 1), b"")),  # says 16 EiB
        gzip.compress(idx((2**31 - 1,), b"a")),  # within the bound, but not there
        gzip.compress(idx((4,), bytes(10**7))),  # expands to far more than it says
    ],
    ids=range(13),  # gzip writes the time of day, and all test processes must see the same names
)
def test_idx_refuses_damage(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.gz"
    path.write_bytes(data)
    with pytest.raises(MalformedError):
        read_idx(path)


def write_mnist(folder: Path, train: int = 30, test: int = 12, side: int = 6) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True)
    source, written = np.random.default_rng(0), {}
    for part, count in (("train", train), ("t10k", test)):
        images = source.integers(0, 256, (count, side, side), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images.shape, images.tobytes())))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels.shape, labels.tobytes())))
        written |= {f"{part}-images": images, f"{part}-labels": labels}
    return written


def test_mnist_is_found_by_the_environment_or_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = write_mnist(tmp_path / "root" / "mnist")
    monkeypatch.setenv("THINWIRE_DATA", str(tmp_path / "root"))
    for images in (load_images("mnist"), load_images("mnist", str(tmp_path / "root"))):
        assert torch.equal(images.train_images[:, 0], torch.from_numpy(written["train-images"]))
        assert images.test_labels.tolist() == written["t10k-labels"].tolist()
        assert (images.classes, images.shape) == (10, (1, 6, 6))
    monkeypatch.delenv("THINWIRE_DATA")
    with pytest.raises(MisuseError, match=r"THINWIRE_DATA is not set.*--data-root.*--data digits"):
        load_images("mnist")
    with pytest.raises(MisuseError, match="there is no folder"):
        load_images("cifar10", str(tmp_path / "root"))
    (tmp_path / "root" / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(MisuseError, match=r"t10k-labels-idx1-ubyte.gz is missing"):
        load_images("mnist", str(tmp_path / "root"))


def test_labels_that_do_not_fit_the_images_are_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path / "mnist")
    (tmp_path / "mnist" / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx((3,), b"abc")))
    with pytest.raises(MalformedError, match="labels"):
        load_images("mnist", str(tmp_path))


# --- parquet -------------------------------------------------------------------------------------------------------


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def table(images: np.ndarray, labels: list[int], image: str = "image", label: str = "label") -> pyarrow.Table:
    rows = [{"bytes": png(x), "path": None} for x in images]
    return pyarrow.table({image: rows, label: labels})


def colours(count: int, seed: int = 0, side: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def test_parquet_is_decoded_once_and_a_damaged_cache_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, path, cache = colours(5), tmp_path / "x.parquet", tmp_path / "cache"
    pyarrow.parquet.write_table(table(pixels, [3, 1, 2, 0, 1]), path)
    decodings = []
    decode = decode_table
    monkeypatch.setattr(parquet_module, "decode_table", lambda *x: decodings.append(1) or decode(*x))

    def read() -> None:
        images, labels = read_parquet(path, cache)
        assert np.array_equal(images, pixels.transpose(0, 3, 1, 2))
        assert labels.tolist() == [3, 1, 2, 0, 1]

    read()
    read()
    assert len(decodings) == 1
    kept = sorted(cache.iterdir())
    assert len(kept) == 2  # no temporary files
    for damaged in kept:
        damaged.write_bytes(damaged.read_bytes()[:40])
        read()
    assert len(decodings) == 3
    pyarrow.parquet.write_table(table(colours(5, seed=1), [0] * 5), path)
    assert not np.array_equal(read_parquet(path, cache)[0], pixels.transpose(0, 3, 1, 2))


def test_grey_images_and_other_column_names(tmp_path: Path) -> None:
    pixels = colours(3)[..., 0]
    images, labels = decode_table(table(pixels, [0, 1, 2], "img", "fine_label"), "x")
    assert np.array_equal(images[:, 0], pixels)
    assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
    raw = pyarrow.table({"image": [png(x) for x in pixels], "label": [0, 1, 2]})
    assert np.array_equal(decode_table(raw, "x")[0], images)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"image": [b"no image"], "label": [0]}, "image 0 cannot be decoded"),
        ({"image": [png(colours(1)[0])[:-30]], "label": [0]}, "image 0 cannot be decoded"),
        ({"image": [png(colours(1)[0]), png(colours(1, side=9)[0])], "label": [0, 1]}, "one size"),
        ({"image": [png(np.zeros((1, 1025), np.uint8))], "label": [0]}, "at most 1024"),
        ({"image": [None], "label": [0]}, "cannot be decoded"),
        ({"image": [{"bytes": None, "path": None}], "label": [0]}, "is missing"),
        ({"image": [png(colours(1)[0])], "label": [-1]}, "labels"),
        ({"image": [png(colours(1)[0])], "label": ["cat"]}, "labels"),
        ({"image": [png(colours(1)[0])], "label": [None]}, "labels"),
        ({"image": pyarrow.array([], pyarrow.binary()), "label": pyarrow.array([], pyarrow.int64())}, "labels"),
    ],
)
def test_damaged_tables_are_refused(rows: dict[str, list[object]], words: str) -> None:
    with pytest.raises(MalformedError, match=words):
        decode_table(pyarrow.table(rows), "x")


def test_missing_columns_and_damaged_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match="columns picture, label; one of image, img, images is needed"):
        decode_table(pyarrow.table({"picture": [b""], "label": [0]}), "x")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(MalformedError, match="no whole parquet file"):
        read_parquet(tmp_path / "x.parquet", tmp_path)


def test_hugging_face_reads_a_folder_of_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "set"
    folder.mkdir()
    pixels = colours(6)
    pyarrow.parquet.write_table(table(pixels[:4], [0, 1, 2, 3]), folder / "train.parquet")
    pyarrow.parquet.write_table(table(pixels[4:], [3, 2]), folder / "test.parquet")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    images = load_images(f"hf:{folder}")
    assert np.array_equal(images.train_images.numpy(), pixels[:4].transpose(0, 3, 1, 2))
    assert (images.test_labels.tolist(), images.classes) == ([3, 2], 4)
    with pytest.raises(MisuseError, match="Hugging Face has no"):
        load_images(f"hf:{tmp_path / 'nowhere'}")


# --- data sets -----------------------------------------------------------------------------------------------------


def check_normalisation(images: Images) -> None:
    pixels = images.train_images.double()
    assert torch.allclose(images.mean.flatten(), pixels.mean((0, 2, 3)).float())
    assert torch.allclose(images.deviation.flatten(), pixels.std((0, 2, 3), correction=0).float(), rtol=1e-4)


def test_digits_and_their_slices() -> None:
    images = load_images("digits")
    assert sorted(set(images.train_labels.tolist())) == list(range(10))
    check_normalisation(images)
    few = images.first(7, None)
    assert (len(few.train_images), len(few.train_labels), len(few.test_labels)) == (7, 7, 300)
    with pytest.raises(MisuseError, match="give digits, mnist, cifar10 or hf:NAME"):
        load_images("imagenet")


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "shape", "sizes"),
    [("mnist", (1, 28, 28), (60000, 10000)), ("cifar10", (3, 32, 32), (50000, 10000))],
)
def test_the_real_sets(tmp_path: Path, name: str, shape: tuple[int, ...], sizes: tuple[int, int]) -> None:
    if "THINWIRE_DATA" not in os.environ:
        pytest.skip("THINWIRE_DATA is not set")
    images = load_images(name, cache=str(tmp_path))
    assert (images.shape, images.classes) == (shape, 10)
    assert (len(images.train_labels), len(images.test_labels)) == sizes
    check_normalisation(images)
    if name == "cifar10":
        assert torch.bincount(images.train_labels).tolist() == [5000] * 10
        again = load_images(name, cache=str(tmp_path))
        assert torch.equal(images.train_images, again.train_images)
