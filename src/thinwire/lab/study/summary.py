"""What of a run the findings need: a few hundred numbers instead of a record's thousands.

A share is a pair ``[observed, null]`` of changed elements over all elements.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from thinwire.errors import MalformedError
from thinwire.lab.study.execute import Record

__all__ = ["QUARTERS", "Summary", "read_summaries", "summary_of", "write_summaries"]

Summary = dict[str, Any]
"""A run's axes and its numbers, as :func:`summary_of` names them."""

QUARTERS = 4


def _share(rows: Iterable[Mapping[str, Any]]) -> list[float] | None:
    elements = changed = 0
    null = 0.0
    for row in rows:
        elements += row["elements"]
        changed += row["changed"]
        null += row["null"]
    return [round(changed / elements, 7), round(null / elements, 7)] if elements else None


def _by(rows: Sequence[Mapping[str, Any]], key: Callable[[Mapping[str, Any]], str]) -> dict[str, list[float]]:
    found = {}
    for name in dict.fromkeys(map(key, rows)):
        share = _share(row for row in rows if key(row) == name)
        if share is not None:
            found[name] = share
    return found


def summary_of(record: Record) -> Summary:
    """The summary of a record of :func:`thinwire.lab.study.train.train`.

    ``shares`` by lag; ``quarters`` of the steps, at lag 1; ``kinds`` and ``layers``, at lag 1; ``first``, the share of
    the very first step; ``gain``, the rise of the sampled exact reward; ``loss`` at the beginning and the end (means of
    four steps); ``rank``, the mean share of full rank that the matrices' whole changes have; ``consecutive`` and
    ``curvature`` as in the record.
    """
    rows = record["rows"]
    single = [row for row in rows if row["lag"] == 1]
    steps = record["run"]["steps"]
    lags = sorted({row["lag"] for row in rows})
    ranks = [rank / full for rank, full in record["ranks"].values() if full]
    losses = record["losses"]
    return {
        "id": record["id"], **record["run"], "lr_value": record["lr"], "parameters": record["parameters"],
        "made_here": record["made_here"],
        "before": record["before"]["sampled"], "after": record["after"]["sampled"],
        "gain": record["after"]["sampled"] - record["before"]["sampled"],
        "greedy_gain": record["after"]["greedy"] - record["before"]["greedy"],
        "loss": [sum(losses[:4]) / len(losses[:4]), sum(losses[-4:]) / len(losses[-4:])],
        "shares": {str(lag): _share(row for row in rows if row["lag"] == lag) for lag in lags},
        "first": _share(row for row in single if row["step"] == 1),
        "quarters": [
            _share(row for row in single if QUARTERS * (row["step"] - 1) // steps == quarter)
            for quarter in range(QUARTERS)
        ],
        "kinds": _by(single, lambda row: row["kind"]), "layers": _by(single, lambda row: row["layer"]),
        "rank": sum(ranks) / len(ranks) if ranks else None, "consecutive": record.get("consecutive"),
        "curvature": [{k: float(f"{v:.6g}") for k, v in at.items()} for at in record.get("curvature", [])],
        "seconds": round(record["seconds"], 2),
    }  # fmt: skip


def write_summaries(summaries: Iterable[Summary], path: Path) -> None:
    """One line of JSON a run."""
    path.write_text("".join(json.dumps(summary, separators=(",", ":")) + "\n" for summary in summaries))


def read_summaries(path: Path) -> list[Summary]:
    """What :func:`write_summaries` wrote.

    Raises:
        MalformedError: a line is no JSON object.
    """
    found = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise MalformedError(f"{path}, line {number}: {error}") from error
        if not isinstance(value, dict):
            raise MalformedError(f"{path}, line {number} is no object")
        found.append(value)
    return found
