"""The linear aggregators as their papers write them: on whole vectors, worker by worker, without a Gram matrix."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor


def adacons(updates: list[Tensor], smoothed: list[float] | None, momentum: float) -> tuple[Tensor, list[float]]:
    mean = sum(updates[1:], updates[0]) / len(updates)
    consensus = [max(0.0, float(g @ mean) / float(g.norm())) if g.any() else 0.0 for g in updates]
    order = sorted(range(len(updates)), key=lambda i: consensus[i])
    ranked = [consensus[i] for i in order]
    if smoothed is not None:
        ranked = [momentum * old + (1 - momentum) * new for old, new in zip(smoothed, ranked, strict=True)]
    total, result = 0.0, torch.zeros_like(mean)
    for share, i in zip(ranked, order, strict=True):
        if updates[i].any():
            total += share / float(updates[i].norm())
            result = result + share * updates[i] / updates[i].norm()
    return (result / total if total > 0 else mean), ranked


def adasum(updates: list[Tensor]) -> Tensor:
    if len(updates) == 1:
        return updates[0]
    pairs = []
    for i in range(0, len(updates) - 1, 2):
        a, b = updates[i], updates[i + 1]
        dot = float(a @ b)
        share_a = 1 - dot / float(a @ a) / 2 if a.any() else 1.0
        share_b = 1 - dot / float(b @ b) / 2 if b.any() else 1.0
        pairs.append(share_a * a + share_b * b)
    return adasum(pairs + updates[len(updates) - len(updates) % 2 :])


def krum_order(updates: list[Tensor], faulty: int) -> list[int]:
    scores = []
    for i, g in enumerate(updates):
        distances = sorted(float((g - other).square().sum()) for j, other in enumerate(updates) if j != i)
        scores.append(sum(distances[: len(updates) - faulty - 2]))
    return sorted(range(len(updates)), key=lambda i: scores[i])


def centred_clipping(updates: list[Tensor], previous: Tensor, radius: float | None, iterations: int) -> Tensor:
    centre = previous
    for _ in range(iterations):
        distances = [sqrt(float((g - centre).square().sum())) for g in updates]
        limit = sorted(distances)[(len(distances) - 1) // 2] if radius is None else radius
        moves = [(g - centre) * min(1.0, limit / d if d else 1.0) for g, d in zip(updates, distances, strict=True)]
        centre = centre + sum(moves[1:], moves[0]) / len(moves)
    return centre
