"""How much of a client's picture its update gives away, by density, local steps and attacker."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from thinwire.bench.measure import machine, versions
from thinwire.lab.federated.inversion import LearnedAttacker, Updates, VictimNet, invert, psnr, ssim
from thinwire.lab.vision.data import load_images

__all__ = ["InversionOptions", "inversion_figure", "run_inversion"]

Row = dict[str, Any]


@final
@dataclass(frozen=True, slots=True)
class InversionOptions:
    """What to attack: ``pictures`` of the test set, by updates of each density and number of local steps; the learned
    attacker sees ``public`` pictures of the training set."""

    data: str = "mnist"
    pictures: int = 8
    densities: tuple[float, ...] = (1.0, 0.1, 0.01, 0.001)
    steps: tuple[int, ...] = (1, 8)
    iterations: int = 300
    public: int = 2000
    epochs: int = 15
    lr: float = 0.003  # of the victims' steps: at 0.1 one step fits a picture, and seven more are of no gradient
    seed: int = 0


def run_inversion(
    options: InversionOptions, *, root: str | None = None, on_row: Callable[[Row], Any] | None = None
) -> tuple[list[Row], dict[tuple[str, int, float], Tensor]]:
    """Rows (mean PSNR in dB and SSIM over the pictures), and the pictures that were found by attack, steps and density;
    ``("truth", 0, 0)`` are the real ones.

    ``class mean``, the mean public picture of the label, is what an attacker has who sees no update at all.
    """
    images = load_images(options.data, root)
    source = torch.Generator().manual_seed(options.seed)
    rows = torch.randperm(len(images.test_labels), generator=source)[: options.pictures]
    truth, labels = images.test_images[rows].float() / 255, images.test_labels[rows]
    chosen = torch.randperm(len(images.train_labels), generator=source)[: options.public]
    public, public_labels = images.train_images[chosen].float() / 255, images.train_labels[chosen]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = VictimNet(images.shape, images.classes)
    found: list[Row] = []
    pictures: dict[tuple[str, int, float], Tensor] = {("truth", 0, 0.0): truth}
    facts = {"bench": "inversion", **asdict(options), "machine": machine(), "versions": versions()}

    def note(attack: str, steps: int, density: float, guess: Tensor, began: float) -> None:
        pictures[attack, steps, density] = guess
        found.append({
            **facts, "attack": attack, "steps": steps, "density": density,
            "psnr": round(float(psnr(guess, truth).mean()), 4), "ssim": round(float(ssim(guess, truth).mean()), 4),
            "seconds": round(time.perf_counter() - began, 2),
        })  # fmt: skip
        if on_row is not None:
            on_row(found[-1])

    means = torch.stack([public[public_labels == label].mean(0) for label in labels])
    for steps, density in itertools.product(options.steps, options.densities):
        updates = Updates(model, steps=steps, lr=options.lr, density=density)
        seen = updates.sent(truth, labels)
        note("class mean", steps, density, means, time.perf_counter())
        for attack in ("naive", "mask-aware"):
            began = time.perf_counter()
            guess = invert(
                updates, seen, labels, images.shape, aware=attack == "mask-aware", iterations=options.iterations,
                seed=options.seed,
            )  # fmt: skip
            note(attack, steps, density, guess, began)
        began = time.perf_counter()
        attacker = LearnedAttacker(updates, images.shape, seed=options.seed)
        attacker.fit(public, public_labels, epochs=options.epochs)
        note("learned", steps, density, attacker.invert(seen), began)
    return found, pictures


def inversion_figure(pictures: dict[tuple[str, int, float], Tensor], path: Path, *, shown: int = 4) -> None:
    """The pictures and what each attack found of them, one row an attack, one block of columns a density."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    truth = pictures["truth", 0, 0.0]
    attacks = list(dict.fromkeys(key[0] for key in pictures if key[0] not in ("truth", "class mean")))
    steps = min(key[1] for key in pictures if key[0] in attacks)
    densities = [key[2] for key in pictures if key[0] == attacks[0] and key[1] == steps]
    shown = min(shown, len(truth))
    blank = truth.new_ones((truth.shape[1], truth.shape[2], 4))

    def strip(images: Tensor) -> Tensor:
        parts = [part for image in images[:shown] for part in (image, blank[..., :1])]
        return torch.cat(parts[:-1], dim=2)

    figure, grid = plt.subplots(
        len(attacks) + 1, len(densities), figsize=(2.6 * len(densities), 0.95 * (len(attacks) + 1)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for column, density in enumerate(densities):
        lines: Sequence[tuple[str, Tensor]] = [
            ("the pictures", truth),
            *((attack, pictures[attack, steps, density]) for attack in attacks),
        ]
        for axes, (name, images) in zip(grid[:, column], lines, strict=True):
            picture = strip(images).permute(1, 2, 0).numpy()
            axes.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if column == 0:
                axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        grid[0, column].set_title(f"density {100 * density:g} %", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
