"""The scaling model finds what made synthetic points; bytes between threads are those between processes."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from thinwire.bench import scaling
from thinwire.bench.cli import app
from thinwire.bench.gradients import run_gradients
from thinwire.bench.gradients_exchange import FLOAT
from thinwire.bench.gradients_methods import METHODS
from thinwire.bench.gradients_worker import GradientOptions
from thinwire.bench.gradients_workload import Workload, cut, resnet50_shapes
from thinwire.bench.net.namespaces import SlowNetwork
from thinwire.bench.scaling import ScalingOptions, run_scaling, scaling_table
from thinwire.bench.scaling_bytes import bytes_in_memory
from thinwire.bench.scaling_figure import scaling_figure
from thinwire.bench.scaling_model import CORES_A_RANK, SIMULATED, Model, Point, Setting, fit
from thinwire.errors import MisuseError

SHAPES = resnet50_shapes()
BUCKETS = cut(torch.empty(sum(prod(shape) for shape in SHAPES), device="meta"), SHAPES, 25)
SETTING = Setting(BUCKETS, 0.01, 8)
TRUE = (3e-4, 8.3e-9, 2e-9, 3e-9, 1e-9, 2e-8, 4e-8)


def points(model: Model, workers: tuple[int, ...]) -> list[Point]:
    return [Point(m, p, model.seconds(m, p, own_cores=False)) for m in SIMULATED for p in workers]


# --- the model -----------------------------------------------------------------------------------------------------


@given(st.tuples(*(st.floats(0.3, 3) for _ in TRUE)))
def test_a_model_fitted_to_its_own_points_predicts_those_it_has_not_seen(factors: tuple[float, ...]) -> None:
    true = Model(SETTING, tuple(c * f for c, f in zip(TRUE, factors, strict=True)))
    found = fit(points(true, (2, 4)), SETTING)
    for point in points(true, (2, 4, 8)):
        assert abs(found.error(point)) < 0.02
    for method in SIMULATED:
        wanted = true.seconds(method, 64, own_cores=True)
        assert found.seconds(method, 64, own_cores=True) == pytest.approx(wanted, rel=0.05)


def test_coefficients_are_not_negative_however_noisy_the_points() -> None:
    noise = torch.Generator().manual_seed(0)
    noisy = [Point(m, p, float(torch.rand((), generator=noise)) + 0.01) for m in SIMULATED for p in (2, 4)]
    found = fit(noisy, SETTING)
    assert min(found.coefficients) >= 0
    assert max(found.coefficients) > 0


def test_ranks_on_cores_of_their_own_are_never_slower_and_one_worker_exchanges_nothing() -> None:
    model = Model(SETTING, TRUE)
    for method in SIMULATED:
        assert model.seconds(method, 1, own_cores=True) == 0
        for workers in (2, 4, 8, 64):
            own, shared = (model.seconds(method, workers, own_cores=own) for own in (True, False))
            assert own < shared if CORES_A_RANK * workers > SETTING.cores else own == shared
    with pytest.raises(MisuseError, match="no model of 'noop'"):
        model.seconds("noop", 2, own_cores=True)
    with pytest.raises(MisuseError, match="needs several"):
        fit([Point("fp32", 1, 0.1), Point("fp32", 2, 0.1)], SETTING)


# --- bytes ---------------------------------------------------------------------------------------------------------


def test_bytes_between_threads_are_those_between_processes() -> None:
    options = GradientOptions(("split", "shared", "gather"), 0.02, repeats=2, verified_steps=2, width=6, bucket_mb=0)
    for row in run_gradients(options, 2, None):
        between_processes = row["accounted_bytes"] / (FLOAT * row["numel"])
        assert bytes_in_memory(row["method"], 2, density=0.02, width=6) == pytest.approx(between_processes, rel=0.05)


def test_a_worker_beside_another_has_gradients_of_its_own() -> None:
    first = Workload(resnet50_shapes(3), 0, 0, 0)
    second = first.beside(1)
    first.fill(0)
    second.fill(0)
    assert not torch.equal(first.flat, second.flat)
    before = first.flat.clone()
    second.fill(1)
    assert torch.equal(first.flat, before)


def test_split_and_shared_receive_the_same_at_any_number_of_workers() -> None:
    for method in ("split", "shared"):
        shares = [bytes_in_memory(method, p, width=12) / (2 * (p - 1) / p) for p in (2, 8)]
        assert shares[1] < 1.1 * shares[0] < 1.1 * 0.03


# --- the whole -----------------------------------------------------------------------------------------------------


def fake_rows(options: GradientOptions, workers: int, rate: str, **_: object) -> list[dict]:
    model = Model(SETTING, TRUE)
    numel = sum(bucket.buffer().numel() for bucket in BUCKETS)
    return [
        {
            "method": name,
            "best_s": model.seconds(name, workers, own_cores=False),
            "median_s": 1.1 * model.seconds(name, workers, own_cores=False),
            "cpu_s": 0.1,
            "numel": numel,
            "received_bytes": 1.001 * METHODS[name].theory(workers, BUCKETS, options.density),
        }
        for name in options.methods
    ]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """As if the machine behaved as the model says."""
    monkeypatch.setattr(scaling, "run_gradients", fake_rows)
    monkeypatch.setattr(scaling, "bytes_in_memory", lambda method, p, **_: 0.013 * 2 * (p - 1) / p)
    monkeypatch.setattr(scaling, "machine", lambda: {"cores": SETTING.cores})
    return run_scaling(ScalingOptions())


def test_rows_can_be_simulated_anew_without_measuring(rows: list[dict]) -> None:
    fewer = scaling.simulate(rows, (2, 64))
    assert [row for row in fewer if row["kind"] == "simulated"] == [
        row for row in rows if row["kind"] == "simulated" and row["workers"] in (2, 64)
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = CliRunner().invoke(app, ["scaling", "--again", "rows.jsonl", "--json", "--figures", "."])
    assert done.exit_code == 0, done.output
    assert [json.loads(line) for line in done.stdout.splitlines()] == rows
    assert Path("gradients-scaling.png").exists()


def test_rows_hold_measured_simulated_and_the_error_of_the_held_out(rows: list[dict]) -> None:
    (model,) = (row for row in rows if row["kind"] == "model")
    assert model["held_out_workers"] == 8
    assert set(model["errors"]["held_out"]) == {f"{method} at 8" for method in SIMULATED}
    assert all(abs(error) < 0.02 for error in model["errors"]["held_out"].values())
    assert {row["workers"] for row in rows if row["kind"] == "measured"} == {1, 2, 4, 8, 16}
    assert {row["workers"] for row in rows if row["kind"] == "simulated"} == {1, 2, 4, 8, 16, 32, 64}
    assert not any(row["best_s"] for row in rows if row["kind"] == "measured" and row["workers"] == 16)
    assert json.loads(json.dumps(rows)) == rows


def test_table_and_figure_show_every_method(rows: list[dict]) -> None:
    console = Console(width=200, record=True)
    console.print(scaling_table(rows))
    text = console.export_text()
    for method in SIMULATED:
        assert METHODS[method].title in text
    scaling_figure(rows, Path("figures/scaling.png"))
    assert Path("figures/scaling.png").stat().st_size > 10_000


def test_what_cannot_be_validated_is_refused() -> None:
    with pytest.raises(MisuseError, match="two numbers above 1"):
        run_scaling(ScalingOptions(measured=(1, 4)))


def test_the_command_reads_numbers_and_skips_without_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlowNetwork, "why_not", staticmethod(lambda: "it needs root"))
    done = CliRunner().invoke(app, ["scaling"])
    assert done.exit_code == 0
    assert "skipped: it needs root" in done.stdout
    for wrong in ("2;4", "0", "65"):
        assert isinstance(CliRunner().invoke(app, ["scaling", "--measured", wrong]).exception, MisuseError)


@pytest.mark.net
@pytest.mark.skipif(SlowNetwork.why_not() is not None, reason=f"no slow network here: {SlowNetwork.why_not()}")
def test_a_small_run_measures_simulates_and_validates() -> None:
    options = ScalingOptions("1gbit", (1, 2, 3), (4,), (1, 2, 3, 4), density=0.05, repeats=1, width=6)
    rows = run_scaling(options)
    (model,) = (row for row in rows if row["kind"] == "model")
    assert model["held_out_workers"] == 3
    measured = [row for row in rows if row["kind"] == "measured"]
    assert {row["workers"] for row in measured} == {1, 2, 3, 4}
    assert all(row["share_received"] < 0.01 for row in measured if row["workers"] == 1)
    for error in model["bytes_errors"].values():
        assert -0.4 < error < 0.05  # small messages: headers and acknowledgements weigh
