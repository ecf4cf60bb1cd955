"""Hops: mass is conserved at each, and with everything sent a hierarchy changes nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.errors import MisuseError
from thinwire.federated import frame as frames
from thinwire.federated.hierarchy import Coverage, Hierarchy, Hop


def updates(nodes, seed, numel=60):
    generator = torch.Generator().manual_seed(seed)
    return {node: (float(10 + node), torch.randn(numel, generator=generator)) for node in nodes}


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(1, 255), min_size=1, max_size=6), st.sampled_from([0.05, 0.5, Coverage(0.8)]))
def test_what_comes_in_goes_out_or_waits(rounds, density):
    tree = Hierarchy((Hop(3, 0.1), Hop(2, density, "float32")))
    total_in = total_out = torch.zeros(60, dtype=torch.float64)
    for seed, present in enumerate(rounds):
        came = updates([n for n in range(8) if present >> n & 1], seed)
        tops, _ = tree.up(came)
        total_in = total_in + sum(weight * update.double() for weight, update in came.values())
        total_out = total_out + sum(top.total for top in tops)
        assert sum(top.weight for top in tops) == sum(weight for weight, _ in came.values())
        assert sorted(node for top in tops for node in top.nodes) == sorted(came)
    waits = sum(tree.residuals.values())
    torch.testing.assert_close(total_out + waits, total_in, rtol=0, atol=1e-9)


def test_everything_sent_is_the_weighted_sum():
    came = updates(range(7), 1)
    tops, sent = Hierarchy((Hop(3, 1.0, "float32"), Hop(2, 1.0, "float32"))).up(came)
    expected = sum(weight * update.double() for weight, update in came.values())
    torch.testing.assert_close(sum(top.total for top in tops), expected, rtol=0, atol=1e-4)
    assert [(level, parent) for level, parent, _ in sent] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    for _, _, data in sent:
        frames.parse_frame(data)


def test_a_parent_is_for_life():
    tree = Hierarchy((Hop(2),))
    tree.up(updates([5, 9, 7], 0))
    assert [tree.parent(0, node) for node in (5, 7, 9, 11)] == [0, 0, 1, 1]
    tree.up(updates([9], 1))
    assert tree.parent(0, 9) == 1


def test_coverage_takes_what_holds_the_energy():
    update = torch.tensor([3.0, 0.0, 4.0, 0.0, 0.0])
    assert [Coverage(share, maximum=1.0).count(update) for share in (0.5, 0.64, 0.65, 1.0)] == [1, 1, 2, 2]
    assert Coverage(1.0, maximum=0.2).count(update) == 1
    assert Coverage().count(torch.zeros(5)) == 0


def test_options_that_make_no_sense():
    for make in (lambda: Hop(0), lambda: Hop(2, 0.0), lambda: Hop(2, values="x"), lambda: Hierarchy(())):
        with pytest.raises(MisuseError):
            make()
    with pytest.raises(MisuseError, match="weight"):
        Hierarchy((Hop(2),)).up({1: (float("nan"), torch.ones(2))})
