"""The benchmark of keys runs, and the page about them says what its kept rows say."""

from __future__ import annotations

import json
from pathlib import Path

from thinwire.bench.trust import trust_rows
from thinwire.bench.trust_cli import trust_lines

ROOT = Path(__file__).resolve().parents[2]


def test_it_measures_something() -> None:
    sign, encrypt = trust_rows(20_000, object_bytes=3 << 20, repeats=1)
    assert sign["sign_s"] > 0
    assert sign["verify_s"] > 0
    assert sign["manifest_bytes"] > 500
    assert encrypt["sealed_get_gib_s"] > 0


def test_the_page_says_what_the_rows_say() -> None:
    rows = [json.loads(line) for line in (ROOT / "bench" / "results" / "trust.jsonl").read_text().splitlines()]
    page = " ".join((ROOT / "docs" / "trust.md").read_text().split())
    for line in trust_lines(rows):
        assert line in page
