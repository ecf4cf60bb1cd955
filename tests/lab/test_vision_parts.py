"""Laws of shards, augmentation, models and rates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.errors import MisuseError
from thinwire.lab.trainer.options import TrainingOptions
from thinwire.lab.trainer.schedule import learning_rate
from thinwire.lab.vision.augment import PADDING, augment, crop, flip, normalise
from thinwire.lab.vision.models import BasicBlock, SimpleCNN, resnet18, resnet50
from thinwire.lab.vision.shards import epoch_order, make_shards, mixed_seed

# --- shards --------------------------------------------------------------------------------------------------------

labelled = st.integers(1, 12).flatmap(lambda n: st.lists(st.integers(0, n), min_size=8, max_size=300))


@given(labels=labelled, workers=st.integers(1, 8), skew=st.floats(0, 1), seed=st.integers(0, 2**31 - 1))
def test_shards_are_a_partition_into_equal_parts(labels: list[int], workers: int, skew: float, seed: int) -> None:
    shards = make_shards(torch.tensor(labels), workers, skew=skew, seed=seed)
    size = len(labels) // workers
    assert [len(shard) for shard in shards] == [size] * workers
    together = torch.cat(shards).tolist()
    assert len(set(together)) == size * workers  # disjoint, complete but for the remainder
    assert all(0 <= index < len(labels) for index in together)


@given(workers=st.integers(1, 7), skew=st.floats(0, 1), seed=st.integers(0, 1000))
def test_the_skew_is_as_asked(workers: int, skew: float, seed: int) -> None:
    """All samples are there, of classes of equal size: worker w's own classes are those of its part of the sorted."""
    per_class, classes = 7 * 60, 6
    labels = torch.arange(classes).repeat_interleave(per_class)
    size = len(labels) // workers
    shards = make_shards(labels, workers, skew=skew, seed=seed)
    truncated = len(labels) - size * workers
    for worker, shard in enumerate(shards):
        first, last = worker * size // per_class, -(-(worker + 1) * size // per_class)
        own = set(range(max(0, first - 1), min(classes, last + 1))) if truncated else set(range(first, last))
        share = sum(label in own for label in labels[shard].tolist()) / size
        assert share >= skew - 1 / size
        if skew == 0 and workers <= 3:
            counts = torch.bincount(labels[shard], minlength=classes).double() / size
            assert float((counts - 1 / classes).abs().max()) < 0.08  # six standard deviations


def test_shards_and_orders_depend_on_the_seed_alone_and_differ_between_seeds_epochs_and_ranks() -> None:
    labels = torch.arange(1000) % 10
    one, same, other = (make_shards(labels, 4, skew=0.9, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])
    orders = {
        tuple(epoch_order(torch.arange(100), epoch=epoch, rank=rank, seed=seed).tolist())
        for epoch in range(3) for rank in range(3) for seed in range(3)
    }  # fmt: skip
    assert len(orders) == 27
    assert all(sorted(order) == list(range(100)) for order in orders)
    with pytest.raises(MisuseError, match="too few"):
        make_shards(torch.tensor([1]), 2, skew=0, seed=0)


@given(numbers=st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=3), unique_by=tuple, max_size=50))
def test_mixed_seeds_are_seeds_and_do_not_collide(numbers: list[list[int]]) -> None:
    seeds = [mixed_seed(*x) for x in numbers]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


# --- augmentation --------------------------------------------------------------------------------------------------


@given(
    size=st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 7), st.integers(1, 7)),
    padding=st.integers(0, 4),
    seed=st.integers(0, 999),
)
def test_crop_and_flip_equal_a_loop_over_pixels(size: tuple[int, int, int, int], padding: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    tops, lefts = torch.randint(0, 2 * padding + 1, (2, size[0]), generator=generator)
    mirrored = torch.rand(size[0], generator=generator) < 0.5
    found = flip(crop(images, tops, lefts, padding), mirrored)
    count, _, height, width = size
    expected = torch.zeros_like(images)
    for b in range(count):
        for y in range(height):
            for x in range(width):
                row, column = y + int(tops[b]) - padding, x + int(lefts[b]) - padding
                if 0 <= row < height and 0 <= column < width:
                    expected[b, :, y, width - 1 - x if mirrored[b] else x] = images[b, :, row, column]
    assert torch.equal(found, expected)


def test_augmentation_is_drawn_from_the_generator_and_covers_all_offsets() -> None:
    images = torch.zeros(4000, 1, 9, 9, dtype=torch.uint8)
    images[:, 0, 4, 3] = 1
    made = augment(images, "crop-flip", torch.Generator().manual_seed(1))
    assert torch.equal(made, augment(images, "crop-flip", torch.Generator().manual_seed(1)))
    assert not torch.equal(made, augment(images, "crop-flip", torch.Generator().manual_seed(2)))
    places = {tuple(place) for place in made[:, 0].nonzero()[:, 1:].tolist()}
    assert {y for y, _ in places} == set(range(4 - PADDING, 4 + PADDING + 1))
    assert {x for _, x in places} == set(range(9))
    assert torch.equal(augment(images, "none", torch.Generator()), images)


def test_normalised_images_have_no_mean_and_unit_deviation() -> None:
    images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = images.float()
    made = normalise(images, pixels.mean((0, 2, 3)).view(-1, 1, 1), pixels.std((0, 2, 3), correction=0).view(-1, 1, 1))
    assert made.dtype == torch.float32
    assert torch.allclose(made.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(made.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4)


# --- models --------------------------------------------------------------------------------------------------------


def weights(model: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def test_parameter_counts_are_those_of_the_papers() -> None:
    assert weights(resnet50()) == 25_557_032
    assert weights(resnet18()) == 11_689_512
    assert weights(resnet18(classes=10, stem="cifar")) == 11_173_962  # 3 x 3 stem, ten classes
    assert weights(SimpleCNN((1, 28, 28), 10)) == 421_642


def test_names_are_those_of_torchvision() -> None:
    names = set(resnet50().state_dict())
    assert len(names) == 320
    assert {"conv1.weight", "bn1.running_var", "layer1.0.downsample.0.weight", "layer4.2.bn3.bias", "fc.bias"} <= names
    assert not any(name.startswith("layer1.0.downsample") for name in resnet18().state_dict())


@pytest.mark.parametrize(("stem", "side", "inner"), [("cifar", 32, 4), ("imagenet", 64, 2)])
def test_stems_give_the_feature_maps_of_the_papers(stem: str, side: int, inner: int) -> None:
    model = resnet18(classes=7, stem=stem).eval()
    seen = []
    model.avgpool.register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape)))
    with torch.no_grad():
        assert model(torch.zeros(2, 3, side, side)).shape == (2, 7)
    assert seen == [(2, 512, inner, inner)]


def test_a_block_with_a_zero_residual_is_its_shortcut() -> None:
    model = resnet18(zero_init_residual=True)
    block = model.get_submodule("layer1.0")
    assert isinstance(block, BasicBlock)
    x = torch.rand(2, 64, 5, 5)
    assert torch.equal(block(x), x)
    assert not torch.equal(resnet18().get_submodule("layer1.0")(x), x)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (2, 5, 7)])
def test_simple_cnn_takes_any_image_and_refuses_too_small_ones(shape: tuple[int, int, int]) -> None:
    assert SimpleCNN(shape, 4, width=3)(torch.zeros(2, *shape)).shape == (2, 4)
    with pytest.raises(MisuseError, match="too small"):
        SimpleCNN((1, 3, 8), 4)


# --- rates ---------------------------------------------------------------------------------------------------------


@given(schedule=st.sampled_from(["cosine", "step", "constant"]), steps=st.integers(1, 200), warmup=st.integers(0, 50))
def test_rates_rise_in_the_warm_up_and_never_again(schedule: str, steps: int, warmup: int) -> None:
    options = TrainingOptions(lr=0.3, schedule=schedule)
    rates = [learning_rate(options, step, steps, warmup) for step in range(steps)]
    assert all(0 < rate <= 0.3 + 1e-12 for rate in rates)
    rising, falling = rates[:warmup], rates[warmup:]
    assert rising == sorted(set(rising))
    assert falling == sorted(falling, reverse=True)
    if 0 < warmup <= steps:
        assert rates[warmup - 1] == pytest.approx(0.3)
