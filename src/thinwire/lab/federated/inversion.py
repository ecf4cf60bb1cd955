"""What an update gives away: pictures rebuilt from what a client sent, against how sparse it was.

An honest but curious server knows the weights it sent and sees the update that came back. It looks for a picture whose
update would have been this one:

==============  =======================================================================================================
attacker        how it looks
==============  =======================================================================================================
``naive``       compares with the whole update, as if weights that were not sent had not moved: inverting gradients by
                their cosine, with total variation as prior (Geiping et al. 2020, arXiv:2003.14053)
``mask-aware``  compares only where something was sent, and follows the client's local steps through
``learned``     a network that was shown updates of public pictures beside these (:class:`LearnedAttacker`)
==============  =======================================================================================================

Every update here is that of one picture, the easiest case; labels are taken as known (from one picture's update they
can be told; Zhao et al. 2020, arXiv:2001.02610). Success is PSNR and SSIM against the picture. That an attack fails
does not make an update private: another may succeed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from thinwire.errors import MisuseError

__all__ = ["LearnedAttacker", "Updates", "VictimNet", "invert", "psnr", "ssim"]


@final
class VictimNet(nn.Module):
    """Sigmoid convolutions without pooling, as attacks are usually shown on (Zhu et al. 2019, arXiv:1906.08935).

    >>> sum(weight.numel() for weight in VictimNet((1, 28, 28), 10).parameters())
    13426
    """

    def __init__(self, shape: tuple[int, int, int], classes: int, *, width: int = 12) -> None:
        super().__init__()
        channels, height, side = shape
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 5, padding=2, stride=2), nn.Sigmoid(),
            nn.Conv2d(width, width, 5, padding=2, stride=2), nn.Sigmoid(),
            nn.Conv2d(width, width, 5, padding=2), nn.Sigmoid(),
        )  # fmt: skip
        quarters = [(size + 3) // 4 for size in (height, side)]
        self.head = nn.Linear(width * quarters[0] * quarters[1], classes)
        for weight in self.parameters():
            nn.init.uniform_(weight, -0.5, 0.5)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, channels, height, width]``."""
        logits: Tensor = self.head(self.body(images).flatten(1))
        return logits


@final
class Updates:
    """Updates of ``model``, one a picture: ``steps`` of gradient descent at ``lr`` on it, divided by ``lr``; of which
    the share ``density`` of largest size is sent and the rest is 0."""

    def __init__(self, model: nn.Module, *, steps: int = 1, lr: float = 0.1, density: float = 1.0) -> None:
        if steps < 1 or not lr > 0 or not 0 < density <= 1:
            raise MisuseError(f"{steps} steps at lr {lr} and density {density}; give 1 or more, above 0, and up to 1")
        self._model = model
        self._weights = {name: w.detach() for name, w in model.named_parameters()}
        self.size = sum(w.numel() for w in self._weights.values())
        self._steps, self._lr, self._density = steps, lr, density

    @property
    def kept(self) -> int:
        """How many of the weights' changes are sent."""
        return max(1, round(self._density * self.size))

    def dense(self, images: Tensor, labels: Tensor, *, steps: int | None = None) -> Tensor:
        """The whole updates ``[N, size]`` of images ``[N, ...]`` with labels int64 ``[N]``, differentiably."""
        count = self._steps if steps is None else steps

        def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
            return functional.cross_entropy(functional_call(self._model, weights, (image[None],)), label[None])

        def update(image: Tensor, label: Tensor) -> Tensor:
            weights = self._weights
            for _ in range(count):
                slope = grad(loss)(weights, image, label)
                weights = {name: w - self._lr * slope[name] for name, w in weights.items()}
            moved = [(self._weights[name] - w).flatten() / self._lr for name, w in weights.items()]
            return torch.cat(moved)

        found: Tensor = vmap(update)(images, labels)
        return found

    def sent(self, images: Tensor, labels: Tensor) -> Tensor:
        """What the server sees of these pictures' updates, ``[N, size]``."""
        whole = self.dense(images, labels).detach()
        if self.kept == self.size:
            return whole
        chosen = whole.abs().topk(self.kept, dim=1).indices
        return torch.zeros_like(whole).scatter_(1, chosen, whole.gather(1, chosen))


def invert(
    updates: Updates, seen: Tensor, labels: Tensor, shape: tuple[int, int, int], *, aware: bool,
    iterations: int = 300, lr: float = 0.1, variation: float = 1e-3, seed: int = 0,
    on_step: Callable[[int], Any] | None = None,
) -> Tensor:  # fmt: skip
    """Pictures ``[N, *shape]`` in [0, 1] whose updates resemble ``seen`` [N, size]; all are looked for side by side.

    ``aware`` compares only where ``seen`` is not 0 and repeats the client's local steps; else all coordinates count,
    and the update is taken for that of one step. Signed Adam steps with a falling rate, from grey noise.

    Raises:
        MisuseError: shapes do not fit.
    """
    if seen.shape != (len(labels), updates.size) or iterations < 1:
        raise MisuseError(
            f"updates {tuple(seen.shape)} of {len(labels)} pictures and {updates.size} weights do not fit"
        )
    images = torch.rand((len(labels), *shape), generator=torch.Generator().manual_seed(seed))
    images.mul_(0.2).add_(0.4).requires_grad_()
    optimiser = torch.optim.Adam([images], lr=lr)
    schedule = torch.optim.lr_scheduler.MultiStepLR(
        optimiser, [int(iterations * s) for s in (0.375, 0.625, 0.875)], 0.1
    )
    mask = (seen != 0) if aware else None
    for step in range(iterations):
        optimiser.zero_grad()
        found = updates.dense(images, labels, steps=None if aware else 1)
        if mask is not None:
            found = found * mask
        likeness = functional.cosine_similarity(found, seen, dim=1, eps=1e-12)
        loss = (1 - likeness).sum() + variation * _variation(images).sum()
        (slope,) = torch.autograd.grad(loss, [images])
        images.grad = slope.sign()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            images.clamp_(0, 1)
        if on_step is not None:
            on_step(step)
    return images.detach()


def _variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels ``[N]`` (Rudin, Osher & Fatemi 1992, anisotropic)."""
    down = (images[:, :, 1:] - images[:, :, :-1]).abs().flatten(1).mean(1)
    across = (images[..., 1:] - images[..., :-1]).abs().flatten(1).mean(1)
    return down + across


@final
class LearnedAttacker:
    """A network from updates to pictures, shown those of public pictures: no attack on one update but a fit to many.

    Updates are scaled to unit norm. It needs the weights that the victims start from, which a server has.
    """

    def __init__(self, updates: Updates, shape: tuple[int, int, int], *, width: int = 256, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pixels = shape[0] * shape[1] * shape[2]
            self._network = nn.Sequential(
                nn.Linear(updates.size, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, pixels)
            )
        self._updates, self._shape = updates, shape
        self._generator = torch.Generator().manual_seed(seed)

    def fit(self, images: Tensor, labels: Tensor, *, epochs: int = 20, batch: int = 64, lr: float = 1e-3) -> float:
        """Learn from public pictures ``[N, ...]`` in [0, 1]; returns the last epoch's mean square error."""
        parts = zip(torch.split(images, batch), torch.split(labels, batch), strict=True)
        seen = torch.cat([self._updates.sent(some, of_them) for some, of_them in parts])
        seen = functional.normalize(seen, dim=1)
        optimiser = torch.optim.Adam(self._network.parameters(), lr=lr)
        loss = float("nan")
        for _ in range(epochs):
            total = 0.0
            for rows in torch.split(torch.randperm(len(images), generator=self._generator), batch):
                error = functional.mse_loss(self._pictures(seen[rows]), images[rows])
                optimiser.zero_grad()
                error.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                total += float(error.detach()) * len(rows)
            loss = total / len(images)
        return loss

    def _pictures(self, seen: Tensor) -> Tensor:
        found: Tensor = torch.sigmoid(self._network(seen * self._updates.size**0.5)).view(-1, *self._shape)
        return found

    @torch.no_grad()
    def invert(self, seen: Tensor) -> Tensor:
        """Pictures ``[N, *shape]`` in [0, 1] from updates ``[N, size]``."""
        return self._pictures(functional.normalize(seen, dim=1))


def psnr(found: Tensor, truth: Tensor) -> Tensor:
    """Peak signal to noise ratio ``[N]`` in dB of pictures ``[N, ...]`` in [0, 1]; at most 100.

    >>> psnr(torch.full((1, 1, 4, 4), 0.6), torch.full((1, 1, 4, 4), 0.5))
    tensor([20.0000])
    """
    error = (found - truth).square().flatten(1).mean(1).clamp_min(1e-10)
    return -10 * torch.log10(error)


def ssim(found: Tensor, truth: Tensor, *, window: int = 7) -> Tensor:
    """Structural similarity ``[N]`` of pictures ``[N, C, H, W]`` in [0, 1] (Wang et al. 2004,
    doi:10.1109/TIP.2003.819861), over even windows as scikit-image's default.

    >>> picture = torch.rand(1, 1, 8, 8)
    >>> float(ssim(picture, picture))
    1.0
    """
    side = min(window, found.shape[-1], found.shape[-2])

    def mean(x: Tensor) -> Tensor:
        return functional.avg_pool2d(x, side, stride=1)

    scale = side**2 / (side**2 - 1)  # sample covariances
    x, y = found.double(), truth.double()
    mx, my = mean(x), mean(y)
    vx, vy, vxy = (scale * (mean(a * b) - ma * mb) for a, b, ma, mb in ((x, x, mx, mx), (y, y, my, my), (x, y, mx, my)))
    c1, c2 = 0.01**2, 0.03**2
    likeness = ((2 * mx * my + c1) * (2 * vxy + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return likeness.flatten(1).mean(1).float()
