"""The rows that a tracker leaves behind: one for each step, lag and tensor, kind of tensors, or all of them.

While a run goes on, rows are appended to a file of lines, one a step, each with its checksum, flushed as it is written:
a run that is killed loses at most the step that it was writing. :func:`read_log` reads such a file up to its last whole
line, and warns of what it left out. :meth:`History.save` writes all rows as one Parquet file, atomically.

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     history = History(Path(folder) / "run.jsonl")
...     history.append(1, [{"scope": "all", "name": "", "lag": 1, "elements": 10, "changed": 3}])
...     [row["changed"] for row in read_log(Path(folder) / "run.jsonl")]
[3]
"""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from math import isfinite
from pathlib import Path
from typing import Any

from thinwire.errors import MalformedError, MisuseError
from thinwire.probe.changes import Changes
from thinwire.probe.statistics import LagStats, StepStats

__all__ = ["COLUMNS", "History", "load_history", "read_log", "rows_of"]

Row = dict[str, Any]

_TEXT = ("scope", "name", "kind", "layer")
_WHOLE = ("step", "lag", "elements", "changed", "above", "odd", "new_nan", "new_inf")
_DERIVED = ("density", "sparsity", "mean", "mean_abs", "std", "std_abs", "update_ratio")
_NULL = ("null", "excess", "excess_low", "excess_high")
COLUMNS = (
    "step", "lag", *_TEXT, *(f.name for f in fields(Changes)), *_DERIVED, *_NULL, "seconds",
)  # fmt: skip
"""The columns of a row: where it belongs, the sums of a :class:`Changes` (``ulps`` is a list), what follows from them,
the null and what is beyond it (shares of elements, empty where not measured), the seconds that the step's measurement
took. ``scope`` is ``tensor``, ``kind`` or ``all``."""

_LINE_BYTES_MAX = 1 << 28
_NOTHING: Row = dict.fromkeys(COLUMNS)
_SUMS = tuple(f.name for f in fields(Changes))


def _row(stats: LagStats, step: int, scope: str, name: str, changes: Changes, null: float | None) -> Row:
    row: Row = {"step": step, "lag": stats.lag, "scope": scope, "name": name, "kind": "", "layer": ""}
    row |= {total: getattr(changes, total) for total in _SUMS}
    row |= {derived: getattr(changes, derived) for derived in _DERIVED}
    row["ulps"] = list(changes.ulps)
    row["null"] = null
    row["excess"] = None if null is None else changes.density - null
    return row


def rows_of(stats: StepStats) -> list[Row]:
    """The rows of a step: of each lag all tensors, the kinds, and the tensors one by one."""
    rows = []
    for lag in stats.lags.values():
        row = _row(lag, stats.step, "all", "", lag.total, lag.null)
        excess = lag.excess
        if excess is not None:
            row |= {"excess": excess.value, "excess_low": excess.low, "excess_high": excess.high}
        rows.append(row | {"seconds": stats.seconds})
        for kind, changes in lag.kinds.items():
            names = [name for name in lag.tensors if lag.places[name].kind == kind]
            rows.append(_row(lag, stats.step, "kind", kind, changes, lag.null_of(names)) | {"kind": kind})
        for name, changes in lag.tensors.items():
            place = lag.places[name]
            about = {"kind": place.kind, "layer": ".".join(map(str, place.layer))}
            rows.append(_row(lag, stats.step, "tensor", name, changes, lag.null_of([name])) | about)
    return rows


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not isfinite(value) else value


def _line(step: int, rows: Sequence[Mapping[str, Any]]) -> bytes:
    table = [[_plain(row.get(column)) for column in COLUMNS[1:]] for row in rows]
    body = json.dumps({"step": step, "rows": table}, separators=(",", ":"), allow_nan=False).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def _parse(line: bytes) -> list[Row] | None:
    """The rows of a line; None if it is not whole."""
    if len(line) < 10 or not line.endswith(b"\n") or line[8:9] != b" ":
        return None
    body = line[9:-1]
    try:
        if int(line[:8], 16) != zlib.crc32(body):
            return None
        found = json.loads(body)
        return [dict(zip(COLUMNS, [found["step"], *row], strict=True)) for row in found["rows"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def read_log(path: str | os.PathLike[str]) -> Iterator[Row]:
    """The rows of a log, in order. What follows the last whole line is left out, with a warning that says how much.

    Raises:
        MalformedError: a line that is not the last is damaged.
    """
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        at = 0
        while line := file.readline(_LINE_BYTES_MAX):
            rows = _parse(line)
            if rows is None:
                if at + len(line) < size:
                    raise MalformedError(f"{path} is damaged at byte {at}, and more follows; keep what is before it")
                warnings.warn(f"{path} was cut off: its last {size - at} bytes are left out", stacklevel=2)
                return
            yield from rows
            at += len(line)


def _whole_bytes(path: Path) -> int:
    """Bytes of a log up to the end of its last whole line."""
    at = 0
    with path.open("rb") as file:
        while (line := file.readline(_LINE_BYTES_MAX)) and _parse(line) is not None:
            at += len(line)
    return at


class History:
    """Rows of a run, in memory or, if a ``log`` is given, in that file alone; an old log is continued.

    What a crash cut off at the end of an old log is removed from it.
    """

    def __init__(self, log: str | os.PathLike[str] | None = None) -> None:
        self.log = None if log is None else Path(log)
        self._rows: list[Row] = []
        if self.log is not None and self.log.exists():
            whole = _whole_bytes(self.log)
            for _ in read_log(self.log):  # warns of a cut, refuses damage
                pass
            os.truncate(self.log, whole)

    def append(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add the rows of a step; they are with the operating system when this returns."""
        if self.log is None:
            self._rows += [{**_NOTHING, **row, "step": step} for row in rows]
            return
        with self.log.open("ab") as file:
            file.write(_line(step, rows))

    def rows(self) -> Iterator[Row]:
        """All rows, in order; what is not finite is None in rows from a log."""
        if self.log is None:
            return iter(self._rows)
        return read_log(self.log) if self.log.exists() else iter(())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all rows to a Parquet file, or, if the name ends in ``.jsonl``, to a log; one rename at the end.

        Raises:
            MisuseError: pyarrow is not installed, for Parquet.
        """
        target = Path(path)
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            if target.suffix == ".jsonl":
                with part.open("wb") as file:
                    for step, rows in _by_step(self.rows()):
                        file.write(_line(step, rows))
            else:
                _write_parquet(part, self.rows())
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)


def _by_step(rows: Iterator[Row]) -> Iterator[tuple[int, list[Row]]]:
    step, batch = 0, list[Row]()
    for row in rows:
        if batch and row["step"] != step:
            yield step, batch
            batch = []
        step = row["step"]
        batch.append(row)
    if batch:
        yield step, batch


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MisuseError("Parquet needs pyarrow: pip install 'thinwire[probe]'; or save to a .jsonl name") from error
    return pyarrow


def _write_parquet(path: Path, rows: Iterator[Row]) -> None:
    arrow = _pyarrow()
    types = dict.fromkeys(_TEXT, arrow.string()) | dict.fromkeys(_WHOLE, arrow.int64())
    types["ulps"] = arrow.list_(arrow.int64())
    schema = arrow.schema([(column, types.get(column, arrow.float64())) for column in COLUMNS])
    with arrow.parquet.ParquetWriter(str(path), schema, compression="zstd") as writer:
        for _, batch in _by_step(rows):
            writer.write_table(arrow.Table.from_pylist(batch, schema=schema), row_group_size=1 << 16)


def load_history(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a Parquet file or of a log, as :meth:`History.save` or a tracker wrote them.

    Raises:
        MalformedError: not such a file. MisuseError: pyarrow is not installed, for Parquet.
    """
    if Path(path).suffix == ".jsonl":
        return list(read_log(path))
    arrow = _pyarrow()
    try:
        rows: list[Row] = arrow.parquet.read_table(str(path)).to_pylist()
    except arrow.ArrowInvalid as error:
        raise MalformedError(f"{path} is no Parquet file: {error}") from error
    if rows and not set(rows[0]) >= {"step", "lag", "scope", "elements", "changed"}:
        raise MalformedError(f"{path} holds no history of changes; its columns are {', '.join(rows[0])[:200]}")
    return rows
