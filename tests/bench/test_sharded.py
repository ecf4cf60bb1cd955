"""What readers of slices fetch, measured small: the rows are of real readers, and their shares make sense."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from thinwire.bench.cli import app
from thinwire.bench.sharded import READERS


def test_smaller_groups_serve_readers_of_few_layers_and_cost_bytes() -> None:
    words = ["sharded", "--layers", "2", "--width", "256", "--slices", "4", "--json"]
    words += ["--group-cells", "4194304", "--group-cells", "65536"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = {(row["group_cells"], row["reader"]): row for row in rows}
    assert len(found) == 2 * len(READERS)
    for row in rows:
        assert row["reader_bytes"] <= row["load_bytes"] < 1.6 * row["state_bytes"]
        assert row["reader_bytes"] <= row["share_bytes"] <= row["reader_bytes"] + row["beside_bytes"]
        assert 0 < row["changed"] < 0.02 * row["state_bytes"] / 2
    large, small = found[1 << 22, "layers, 1 of 4"], found[1 << 16, "layers, 1 of 4"]
    assert small["load_bytes"] < large["load_bytes"]
    assert small["beside_bytes"] < large["beside_bytes"]
    assert found[1 << 16, "whole"]["delta_bytes"] > found[1 << 22, "whole"]["delta_bytes"]
