"""The tables of ``docs/federated.md`` are those of the rows that are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from thinwire.bench.federated_report import (
    fairness_markdown,
    federated_markdown,
    inversion_markdown,
    participation_markdown,
)

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "federated.md").read_text()


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ROOT / "bench" / "results" / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["cifar10", "digits", "plays"])
def test_the_tables_of_methods_are_those_of_the_rows(name: str) -> None:
    assert federated_markdown(rows(f"federated-{name}")) in PAGE


def test_participation_fairness_and_what_updates_give_away_are_those_of_the_rows() -> None:
    assert participation_markdown(rows("federated-participation")) in PAGE
    dense = [row for row in rows("federated-digits") if row["method"] in ("fedavg", "sparsesync")]
    assert fairness_markdown([*dense, *rows("federated-density")]) in PAGE
    assert inversion_markdown(rows("inversion")) in PAGE
