"""Which runs a configuration means, and what it may not say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from thinwire.errors import MisuseError
from thinwire.lab.study.matrix import LEVELS, Run, read_study, study_of

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize(("name", "runs", "conditions"), [("study", 325, 65), ("study-smollm2", 15, 3)])
def test_the_configurations_that_are_shipped_are_read(name: str, runs: int, conditions: int) -> None:
    study = read_study(CONFIGS / f"{name}.yaml")
    assert len(study.runs) == len(set(study.runs)) == runs
    assert len({run.condition for run in study.runs}) == conditions
    assert all(study.lr(run) > 0 for run in study.runs)
    assert len(read_study(CONFIGS / "study-hub.yaml").runs) > 100


def test_blocks_are_crosses_around_the_centre_and_runs_are_made_once() -> None:
    study = study_of({
        "centre": {"steps": 5, "lr": "low"}, "seeds": [3, 4],
        "vary": [{"objective": ["rl", "sft"], "lr": list(LEVELS)}, {"lr": "low"}, {"size": "large", "seed": [0]}],
    })  # fmt: skip
    assert len(study.runs) == 2 * 3 * 2 + 1
    assert study.runs[-1] == Run(steps=5, lr="low", size="large", seed=0)
    assert study.lr(study.runs[0]) == 1e-6


def test_an_id_hangs_on_all_that_a_result_does_and_on_nothing_else() -> None:
    one = study_of({"centre": {"steps": 5}})
    run = one.runs[0]
    same = study_of({"centre": {"steps": 5, "lr": "mid"}, "seeds": [0, 1], "vary": [{"objective": ["sft", "rl"]}]})
    assert one.id(run) == same.id(run)
    others = [
        one.id(replace(run, seed=1)),
        study_of({"lrs": {"adamw": [1e-6, 2e-5, 1e-4]}}).id(run),
        study_of({"sizes": {"mid": {"hidden": 64, "layers": 3}}}).id(run),
        study_of({"tasks": {"chain_sum": {"max_terms": 3}}}).id(run),
    ]
    assert len({one.id(run), *others}) == 5


WRONG = [
    ({"centr": {}}, "did you mean centre"),
    ({"centre": {"optimizer": "adam"}}, "did you mean optimiser"),
    ({"centre": {"optimiser": "adamv"}}, "did you mean adam"),
    ({"centre": {"steps": 0}}, "whole number"),
    ({"centre": {"density": 2.0, "enforce": "random"}}, "share above 0"),
    ({"centre": {"enforce": "random"}}, "go together"),
    ({"vary": [{"control": "shuffled", "objective": "sft"}]}, "objective rl"),
    ({"vary": [{"size": "huge"}]}, "no size"),
    ({"vary": [{"lr": []}]}, "empty list"),
    ({"vary": {"lr": "low"}}, "is a list|are lists"),
    ({"seeds": []}, "is a list|are lists"),
    ({"lrs": {"adam": [1, 2]}}, "three numbers"),
    ({"lrs": {"lion": [1, 2, 3]}}, "no optimiser"),
    ({"sizes": [1]}, "no mapping"),
    ({"seeds": list(range(200)), "vary": [{"steps": list(range(1, 200))}]}, "more than 20000"),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_wrong_configurations_are_refused(values: dict, message: str) -> None:
    with pytest.raises(MisuseError, match=message):
        study_of(values)
