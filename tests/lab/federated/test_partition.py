"""Shards are disjoint, whole, reproducible and as skewed as they were asked to be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.errors import MisuseError
from thinwire.lab.federated.partition import by_speaker, dirichlet, iid, partition, pathological

LABELS = np.random.default_rng(0).integers(0, 10, 2000)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["iid", "dirichlet-0.5", "dirichlet-5", "pathological-2", "pathological-3"]),
    st.integers(1, 40),
    st.integers(0, 5),
)
def test_shards_are_a_partition_of_the_samples_and_depend_on_the_seed_alone(how: str, clients: int, seed: int) -> None:
    shards = partition(LABELS, clients, how, seed=seed)
    again = partition(LABELS, clients, how, seed=seed)
    assert len(shards) == clients
    assert all(np.array_equal(a, b) and len(a) for a, b in zip(shards, again, strict=True))
    merged = np.concatenate(shards)
    assert len(np.unique(merged)) == len(merged)
    if not how.startswith("pathological") or clients >= 10:  # a few clients of two classes leave classes out
        assert len(merged) == len(LABELS)


def entropy(shards: list[np.ndarray]) -> float:
    """Mean entropy of the clients' labels, in nats."""
    found = []
    for shard in shards:
        p = np.bincount(LABELS[shard], minlength=10) / len(shard)
        found.append(-(p[p > 0] * np.log(p[p > 0])).sum())
    return float(np.mean(found))


def test_a_smaller_alpha_means_fewer_classes_a_client() -> None:
    entropies = [entropy(dirichlet(LABELS, 10, alpha=alpha, least=5, seed=1)) for alpha in (0.1, 0.5, 5.0, 1000.0)]
    assert entropies == sorted(entropies)
    assert entropies[0] < 1.5 < 2.25 < entropies[-1] <= np.log(10)
    assert min(map(len, dirichlet(LABELS, 10, alpha=0.1, least=25, seed=1))) >= 25


@pytest.mark.parametrize(("clients", "classes"), [(10, 2), (25, 3), (7, 10), (100, 1)])
def test_clients_have_the_classes_they_are_dealt(clients: int, classes: int) -> None:
    shards = pathological(LABELS, clients, classes=classes, seed=3)
    assert {len(np.unique(LABELS[shard])) for shard in shards} == {classes}


def test_even_shards_differ_by_one_at_most() -> None:
    sizes = [len(shard) for shard in iid(1003, 10, seed=2)]
    assert sorted(set(sizes)) == [100, 101]


def test_speakers_keep_what_they_say() -> None:
    text = (
        "First Citizen:\nBefore we proceed.\n\nAll:\nSpeak, speak.\n\nFirst Citizen:\nYou are all resolved:\nto die.\n"
    )
    assert by_speaker(text, 2, least=1) == ["Before we proceed.\nYou are all resolved:\nto die.", "Speak, speak."]
    with pytest.raises(MisuseError, match="2 speakers"):
        by_speaker(text, 3, least=1)


@pytest.mark.parametrize("how", ["", "iid-", "dirichlet-0", "dirichlet--1", "dirichlet-x", "pathological-11", "even"])
def test_what_cannot_be_dealt_is_refused(how: str) -> None:
    with pytest.raises(MisuseError):
        partition(LABELS, 5, how)
    with pytest.raises(MisuseError, match="cannot share"):
        partition(LABELS[:3], 4, "iid")
