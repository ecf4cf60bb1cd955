"""Attacks find what a dense update gives away, and the measures of success are what they are called."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from thinwire.errors import MisuseError
from thinwire.lab.federated.inversion import LearnedAttacker, Updates, VictimNet, invert, psnr, ssim

SHAPE = (1, 8, 8)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> VictimNet:
    torch.manual_seed(0)
    return VictimNet(SHAPE, 4, width=6)


def blobs(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of one bright square, whose corner is the label's and whose size varies."""
    source = np.random.default_rng(seed)
    images, labels = torch.zeros(count, *SHAPE), torch.from_numpy(source.integers(0, 4, count))
    for image, label in zip(images, labels, strict=True):
        top, left = 4 * (int(label) // 2), 4 * (int(label) % 2)
        height, width = source.integers(1, 5, 2)
        image[0, top : top + height, left : left + width] = 1.0
    return images, labels


def test_updates_are_those_of_the_optimiser(model: VictimNet) -> None:
    images, labels = blobs(3, 0)
    for steps in (1, 3):
        found = Updates(model, steps=steps, lr=0.2).dense(images, labels)
        for image, label, row in zip(images, labels, found, strict=True):
            copy = VictimNet(SHAPE, 4, width=6)
            copy.load_state_dict(model.state_dict())
            optimiser = torch.optim.SGD(copy.parameters(), lr=0.2)
            for _ in range(steps):
                optimiser.zero_grad()
                torch.nn.functional.cross_entropy(copy(image[None]), label[None]).backward()
                optimiser.step()
            pairs = zip(model.parameters(), copy.parameters(), strict=True)
            moved = torch.cat([(a - b).flatten() / 0.2 for a, b in pairs])
            torch.testing.assert_close(row, moved.detach(), rtol=1e-3, atol=1e-5)


def test_what_is_sent_is_the_largest_share(model: VictimNet) -> None:
    images, labels = blobs(4, 1)
    updates = Updates(model, density=0.1)
    whole, sent = updates.dense(images, labels), updates.sent(images, labels)
    assert (sent != 0).sum(1).tolist() == [updates.kept] * 4
    for row, all_of_it in zip(sent, whole, strict=True):
        assert torch.equal(row[row != 0], all_of_it[row != 0])
        assert row[row != 0].abs().min() >= all_of_it[row == 0].abs().max()
    with pytest.raises(MisuseError):
        Updates(model, density=0.0)


def test_a_dense_update_gives_its_picture_away_and_a_sparse_one_gives_more_to_who_knows_the_mask(
    model: VictimNet,
) -> None:
    images, labels = blobs(4, 2)
    grey = float(psnr(torch.full_like(images, float(images.mean())), images).mean())
    success = {}
    for density, aware in ((1.0, False), (0.05, False), (0.05, True)):
        updates = Updates(model, density=density)
        found = invert(updates, updates.sent(images, labels), labels, SHAPE, aware=aware, iterations=120)
        assert found.min() >= 0
        assert found.max() <= 1
        success[density, aware] = float(psnr(found, images).mean())
    assert success[1.0, False] > grey + 6
    assert success[1.0, False] > success[0.05, True] > success[0.05, False]


def test_an_attacker_that_learned_from_public_pictures_beats_the_mean_picture(model: VictimNet) -> None:
    images, labels = blobs(620, 3)
    updates = Updates(model, density=0.1)
    attacker = LearnedAttacker(updates, SHAPE, width=64)
    attacker.fit(images[:600], labels[:600], epochs=30, lr=3e-3)
    found = attacker.invert(updates.sent(images[600:], labels[600:]))
    mean = torch.stack([images[:600][labels[:600] == label].mean(0) for label in labels[600:]])
    assert psnr(found, images[600:]).mean() > psnr(mean, images[600:]).mean() + 2


def test_similarity_is_that_of_its_definition() -> None:
    source = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 1, 1, 7, 7, generator=source)
    mx, my = x.mean(), y.mean()
    covariance = ((x - mx) * (y - my)).sum() / 48
    vx, vy = x.var(), y.var()
    expected = (2 * mx * my + 1e-4) * (2 * covariance + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    assert float(ssim(x, y)) == pytest.approx(float(expected), rel=1e-5)
    assert float(psnr(x, x)) == 100.0


def test_updates_that_do_not_fit_are_refused(model: VictimNet) -> None:
    images, labels = blobs(2, 4)
    updates = Updates(model)
    with pytest.raises(MisuseError, match="do not fit"):
        invert(updates, updates.sent(images, labels)[:, :-1], labels, SHAPE, aware=True)
