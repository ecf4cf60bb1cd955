"""Augmentation of a whole batch at once, as index arithmetic on tensors; it runs where the images are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["augment", "crop", "flip", "normalise"]

PADDING = 4


def augment(images: Tensor, how: str, generator: torch.Generator) -> Tensor:
    """Images as ``how`` (none, crop, crop-flip) has them. What is drawn comes from a CPU ``generator``, so that it is
    the same on every device.

    ``images``: any dtype, ``[B, channels, height, width]``; the result has the same shape.
    """
    if how == "none":
        return images
    count = images.shape[0]
    offsets = torch.randint(0, 2 * PADDING + 1, (2, count), generator=generator).to(images.device)
    images = crop(images, offsets[0], offsets[1], PADDING)
    if how == "crop-flip":
        images = flip(images, torch.rand(count, generator=generator).to(images.device) < 0.5)
    return images


def crop(images: Tensor, tops: Tensor, lefts: Tensor, padding: int) -> Tensor:
    """Image i, with ``padding`` black pixels on each side, from row ``tops[i]`` and column ``lefts[i]`` on.

    >>> crop(torch.tensor([[[[1, 2], [3, 4]]]]), torch.tensor([0]), torch.tensor([1]), padding=1)
    tensor([[[[0, 0],
              [1, 2]]]])
    """
    count, _, height, width = images.shape
    padded = functional.pad(images, (padding, padding, padding, padding))
    rows = tops[:, None] + torch.arange(height, device=images.device)
    columns = lefts[:, None] + torch.arange(width, device=images.device)
    which = torch.arange(count, device=images.device)[:, None, None]
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def flip(images: Tensor, which: Tensor) -> Tensor:
    """Images mirrored left to right where ``which`` (bool ``[B]``) says so.

    >>> flip(torch.tensor([[[[1, 2]]], [[[3, 4]]]]), torch.tensor([True, False])).flatten()
    tensor([2, 1, 3, 4])
    """
    return torch.where(which[:, None, None, None], images.flip(3), images)


def normalise(images: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """float32 images with each channel's mean taken off and its deviation made 1."""
    return (images.float() - mean) / deviation
