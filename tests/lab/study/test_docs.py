"""The tables of ``docs/findings.md`` and ``docs/probing.md`` are those of the rows that are kept."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from thinwire.bench.instruments_cli import instruments_markdown
from thinwire.lab.study.findings import answers
from thinwire.lab.study.matrix import read_study
from thinwire.lab.study.report import (
    conditions_markdown,
    findings_markdown,
    prediction_markdown,
    sharpness_markdown,
)
from thinwire.lab.study.summary import read_summaries

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "bench" / "results"
FINDINGS = (ROOT / "docs" / "findings.md").read_text()
SMOLLM2 = {("rl", "none"): "RL (GRPO)", ("rl", "random"): "random gradients", ("sft", "none"): "fine-tuning"}
SHARPNESS = {
    "nano, AdamW": "sharpness-nano",
    "tiny, AdamW": "sharpness-tiny",
    "nano, descent": "sharpness-nano-descent",
}


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def test_the_findings_are_those_of_the_study() -> None:
    study = read_study(ROOT / "configs" / "study.yaml")
    summaries = read_summaries(RESULTS / "study.jsonl")
    assert {summary["id"] for summary in summaries} == {study.id(run) for run in study.runs}
    assert findings_markdown(answers(summaries, asdict(study.centre))) in FINDINGS


def test_the_tables_of_sharpness_and_prediction_are_those_of_the_rows() -> None:
    assert sharpness_markdown({title: rows(name) for title, name in SHARPNESS.items()}) in FINDINGS
    assert prediction_markdown(rows("prediction-nano")) in FINDINGS


def test_what_smollm2_changed_is_what_its_rows_say() -> None:
    study = read_study(ROOT / "configs" / "study-smollm2.yaml")
    summaries = read_summaries(RESULTS / "study-smollm2.jsonl")
    assert {summary["id"] for summary in summaries} <= {study.id(run) for run in study.runs}
    assert conditions_markdown(summaries, SMOLLM2) in FINDINGS


@pytest.mark.parametrize("part", ["comparison", "overhead", "null, first step", "null, later steps", "rank"])
def test_the_tables_of_the_instruments_are_those_of_the_rows(part: str) -> None:
    assert instruments_markdown(rows("instruments"), part) in (ROOT / "docs" / "probing.md").read_text()
