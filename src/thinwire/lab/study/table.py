"""All runs of a study as one Parquet table: a row for each run, step, lag, layer and kind."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from thinwire.errors import MisuseError
from thinwire.lab.study.execute import Record

__all__ = ["write_table"]


def write_table(records: Sequence[Record], path: Path) -> int:
    """Write ``path``, whole or not at all; returns the number of rows.

    Columns: ``id``, the axes of the run, ``lr_value``, ``parameters``, ``before`` and ``after`` (sampled exact
    rewards), ``hessian_trace``, ``hessian_largest``, ``fisher_trace`` and ``fisher_largest`` (the curvature of the RL
    objective and of the policy at the end; NaN where it was not measured), then ``step``, ``lag``, ``layer``, ``kind``,
    ``elements``, ``changed``, ``null`` (expected number of changed elements), ``squares`` (of the change) and
    ``weight_squares``.

    Raises:
        MisuseError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise MisuseError("the table needs pyarrow: pip install 'thinwire[study]'") from None
    batches = []
    for record in records:
        rows = record["rows"]
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        facts = {
            "id": record["id"], **record["run"], "lr_value": record["lr"], "parameters": record["parameters"],
            "before": record["before"]["sampled"], "after": record["after"]["sampled"],
        } | _curvature(record)  # fmt: skip
        batches.append(pyarrow.table({key: [value] * len(rows) for key, value in facts.items()} | columns))
    table = pyarrow.concat_tables(batches, promote_options="permissive")
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    pyarrow.parquet.write_table(table, scratch, compression="zstd")
    os.replace(scratch, path)
    return int(table.num_rows)


def _curvature(record: Record) -> dict[str, float]:
    found = (record.get("curvature") or [{}])[-1]
    names = ("hessian_trace", "hessian_largest", "fisher_trace", "fisher_largest")
    return {name: float(found.get(name, "nan")) for name in names}
