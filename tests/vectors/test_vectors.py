"""Files written by each released version: read today as then, by the fast reader and by the readable one."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import blake3
import numpy as np
import pytest
import zstandard

from thinwire.sync.apply import apply_patch
from thinwire.sync.layout import Layout
from thinwire.wire import reference
from thinwire.wire.digests import Tree
from thinwire.wire.manifest import Manifest
from thinwire.wire.patch import Patch
from thinwire.wire.spec import DTYPES, dtype_of

HERE = Path(__file__).parent
PATCHES = sorted(HERE.glob("*/*.safetensors"))


def load(described: dict[str, list[object]]) -> tuple[dict[str, Layout], dict[str, np.ndarray]]:
    layouts = {n: Layout(dtype_of(d), tuple(s)) for n, (d, s, _) in described.items()}  # type: ignore[arg-type]
    cells = {n: np.frombuffer(bytes.fromhex(h), layouts[n].dtype.cells).copy() for n, (_, _, h) in described.items()}  # type: ignore[arg-type]
    return layouts, cells


def case_of(path: Path) -> dict[str, dict[str, list[object]]]:
    return json.loads((path.parent / f"{path.name.split('-')[0]}.json").read_text())  # type: ignore[no-any-return]


def test_there_are_vectors() -> None:
    assert len(PATCHES) >= 20


@pytest.mark.parametrize("path", PATCHES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_the_fast_reader_reads_it(path: Path) -> None:
    case = case_of(path)
    layouts, cells = load(case["base"])
    report = apply_patch(Patch.parse(path.read_bytes()), layouts, cells)
    expected_layouts, expected = load(case["result"])
    assert layouts == expected_layouts
    assert all((cells[n] == c).all() for n, c in expected.items())
    tree = path.parent / f"{path.name.split('-')[0]}.tree.json"
    assert report.tree == Tree.parse(tree.read_bytes())


def plainly(data: bytes, base: dict[str, list[object]]) -> dict[str, list[object]]:
    """The result, by the specification alone."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    meta = header.pop("__metadata__")

    def body(name: str) -> bytes:
        start, stop = header[name]["data_offsets"]
        return data[8 + length + start : 8 + length + stop]

    table = json.loads(zstandard.ZstdDecompressor().decompress(body("thinwire.table")))
    result: dict[str, list[object]] = {}
    for dtype in {row[1] for row in table["tensors"]}:
        kind = DTYPES[dtype]
        rows = [row for row in table["tensors"] if row[1] == dtype and row[3] == "sparse"]
        old = b"".join(bytes.fromhex(base[row[0]][2]) for row in rows)  # type: ignore[arg-type]
        width = kind.cell_bytes
        cells = [int.from_bytes(old[i : i + width], "little") for i in range(0, len(old), width)]
        start = offset = 0
        for name, count, changed, size in table["segments"]:
            if name == dtype and size:
                data_of = body("thinwire.segments")[offset : offset + size]
                part = cells[start : start + count]
                found = reference.decode_segment(data_of, changed, part, 8 * width, kind.mantissa_bits)
                if found.raw is not None:
                    raw = found.raw
                    part = [int.from_bytes(raw[i : i + width], "little") for i in range(0, len(raw), width)]
                for position, code in zip(found.positions, found.codes, strict=True):
                    part[position] = reference.apply_code(
                        part[position], code, 8 * width, is_float=kind.is_float, values=meta["values"]
                    )
                cells[start : start + count] = part
            offset += size
            start += count if name == dtype else 0
        new, at = b"".join(c.to_bytes(width, "little") for c in cells), 0
        for row in rows:
            size = len(base[row[0]][2]) // 2  # type: ignore[arg-type]
            result[row[0]] = [dtype, row[2], new[at : at + size].hex()]
            at += size
    for name, dtype, shape, how, extra in table["tensors"]:
        if how == "raw":
            result[name] = [dtype, shape, body(f"tensors/{name}").hex()]
        elif how == "moved":
            result[name] = [dtype, shape, base[extra][2]]
    return result


@pytest.mark.parametrize("path", PATCHES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_the_specification_alone_suffices_to_read_it(path: Path) -> None:
    case = case_of(path)
    assert plainly(path.read_bytes(), case["base"]) == case["result"]


@pytest.mark.parametrize("path", sorted(HERE.glob("*/manifest.json")), ids=lambda p: p.parent.name)
def test_the_manifest_reads_back(path: Path) -> None:
    data = path.read_bytes()
    manifest = Manifest.parse(data)
    assert manifest.encode() == data
    assert (manifest.version, manifest.step, manifest.metadata) == (2, -7, {"réward": "½"})
    signed = data[data.index(b'"signed":') + 9 : -1]
    assert blake3.blake3(signed).hexdigest() == manifest.digest
