"""The tracker counts what changed, whatever happens to the model on the way, and goes on where it was."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from itertools import pairwise
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from tests.probe.models import TinyLM, backward
from thinwire.errors import MisuseError
from thinwire.probe import changes as changes_module
from thinwire.probe import snapshots as snapshots_module
from thinwire.probe.changes import Changes, compare
from thinwire.probe.null import predict_null
from thinwire.probe.statistics import LagStats
from thinwire.probe.tracker import SparsityTracker

BF16 = torch.bfloat16


def moved(named: dict[str, torch.Tensor], step: int, share: float = 0.1) -> None:
    """Change about a share of all elements by a little."""
    generator = torch.Generator().manual_seed(step)
    for tensor in named.values():
        where = torch.rand(tensor.shape, generator=generator) < share
        tensor.data.copy_(torch.where(where, tensor * 1.05 + 1e-3, tensor))


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "layers.0.self_attn.q_proj.weight": (30, 20),
        "layers.1.mlp.up_proj.weight": (17, 9),
        "norm.weight": (11,),
    }
    return {name: torch.randn(shape, generator=generator).to(BF16) for name, shape in shapes.items()}


@pytest.mark.parametrize("every", [1, 2, 3, 5, 10])
def test_every_lag_is_compared_with_the_state_of_so_many_steps_ago(every: int) -> None:
    named = weights()
    states = [copy.deepcopy(named)]
    tracker = SparsityTracker(named, lags=(1, 3, 8), every=every)
    seen = set()
    for step in range(1, 49):
        moved(named, step)
        states.append(copy.deepcopy(named))
        stats = tracker.step(step)
        for lag, found in stats.lags.items():
            seen.add((lag, step))
            for name, changes in found.tensors.items():
                right = compare(states[step - lag][name], states[step][name])
                assert changes == right
            assert found.total.elements == sum(t.numel() for t in named.values())
    for lag in (1, 3, 8):
        due = {step for step in range(1, 49) if step % (lag * -(-every // lag)) == 0}
        assert {step for other, step in seen if other == lag} == due


def test_parts_add_up_and_fast_mode_counts_the_same() -> None:
    named = weights()
    exact, fast = SparsityTracker(named, lags=(1,)), SparsityTracker(named, mode="fast")
    for step in range(1, 5):
        moved(named, step)
        a, b = exact.step(), fast.step()
        assert a.step == step
        assert a.changed == b.changed > 0
        assert (a.sparsity, a.density) == (1 - a.density, a.shortest.total.above / 764)
        assert isnan(b.update_ratio)
        assert 0 < a.update_ratio < 1
        for parts in (a.tensors, a.kinds, a.layers):
            assert sum(c.changed for c in parts.values()) == a.changed
        assert list(a.kinds) == ["attention", "mlp", "norm"]
        assert list(a.layers) == ["", "0", "1"]
        assert sum(a.ulps) == a.changed
        assert a.seconds > 0
    assert exact.nbytes == 2 * 764
    assert fast.nbytes == 764
    assert fast.lags == (1,)
    assert SparsityTracker(named).lags == (1, 8, 32)


def test_limits_and_views() -> None:
    named = {"w": torch.ones(100)}
    tracker = SparsityTracker(named, lags=(1,), threshold=0.01)
    viewed = SparsityTracker(named, lags=(1,), view=BF16)
    named["w"][:50] += 0.001  # rounds to 1.0 in bf16
    named["w"][0] += 0.5
    assert (tracker.step().shortest.total.above, viewed.step().changed) == (1, 1)
    assert viewed.nbytes == 200


def test_marks() -> None:
    named = weights()
    tracker = SparsityTracker(named, lags=(1,))
    tracker.mark("start")
    first = copy.deepcopy(named)
    for step in range(5):
        moved(named, step)
        tracker.step()
    found = tracker.since("start")
    assert found.lag == 5
    assert found.tensors == {n: compare(first[n], named[n]) for n in named}
    assert tracker.since("start").tensors == found.tensors  # a mark stays
    del named["norm.weight"]
    assert "norm.weight" not in tracker.since("start").tensors
    with pytest.raises(MisuseError, match="start"):
        tracker.since("nothing")


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_models_that_change_their_shape_on_the_way(mode: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight  # tied: counted once
    model[1].bias.requires_grad_(False)
    tracker = SparsityTracker(model, mode=mode, lags=(1,), frequency=True)

    def step(change: Callable[[], Any]) -> Any:
        with torch.no_grad():
            change()
        return tracker.step()

    stats = step(lambda: model[0].weight.add_(1))
    assert set(stats.tensors) == {"0.weight", "0.bias"}
    assert stats.changed >= 15
    stats = step(lambda: model[1].bias.requires_grad_(True))  # thawed
    assert (stats.added, set(stats.tensors)) == (("1.bias",), {"0.weight", "0.bias"})
    stats = step(lambda: model[1].bias.add_(1))
    assert stats.tensors["1.bias"].changed == 4
    stats = step(lambda: model.append(torch.nn.Linear(4, 2, bias=False)))
    assert stats.added == ("2.weight",)
    stats = step(lambda: setattr(model[2], "weight", torch.nn.Parameter(torch.ones(3, 4))))
    assert (stats.restarted, "2.weight" in stats.tensors) == (("2.weight",), False)
    stats = step(lambda: model[2].weight.mul_(2))
    assert stats.tensors["2.weight"].elements == 12
    stats = step(lambda: model.pop(2))
    assert (stats.removed, set(stats.tensors)) == (("2.weight",), {"0.weight", "0.bias", "1.bias"})
    stats = step(lambda: model[0].weight.fill_(float("nan")))
    assert stats.tensors["0.weight"].changed >= 15
    assert step(lambda: None).changed == 0  # NaN stays NaN
    stats = step(lambda: model.to(torch.bfloat16))
    assert set(stats.restarted) == {"0.weight", "0.bias", "1.bias"}
    assert (stats.lags[1].tensors, stats.changed) == ({}, 0)
    with pytest.raises(MisuseError):
        step(lambda: model.to("meta"))


def test_snapshots_follow_a_tensor_to_another_device() -> None:
    named = {"w": torch.ones(10)}
    tracker = SparsityTracker(named, lags=(1,))
    with torch.device("cpu"):
        named["w"] = named["w"].clone()  # other memory, the same values
    assert tracker.step().changed == 0
    named["w"][2] = 5
    assert tracker.step().changed == 1


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_the_way_of_devices_gives_the_same_answers(monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    named = weights() | {"wide": torch.randn(300, generator=torch.Generator().manual_seed(3))}
    found = []
    for device in (False, True):
        state = copy.deepcopy(named)
        with monkeypatch.context() as patched:
            if device:  # as if the tensors were not on the host
                patched.setattr(changes_module, "is_host_view", lambda tensor: False)
                patched.setattr(snapshots_module, "is_host_view", lambda tensor: False)
            tracker = SparsityTracker(state, mode=mode, lags=(1,), spatial=True)
            viewed = SparsityTracker(state, mode=mode, lags=(1,), view=BF16)
            for step in range(4):
                moved(state, step)
                total, other = tracker.step().shortest.total, viewed.step().shortest.total
                found.append((total.elements, total.changed, total.ulps, other.changed, other.ulps))
    assert found[:4] == found[4:]


def test_tensors_that_come_later_have_no_null() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(30, 30, bias=False))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    tracker = SparsityTracker(model, optimizer=optimizer, null=True, view=BF16, lags=(1,))
    before = tracker.step().null
    model.append(torch.nn.Linear(30, 300))
    tracker.step()
    with torch.no_grad():
        model[1].weight.add_(1.0)
    stats = tracker.step()
    assert stats.changed == 9000
    assert before is not None
    assert stats.null is not None
    assert stats.excess is not None
    assert stats.null > 0.2 * before > 0  # of the first tensor alone
    assert stats.excess.observed == 0


def test_what_cannot_be_measured_is_refused() -> None:
    model = torch.nn.Linear(3, 3)
    named = {"w": torch.ones(3)}
    bad: list[dict[str, Any]] = [
        {"mode": "slow"}, {"lags": ()}, {"lags": (0,)}, {"every": 0}, {"threshold": -1.0}, {"null": True},
        {"mode": "fast", "threshold": 1.0}, {"null": True, "optimizer": torch.optim.SGD([torch.ones(3)])},
    ]  # fmt: skip
    for case in bad:
        with pytest.raises(MisuseError):
            SparsityTracker(model, **case)
    for nothing in ({}, {"w": 3}, torch.nn.Linear(3, 3).requires_grad_(False)):
        with pytest.raises(MisuseError):
            SparsityTracker(nothing)  # type: ignore[arg-type]
    assert SparsityTracker(torch.nn.Linear(3, 3).requires_grad_(False), frozen=True).step().changed == 0
    with pytest.raises(MisuseError, match="spatial"):
        SparsityTracker(named).structure("w")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = SparsityTracker(model, optimizer=optimizer, null=True)
    with pytest.raises(MisuseError, match="zero_grad"):
        tracker.step()
    empty = SparsityTracker([("w", torch.ones(0)), ("v", torch.tensor(1.0)), ("i", torch.arange(3))]).step()
    assert (empty.changed, empty.sparsity) == (0, 1.0)
    waiting = SparsityTracker(named, lags=(4,)).step()
    assert isnan(waiting.sparsity)
    assert (waiting.changed, waiting.null, waiting.excess, waiting.tensors) == (0, None, None, {})


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_a_run_goes_on_elsewhere(mode: Any) -> None:
    def run(tracker: SparsityTracker, model: TinyLM, optimizer: Any, first: int, last: int) -> list[Any]:
        found = []
        for step in range(first, last):
            backward(model, step)
            optimizer.step()
            stats = tracker.step(step)
            found.append({lag: (s.tensors, s.null) for lag, s in stats.lags.items()})
        return found

    def start(model: TinyLM) -> tuple[SparsityTracker, Any]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        options = {"mode": mode, "lags": (1, 3), "view": BF16, "null": True, "frequency": True, "sample": 2000}
        return SparsityTracker(model, optimizer=optimizer, **options), optimizer

    model = TinyLM(width=16, layers=1)
    tracker, optimizer = start(model)
    tracker.mark("start")
    run(tracker, model, optimizer, 1, 6)
    file = io.BytesIO()
    torch.save({"t": tracker.state_dict(), "m": model.state_dict(), "o": optimizer.state_dict()}, file)
    whole = run(tracker, model, optimizer, 6, 12)
    file.seek(0)
    state = torch.load(file, weights_only=False)
    other = TinyLM(width=16, layers=1, seed=5)
    second, second_optimizer = start(other)
    other.load_state_dict(state["m"])
    second_optimizer.load_state_dict(state["o"])
    second.load_state_dict(state["t"])
    assert repr(run(second, other, second_optimizer, 6, 12)) == repr(whole)  # NaN equals NaN in text
    assert repr(second.since("start")) == repr(tracker.since("start"))
    assert second.frequency is not None
    assert tracker.frequency is not None
    for name, counts in second.frequency.items():
        assert np.array_equal(counts.counts, tracker.frequency[name].counts)


def test_a_tracker_of_other_weights_is_refused() -> None:
    named = weights()
    state = SparsityTracker(named, lags=(1,)).state_dict()
    with pytest.raises(MisuseError, match="another"):
        SparsityTracker(named, lags=(1, 2)).load_state_dict(state)
    with pytest.raises(MisuseError, match=r"differ in norm\.weight"):
        SparsityTracker({n: t for n, t in named.items() if n != "norm.weight"}, lags=(1,)).load_state_dict(state)
    with pytest.raises(MisuseError, match="saved snapshot"):
        SparsityTracker(named | {"norm.weight": torch.ones(12, dtype=BF16)}, lags=(1,)).load_state_dict(state)
    tracker = SparsityTracker(named, lags=(1,))
    before = tracker.state_dict()["kept"][1]["norm.weight"]["digest"]
    state["kept"][1]["norm.weight"]["kept"][0] += 1
    with pytest.raises(MisuseError, match="bytes"):
        tracker.load_state_dict(state)
    assert tracker.state_dict()["kept"][1]["norm.weight"]["digest"] == before  # nothing was taken over


@pytest.mark.parametrize("view", [None, BF16], ids=["bf16", "masters"])
def test_the_null_of_a_first_step_explains_it(view: torch.dtype | None) -> None:
    model = TinyLM() if view else TinyLM().to(BF16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    tracker = SparsityTracker(model, optimizer=optimizer, null=True, view=view, lags=(1,))
    backward(model, 0)
    optimizer.step()
    stats = tracker.step()
    assert stats.null is not None
    assert stats.excess is not None
    assert abs(stats.excess.value) < 0.012  # gradients that are 0 and the sample's own error
    assert stats.excess.low < stats.excess.value < stats.excess.high
    assert stats.shortest.null_step is not None
    assert stats.shortest.null_of(["head.weight"]) == pytest.approx(stats.shortest.null_step.tensors["head.weight"])


def test_learning_stands_out_from_the_null_and_noise_does_not() -> None:
    found = {}
    for meaning in (True, False):
        model = TinyLM(width=32, layers=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
        tracker = SparsityTracker(model, optimizer=optimizer, null=True, view=BF16, lags=(1, 16), sample=30_000)
        generator = torch.Generator().manual_seed(9)
        for step in range(32):
            backward(model, step)
            if not meaning:
                for p in model.parameters():
                    assert p.grad is not None
                    p.grad = torch.randn(p.shape, generator=generator) * p.grad.norm() / p.numel() ** 0.5
            optimizer.step()
            stats = tracker.step()
        found[meaning] = stats
    learnt, noise = found[True].lags[16].excess, found[False].lags[16].excess
    assert learnt is not None
    assert noise is not None
    assert learnt.value > 0.1
    assert learnt.significant
    assert abs(noise.value) < 0.03


def test_masters_that_the_model_does_not_hold() -> None:
    model = TinyLM(width=32, layers=1).to(BF16)
    masters = {name: p.detach().float() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(list(masters.values()), lr=1e-5)
    tracker = SparsityTracker(model, optimizer=optimizer, null=True, masters=masters, lags=(1,))
    expected = predict_null(masters, optimizer=optimizer, view=BF16).fraction
    backward(model, 0)
    for name, p in model.named_parameters():
        assert p.grad is not None
        masters[name].grad = p.grad.float()
    optimizer.step()
    for name, p in model.named_parameters():
        p.data.copy_(masters[name])
    stats = tracker.step()
    assert stats.null == pytest.approx(expected, abs=0.01)
    assert stats.density == pytest.approx(expected, abs=0.01)


def test_an_optimiser_of_ones_own_and_schedules() -> None:
    class Own(torch.optim.SGD):
        def __init__(self, groups: Any, secret: int) -> None:
            super().__init__(groups, lr=0.1)

    model = torch.nn.Linear(30, 30).to(BF16)
    optimizer = Own(model.parameters(), secret=1)
    with pytest.raises(MisuseError, match="callable"):
        SparsityTracker(model, optimizer=optimizer, null=True)
    tracker = SparsityTracker(
        model, optimizer=optimizer, null=lambda groups: Own(groups, 1), gradient_rms={"weight": 1.0}
    )
    assert (tracker.step().null or 0) > 0.5
    optimizer.param_groups[0]["lr"] = 0.0  # the null follows the schedule
    assert tracker.step().null == 0


def test_a_tracker_that_comes_late_meets_an_optimiser_at_work() -> None:
    model = TinyLM(width=32, layers=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    for step in range(40):
        backward(model, step)
        optimizer.step()
    late = SparsityTracker(model, optimizer=optimizer, null=True, view=BF16, lags=(1,)).step().null
    fresh = torch.optim.Adam(model.parameters(), lr=1e-5)
    early = SparsityTracker(model, optimizer=fresh, null=True, view=BF16, lags=(1,)).step().null
    assert late is not None
    assert early is not None
    assert late < 0.6 * early


def test_counters_positions_rows_and_figures(tmp_path: Path) -> None:
    named = weights()
    tracker = SparsityTracker(named, lags=(1,), frequency=True, spatial=True, log=tmp_path / "run.jsonl")
    states = [copy.deepcopy(named)]
    for step in range(6):
        moved(named, step, share=0.3)
        states.append(copy.deepcopy(named))
        tracker.step(step)
    assert tracker.frequency is not None
    for name, counter in tracker.frequency.items():
        changed = [a[name].view(torch.int16) != b[name].view(torch.int16) for a, b in pairwise(states)]
        assert np.array_equal(counter.counts, torch.stack(changed).sum(dim=0).flatten().numpy())
    name = "layers.0.self_attn.q_proj.weight"
    found = tracker.structure(name, heads=5)
    assert found.changed == int((states[-1][name].view(torch.int16) != states[-2][name].view(torch.int16)).sum())
    assert found.heads is not None
    tracker.save(tmp_path / "run.parquet")
    tracker.plot(tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "run.parquet").stat().st_size > 0


def _rank(rank: int, size: int, folder: str) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    whole = torch.arange(40.0).view(10, 4).to(BF16)
    parameter = torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    optimizer = torch.optim.Adam([parameter], lr=1e-3)
    tracker = SparsityTracker({"w": parameter}, optimizer=optimizer, null=True, lags=(1,))
    with torch.no_grad():
        parameter.to_local()[0, : 1 + rank] += 1.0
    stats = tracker.step()
    assert stats.shortest.total.elements == 20
    assert stats.changed == 1 + rank
    both = stats.reduce()
    assert (both.shortest.total.elements, both.changed) == (40, 3)
    assert both.null is not None
    torch.save(both, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_shards_add_up_over_ranks(tmp_path: Path) -> None:
    mp.start_processes(_rank, args=(2, str(tmp_path)), nprocs=2, start_method="fork")
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    assert both[0].lags == both[1].lags


def test_sums_of_nothing() -> None:
    nothing = LagStats(1, {}, {})
    assert nothing.total == Changes()
    assert (nothing.kinds, nothing.layers, nothing.null_of([])) == ({}, {}, None)
