"""Workload, methods and table of the gradient benchmark; every method is run by two ranks over loopback."""

from __future__ import annotations

import json
from io import StringIO
from math import prod
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from thinwire.bench import gradients
from thinwire.bench.cli import app
from thinwire.bench.gradients import WrongResultError, gradients_markdown, gradients_table, run_gradients, summarise
from thinwire.bench.gradients_exchange import ring
from thinwire.bench.gradients_methods import METHODS, choose
from thinwire.bench.gradients_worker import GradientOptions
from thinwire.bench.gradients_workload import CORRELATION, Workload, bucket_sizes, resnet50_shapes
from thinwire.bench.net.launch import launch
from thinwire.bench.net.namespaces import SlowNetwork
from thinwire.errors import MisuseError

# --- workload ------------------------------------------------------------------------------------------------------


def test_the_shapes_are_those_of_resnet50() -> None:
    shapes = resnet50_shapes()
    assert sum(prod(shape) for shape in shapes) == 25_557_032
    assert shapes[0] == (64, 3, 7, 7)
    assert shapes[-2:] == ((1000, 2048), (1000,))
    assert sum(len(shape) == 4 for shape in shapes) == 53
    with pytest.raises(MisuseError, match="width"):
        resnet50_shapes(0)


@given(st.lists(st.integers(1, 2_000_000), min_size=1, max_size=30), st.integers(1, 4))
def test_buckets_are_those_of_ddp(numels: list[int], bucket_mb: int) -> None:
    mine = bucket_sizes([(n,) for n in numels], bucket_mb)
    tensors = [torch.empty(n, device="meta") for n in reversed(numels)]
    theirs, _ = dist._compute_bucket_assignment_by_size(tensors, [1 << 20, bucket_mb << 20])
    assert mine == [[len(numels) - 1 - i for i in bucket] for bucket in theirs]
    assert bucket_sizes([(n,) for n in numels], 0) == [list(reversed(range(len(numels))))]


def test_gradients_are_new_each_step_shared_in_part_heavy_tailed_and_repeatable() -> None:
    first, second = (Workload(resnet50_shapes(4), 25, rank, seed=3) for rank in range(2))
    for workload in (first, second):
        workload.fill(5)
    before = first.flat.clone()
    seen = []
    for bucket, other in zip(first.buckets, second.buckets, strict=True):
        for mine, theirs in zip(bucket.gradients(), other.gradients(), strict=True):
            if mine.numel() > 5000:
                seen.append(float(torch.corrcoef(torch.stack([mine.reshape(-1), theirs.reshape(-1)]))[0, 1]))
                assert float(((mine / mine.std()) ** 4).mean()) > 10  # 3 for a normal
    assert abs(sum(seen) / len(seen) - CORRELATION) < 0.1
    first.fill(6)
    assert not torch.equal(first.flat, before)
    first.fill(5)
    assert torch.equal(first.flat, before)
    assert [b.is_last() for b in first.buckets] == [False] * (len(first.buckets) - 1) + [True]


# --- every method, by real ranks -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    names = tuple(METHODS)
    return run_gradients(GradientOptions(names, density=0.02, repeats=2, width=6, bucket_mb=1), 2, None)


def test_every_method_is_verified_over_loopback(rows: list[dict]) -> None:
    assert [row["method"] for row in rows] == list(METHODS)
    for row in rows:
        assert row["bit_identical"]
        assert 0 <= row["law_error"] <= 1
        assert row["law"] == {"noop": "none", "fp32": "mean", "fp16": "mean"}.get(row["method"], "applied + residual")
        assert len(row["seconds"]) == 2
        assert row["best_s"] <= row["median_s"]
        assert row["received_bytes"] is None
        assert len(row["buckets"]) > 1


def test_the_table_and_its_markdown_hold_every_method(rows: list[dict]) -> None:
    console = Console(width=200, record=True, file=StringIO())
    console.print(gradients_table(rows))
    text, markdown = console.export_text(), gradients_markdown(rows)
    for row in rows:
        assert row["title"] in text
        assert row["title"] in markdown
    assert len(markdown.splitlines()) == len(rows) + 2


def report_of(digests: list[str], error: float, **step: object) -> dict:
    full = {"seconds": 1.0, "cpu_s": 0.5, "received": 100, "sent": 100, "own": None} | step
    checks = {"law": "mean", "error": error}
    return {
        "method": "fp32", "steps": [full], "checks": checks, "digests": digests, "theory_bytes": 100.0, "numel": 25,
        "buckets": [25],
    }  # fmt: skip


def test_the_slowest_rank_counts_and_bytes_are_means() -> None:
    ranks = [report_of(["a"], 0.5, seconds=1.0, received=90), report_of(["a"], 0.5, seconds=3.0, received=110)]
    row = summarise(ranks, "1gbit")
    assert (row["median_s"], row["received_bytes"], row["received_bytes_max"]) == (3.0, 100, 110)
    assert row["dense_bytes"] == 100
    assert row["share_of_dense"] == 1
    assert row["theory_s"] == pytest.approx(800e-9)


def test_a_wrong_result_has_no_time() -> None:
    with pytest.raises(WrongResultError, match="different results"):
        summarise([report_of(["a"], 0.0), report_of(["b"], 0.0)], None)
    for error in (1.5, float("nan")):
        with pytest.raises(WrongResultError, match="mean is off"):
            summarise([report_of(["a"], 0.0), report_of(["a"], error)], None)


LYING = """
import sys, torch
from thinwire.bench import gradients_methods, gradients_worker
from thinwire.bench.gradients_exchange import Method
from thinwire.bench.gradients_peers import AllGatherTopK, NoOp
class Forgetful(AllGatherTopK):
    def residual(self):
        return super().residual() * 0.5
class Local(NoOp):
    pass
make = {"forgets": lambda density: Forgetful(density), "local": lambda _: Local()}
for name in make:
    gradients_methods.METHODS[name] = Method(name, name, make[name], lambda p, b, d: 0.0)
gradients_worker.main(sys.argv[1:])
"""


def test_verification_finds_who_loses_gradients_or_does_not_average(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("lying.py").write_text(LYING)
    options = GradientOptions(("forgets", "local"), repeats=1, width=2)
    forgets, local = zip(*launch("lying", [options.dumps()], ranks=2), strict=True)
    for name in ("forgets", "local"):
        monkeypatch.setitem(METHODS, name, METHODS["noop"])
    with pytest.raises(WrongResultError, match="is off"):
        summarise(forgets, None)
    with pytest.raises(WrongResultError, match="different results"):
        summarise(local, None)


# The stand-in for DDP's bucket leads the hooks to the same bits as DDP itself does.
AS_DDP = """
import json, sys, torch, torch.distributed as dist
from thinwire.bench.gradients_exchange import exchange_all
from thinwire.bench.gradients_methods import choose
from thinwire.bench.gradients_workload import Workload
from thinwire.bench.gradients_worker import joined
from thinwire.bench.net.launch import deliver
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

class Model(torch.nn.Module):
    def __init__(self, shapes):
        super().__init__()
        self.parts = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(s)) for s in shapes])
    def forward(self, wanted):
        return sum((part * g).sum() for part, g in zip(self.parts, wanted))

same = {}
with joined(60):
    shapes = [(30, 40), (40,), (64, 50), (7,)]
    for method in choose("fp32,fp16,powersgd-1,powersgd-2"):
        workload = Workload(shapes, 25, dist.get_rank(), 0)
        exchange = method.make(0.01)
        model = Model(shapes)
        ddp = torch.nn.parallel.DistributedDataParallel(model)
        state = method.make(0.01)
        ddp.register_comm_hook(state._state, state._hook)
        equal = True
        for step in range(5):
            workload.fill(step)
            (bucket,) = workload.buckets
            wanted = [g.clone() for g in reversed(bucket.gradients())]
            for part in model.parts:
                part.grad = None
            ddp(wanted).backward()
            exchange_all(exchange, workload.buckets)
            mine = list(reversed(bucket.gradients()))
            equal = equal and all(torch.allclose(p.grad, g, rtol=1e-5, atol=1e-9) for p, g in zip(model.parts, mine))
        same[method.name] = equal
deliver(same)
"""


def test_a_hook_does_to_our_buckets_what_it_does_under_ddp() -> None:
    Path("as_ddp.py").write_text(AS_DDP)
    wanted = dict.fromkeys(("fp32", "fp16", "powersgd-1", "powersgd-2"), True)
    assert launch("as_ddp", ranks=2, timeout_s=120) == [wanted, wanted]


# --- choosing, theory, command -------------------------------------------------------------------------------------


def test_methods_are_chosen_by_name_and_group() -> None:
    assert [method.name for method in choose("fp16, fp32,fp16")] == ["fp16", "fp32"]
    assert {method.name for method in choose("all")} == set(METHODS)
    assert not {m.name for m in choose("ours")} & {m.name for m in choose("baselines")}
    with pytest.raises(MisuseError, match="no method 'fp8'"):
        choose("fp8")


def test_theory_is_what_the_papers_say() -> None:
    workload = Workload(resnet50_shapes(4), 25, 0, 0)
    numel, buckets = workload.numel, workload.buckets
    assert METHODS["fp32"].theory(4, buckets, 0.01) == pytest.approx(1.5 * 4 * numel)
    assert METHODS["fp16"].theory(4, buckets, 0.01) == pytest.approx(1.5 * 2 * numel)
    assert METHODS["allgather"].theory(4, buckets, 0.01) == pytest.approx(3 * 8 * 0.01 * numel, rel=0.01)
    assert METHODS["powersgd-1"].theory(4, buckets, 0.01) < METHODS["powersgd-2"].theory(4, buckets, 0.01) < numel
    assert ring(1, 100) == 0


def test_without_root_the_command_says_so_and_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlowNetwork, "why_not", staticmethod(lambda: "it needs root"))
    done = CliRunner().invoke(app, ["gradients", "--methods", "noop"])
    assert done.exit_code == 0
    assert "skipped: it needs root" in done.stdout


def test_the_command_prints_rows(monkeypatch: pytest.MonkeyPatch, rows: list[dict]) -> None:
    asked: list[object] = []
    monkeypatch.setattr(gradients, "run_gradients", lambda *given, **_: asked.append(given) or rows)
    done = CliRunner().invoke(app, ["gradients", "--rate", "loopback", "--methods", "baselines", "--json"])
    assert done.exit_code == 0, done.output
    assert [json.loads(line)["method"] for line in done.stdout.splitlines()] == list(METHODS)
    ((options, workers, rate),) = asked
    assert (workers, rate, options.bucket_mb) == (8, None, 25)
    assert CliRunner().invoke(app, ["gradients", "--help"]).exit_code == 0


@pytest.mark.net
@pytest.mark.skipif(SlowNetwork.why_not() is not None, reason=f"no slow network here: {SlowNetwork.why_not()}")
def test_bytes_on_the_line_are_those_of_the_arithmetic() -> None:
    found = run_gradients(GradientOptions(tuple(METHODS), density=0.05, repeats=2, width=8), 3, "1gbit")
    small = 40_000  # headers and acknowledgements of small messages
    for row in found:
        if row["accounted_bytes"] is not None:
            assert row["accounted_bytes"] <= row["received_bytes"] < 1.1 * row["accounted_bytes"] + small
        if not METHODS[row["method"]].ours:
            assert 0.99 * row["theory_bytes"] <= row["received_bytes"] < 1.1 * row["theory_bytes"] + small
            assert row["best_s"] >= 0.7 * row["theory_s"]  # no faster than the line


# --- the rows that are kept ----------------------------------------------------------------------------------------

KEPT = Path(__file__).resolve().parents[2] / "bench" / "results"


def kept(name: str) -> list[dict]:
    return [json.loads(line) for line in (KEPT / name).read_text().splitlines()]


@pytest.mark.parametrize(("bucket_mb", "fp32", "fp16"), [(25, 10, 5), (0, 15, 9)])
def test_on_cores_of_their_own_workers_are_as_much_faster_as_is_claimed(
    bucket_mb: float, fp32: float, fp16: float
) -> None:
    found = {row["method"]: row for row in kept("gradients-8x1gbit.jsonl") if row["options"]["bucket_mb"] == bucket_mb}
    assert set(found) == set(METHODS)
    for name in ("split", "shared", "auto", "split-bf16", "shared-bf16", "auto-bf16"):
        assert found["fp32"]["median_s"] / found[name]["median_s"] > fp32
        assert found["fp16"]["median_s"] / found[name]["median_s"] > fp16


def test_received_bytes_are_as_small_as_is_claimed() -> None:
    bars = {"split": 0.03, "shared": 0.017, "split-bf16": 0.009, "shared-bf16": 0.009}
    found = [row for row in kept("gradients-bytes.jsonl") if row["method"] in bars]
    assert {row["workers"] for row in found} == {2, 4, 8, 16}
    for row in found:
        assert row["received_bytes"] / row["dense_bytes"] < bars[row["method"]]
