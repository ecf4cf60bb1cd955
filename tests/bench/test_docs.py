"""The figures in docs/benchmarks.md are those of the rows kept beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from thinwire.bench.accuracy_report import accuracy_markdown
from thinwire.bench.gradients import gradients_markdown
from thinwire.bench.link import link_markdown, link_rows
from thinwire.bench.markdown import codec_markdown, real_markdown
from thinwire.bench.momentum import momentum_markdown
from thinwire.bench.signal_report import signal_markdown

ROOT = Path(__file__).resolve().parents[2]
DOCS = (ROOT / "docs" / "benchmarks.md").read_text()


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / "bench" / "results" / name).read_text().splitlines()]


@pytest.mark.parametrize("workload", ["ulp", "adam"])
def test_the_codec_tables_are_those_of_the_rows(workload: str) -> None:
    found = [row for row in rows("codec-1gib.jsonl") if row["workload"]["name"] == workload]
    assert codec_markdown(found) in DOCS
    assert f"{found[0]['entropy']['exponent']:.3f}" in DOCS


def test_the_table_of_real_versions_is_that_of_the_rows() -> None:
    found = rows("real-smollm2.jsonl")
    assert real_markdown(found) in DOCS
    assert all(level["exact"] for row in found for level in row["thinwire"].values())


GRADIENTS = (ROOT / "docs" / "gradients.md").read_text()


def test_the_tables_of_exchanges_are_those_of_the_rows() -> None:
    assert gradients_markdown(rows("gradients-8x1gbit-2-cores.jsonl")) in GRADIENTS
    buckets = [row for row in rows("gradients-8x1gbit.jsonl") if len(row["buckets"]) > 1]
    assert gradients_markdown(buckets) in GRADIENTS
    for density in ("0.1", "0.01", "0.001"):
        for row in rows(f"gradients-density-{density}.jsonl"):
            if row["method"] != "fp32":
                assert f"| {1000 * row['median_s']:.0f} |" in GRADIENTS


@pytest.mark.parametrize("data", ["mnist", "cifar10", "cifar10-long"])
def test_the_tables_of_accuracy_are_those_of_the_rows(data: str) -> None:
    assert accuracy_markdown(rows(f"accuracy-{data}.jsonl")) in GRADIENTS


def test_the_run_under_kills_was_clean() -> None:
    (row,) = rows("follow-300.jsonl")
    assert (row["mismatches"], row["stalled"], row["crashes"]) == ([], [], [])
    for figure in (row["versions"], row["kills"], row["joins"], row["reports"], f"{row['published_bytes']:,}"):
        assert f"| {figure} |" in DOCS


@pytest.mark.parametrize("name", ["signal-2", "signal-8"])
def test_the_tables_of_bad_workers_are_those_of_the_rows(name: str) -> None:
    assert signal_markdown(rows(f"{name}.jsonl")) in (ROOT / "docs" / "signal.md").read_text()


LEVELS = (ROOT / "docs" / "levels.md").read_text()


@pytest.mark.parametrize("workload", ["ulp", "adam"])
def test_the_tables_of_links_are_those_of_the_codecs_rows(workload: str) -> None:
    computed = [row for row in link_rows(rows("codec-1gib.jsonl")) if row["workload"] == workload]
    assert link_markdown(computed) in LEVELS
    assert [row for row in rows("link.jsonl") if row["workload"] == workload] == computed


def test_the_table_of_predicted_steps_is_that_of_the_rows() -> None:
    found = rows("momentum.jsonl")
    assert momentum_markdown(found) in LEVELS
    others = [row["share_not_zero"] for row in found if row["source"].startswith("smollm2")]
    assert min(others) > 0.99
