"""The federated bench: its runs are Flower's, its bytes are the messages', its sums are what they are called."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr", reason="Flower is not installed")

from thinwire.bench.federated import Devices, FederatedRun, federate, run_all
from thinwire.bench.federated_methods import METHODS, Settings, method_of
from thinwire.bench.federated_report import federated_figure, federated_markdown, summarise
from thinwire.bench.inversion import InversionOptions, inversion_figure, run_inversion
from thinwire.errors import MisuseError
from thinwire.lab.federated.learning import evaluate, learn, world_of

SMALL = FederatedRun(method="fedavg", clients=3, rounds=2, train=120, test=60, partition="iid", batch=8)


pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_round_of_fedavg_is_the_mean_of_what_the_clients_learned() -> None:
    run = replace(SMALL, rounds=1)
    row = federate(run)
    world = world_of(run.federation(None))
    total: dict[str, torch.Tensor] = {}
    count = sum(len(client.targets) for client in world.clients)
    for i, client in enumerate(world.clients):
        model = world.model(run.seed)
        seed = hash((run.seed, 1, 2 + i)) & 0x7FFFFFFF
        learn(model, client, epochs=run.epochs, batch=run.batch, lr=run.lr, seed=seed)
        for name, weight in model.state_dict().items():
            total[name] = total.get(name, torch.zeros_like(weight)) + weight * (len(client.targets) / count)
    model.load_state_dict(total)
    score = evaluate(model, world.test_inputs, world.test_targets)
    assert row["points"][-1]["loss"] == pytest.approx(score.loss, rel=1e-4)
    assert row["points"][0]["up"] == row["points"][0]["down"] == 0
    assert row["points"][1]["up"] > 3 * 4 * row["parameters"]


def test_a_run_repeated_gives_the_same_row() -> None:
    run = replace(SMALL, method="sparsesync", settings=Settings(density=0.05))
    one, other = federate(run), federate(run)
    for row in (one, other):
        row.pop("seconds")
        for point in row["points"]:
            for way in ("up", "down", "clock_s"):  # Flower writes times into messages
                point[way] = round(point[way], -2)
        row["sent"] = {kind: nbytes for kind, nbytes in row["sent"].items() if not kind.endswith("header")}
    assert one == other
    assert one["fairness"]["worst"] <= one["fairness"]["mean"]
    assert len(one["fairness"]["accuracies"]) == 3


def test_bytes_are_those_of_the_messages() -> None:
    row = federate(replace(SMALL, method="sparsesync", settings=Settings(density=0.05)))
    last = row["points"][-1]
    assert sum(row["sent"].values()) == last["up"] + last["down"]
    assert row["sent"]["client/up/update"] < 0.2 * 4 * row["parameters"] * 6


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"fedavg", "sparsesync"}))
def test_every_method_trains(method: str) -> None:
    settings = Settings(density=0.1, down_density=0.2)
    row = federate(replace(SMALL, method=method, clients=2, rounds=1, train=40, settings=settings))
    assert row["points"][-1]["loss"] < 10
    assert row["points"][-1]["up"] > 0


def test_what_is_there_is_not_run_again(tmp_path: Path) -> None:
    runs = [replace(SMALL, seed=seed, rounds=1, train=60) for seed in (0, 1)]
    rows = run_all(runs, tmp_path)
    done: list[str] = []
    again = run_all([*runs, replace(runs[0], seed=2)], tmp_path, on_done=lambda row: done.append(row["id"]))
    assert [row["seconds"] for row in again[:2]] == [row["seconds"] for row in rows]
    assert len(done) == 3
    assert len({run.id for run in runs}) == 2
    with pytest.raises(MisuseError):
        run_all(runs, tmp_path, jobs=0)


def test_devices_are_slow_on_a_virtual_clock_and_answers_may_be_lost() -> None:
    fast, slow = (federate(replace(SMALL, devices=Devices(mbit=mbit, compute_s=0.01))) for mbit in (100.0, 0.1))
    assert slow["points"][-1]["clock_s"] > 5 * fast["points"][-1]["clock_s"] > 0
    assert slow["points"][-1]["accuracy"] == fast["points"][-1]["accuracy"]
    lossy = federate(replace(SMALL, rounds=4, devices=Devices(dropout=0.5)))
    assert 0 < lossy["lost"] < 12


def made_up(method: str, seed: int, accuracy: float, up: int) -> dict[str, Any]:
    points = [
        {
            "round": turn,
            "loss": 1.0,
            "accuracy": accuracy * turn / 4,
            "up": up * turn,
            "down": up * turn,
            "clock_s": 60 * turn,
        }
        for turn in range(5)
    ]
    return {
        "method": method, "seed": seed, "points": points, "parameters": 100, "data": "digits", "clients": 10,
        "partition": "iid", "rounds": 4, "epochs": 1, "settings": {"density": 0.01},
        "fairness": {"worst": accuracy / 2, "mean": accuracy},
    }  # fmt: skip


def test_methods_are_compared_within_seeds_at_equal_rounds_and_at_equal_bytes(tmp_path: Path) -> None:
    rows = [made_up("fedavg", seed, 0.8 + 0.1 * seed, 4000) for seed in (0, 1)]
    rows += [made_up("sparsesync", seed, 0.75 + 0.1 * seed, 40) for seed in (0, 1)]
    dense, sparse = summarise(rows)
    assert sparse["below"] == pytest.approx(0.05 * (2 + 3 + 4) / 12)
    assert sparse["below_error"] == pytest.approx(0.0, abs=1e-12)
    assert (sparse["up"], sparse["total"]) == (100, 100)
    assert dense["equal_bytes"] == 0.0  # it has not paid for a round yet
    assert sparse["equal_bytes"] == pytest.approx(0.8)
    text = federated_markdown(rows)
    assert "| sparsesync | 2 |" in text
    assert "1/100" in text
    federated_figure(rows, tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_wrong_is_refused_and_the_nearest_method_named() -> None:
    with pytest.raises(MisuseError, match="did you mean fedavg"):
        method_of("fedav")
    for wrong in ({"rounds": 0}, {"lr": 0.0}, {"method": "x"}, {"settings": Settings(participation=0.0)}):
        with pytest.raises(MisuseError):
            replace(SMALL, **wrong)


def test_pictures_are_attacked_at_every_density(tmp_path: Path) -> None:
    options = InversionOptions("digits", 2, (1.0, 0.05), (1,), iterations=20, public=64, epochs=2)
    rows, pictures = run_inversion(options)
    assert [(row["attack"], row["density"]) for row in rows] == [
        (attack, density) for density in (1.0, 0.05) for attack in ("class mean", "naive", "mask-aware", "learned")
    ]
    assert all(picture.shape == (2, 1, 8, 8) for picture in pictures.values())
    assert json.loads(json.dumps(rows)) == json.loads(json.dumps(rows))
    inversion_figure(pictures, tmp_path / "i.png", shown=2)
    assert (tmp_path / "i.png").stat().st_size > 1000
