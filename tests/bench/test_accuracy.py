"""The accuracy benchmark: it trains, its controls are what they say, its figures add up."""

from __future__ import annotations

import pytest

from thinwire.bench.accuracy import VARIANTS, AccuracyOptions, matrix, run_accuracy, summarise
from thinwire.bench.accuracy_report import accuracy_figure, accuracy_markdown
from thinwire.errors import MisuseError
from thinwire.lab.vision.data import load_images

QUICK = AccuracyOptions(workers=2, epochs=2, batch=32, rate=0.05, density=0.05, density_warmup=0.2)


def test_all_variants_train_and_report(tmp_path) -> None:
    images = load_images("digits").first(600, 100)
    rows = [run_accuracy(options, images) for options in matrix(QUICK, VARIANTS, [0.9], 1)]
    by_variant = {row["variant"]: row for row in rows}
    assert by_variant["dense"]["received_share"] == 1
    assert by_variant["feedback"]["received_share"] < 0.2
    assert by_variant["feedback"]["residual_norms"][-1] > 0
    assert by_variant["no feedback"]["residual_norms"] == [0.0, 0.0]
    assert by_variant["averaged residual"]["residual_norms"][-1] > by_variant["feedback"]["residual_norms"][-1]
    again = run_accuracy(matrix(QUICK, ["feedback"], [0.9], 1)[0], images)
    assert again["accuracies"] == by_variant["feedback"]["accuracies"], "a run is repeatable"
    accuracy_figure(rows, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    assert "averaged residual" in accuracy_markdown(rows)


def test_at_full_density_feedback_is_dense_training() -> None:
    images = load_images("digits").first(300, 100)
    options = AccuracyOptions(workers=2, epochs=1, batch=32, density=1.0)
    dense, feedback = (run_accuracy(o, images) for o in matrix(options, ["dense", "feedback"], [0.0], 1))
    assert dense["accuracies"] == feedback["accuracies"]


def test_the_summary_compares_seed_by_seed() -> None:
    rows = [
        {"variant": variant, "skew": 0.9, "seed": seed, "accuracy": accuracy, "received_share": 1.0}
        for variant, found in {"dense": (0.9, 0.8), "feedback": (0.89, 0.81)}.items()
        for seed, accuracy in enumerate(found)
    ]
    dense, feedback = summarise(rows)
    assert dense["below_dense"] == 0
    assert feedback["below_dense"] == pytest.approx(0.0, abs=1e-9)
    assert feedback["below_error"] == pytest.approx(1.0)


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(MisuseError, match="feedback"):
        run_accuracy(AccuracyOptions(variant="magic"), load_images("digits"))
