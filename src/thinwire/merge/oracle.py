"""The readable versions of the merge methods: dense task vectors, plain torch, no speed.

Each takes the dense vectors [tasks, cells] and each task's keep-mask of what drops at random, and gives the dense
vector to add to the base. The sparse methods equal them wherever a sum is exact, and else to its rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from thinwire.merge.recipe import Resolved

__all__ = ["merge_dense"]

_Dense = torch.Tensor


def _keep_top(values: _Dense, count: int) -> _Dense:
    """The ``count`` largest magnitudes of a flat vector, equal ones by position; 0 elsewhere."""
    order = torch.sort(-values.abs(), stable=True).indices
    return values * torch.zeros_like(values).index_fill_(0, order[:count], 1)


def _l1(before: _Dense, after: _Dense) -> _Dense:
    old, new = before.double().abs().sum(), after.double().abs().sum()
    return after if old < 1e-7 or new < 1e-7 else after * float(old / new)


def _breadcrumbs(values: _Dense, density: float, gamma: float) -> _Dense:
    if density >= 1:
        return values
    size = values.numel()
    target = int(density * size)
    bottom = max(0, size - target - int(gamma * size))
    order = torch.sort(values.abs(), stable=True).indices
    return values * torch.zeros_like(values).index_fill_(0, order[bottom : bottom + target], 1)


def sparsified(name: str, values: _Dense, task: Mapping[str, Any], shared: Mapping[str, Any], kept: _Dense) -> _Dense:
    """One dense vector after its method's sparsifier; ``kept`` is the mask of what stays of what drops at random."""
    density = task.get("density", 1.0)
    if name in ("ties", "ties_peft", "magnitude_prune"):
        count = int(density * values.numel())
        if name == "ties" and density > 0:
            count = max(1, count)
        found = values if density >= 1 else _keep_top(values, count)
    elif name.startswith(("dare", "della")):
        found = values if density >= 1 else values * kept
        if name.endswith("_peft") and 0 < density < 1:
            found = found / density
    elif name.startswith("breadcrumbs"):
        found = _breadcrumbs(values, density, task["gamma"])
    else:
        found = values
    return _l1(values, found) if shared.get("rescale") and density < 1 else found


def _elect(vectors: _Dense, ballot: _Dense) -> _Dense:
    majority = torch.where(ballot >= 0, 1.0, -1.0)
    return vectors.sign() == majority


def _sce(vectors: _Dense, shared: Mapping[str, Any]) -> _Dense:
    if shared["select_topk"] < 1:
        spread = vectors.double().var(dim=0, unbiased=False)
        count = int(int(spread.count_nonzero()) * shared["select_topk"])
        vectors = vectors * (_keep_top(spread, count) != 0)
    energy = vectors.double().square().mean(dim=1)
    total = energy.sum()
    weights = (energy / total if total >= 1e-6 else torch.full_like(energy, 1 / len(energy))).to(vectors.dtype)
    mask = _elect(vectors, vectors.sum(dim=0)) * weights[:, None]
    found: _Dense = (vectors * mask).sum(dim=0) / mask.sum(dim=0).clamp(min=1e-6)
    return found


def _ram(name: str, vectors: _Dense, shared: Mapping[str, Any]) -> _Dense:
    changed = vectors.abs() > shared["epsilon"]
    counts = changed.sum(dim=0)
    scale = torch.ones(len(vectors), dtype=vectors.dtype)
    if name == "ramplus":
        rho = torch.tensor(shared["survey"])
        scale = 1 + shared["r"] * rho.to(vectors.dtype).clamp(0, shared["alpha"])
    elif name == "ramplus_tl":
        rho = (changed & (counts > 1)).sum(dim=1) / (changed & (counts == 1)).sum(dim=1).clamp(min=1e-12)
        scale = 1 + shared["r"] * rho.to(vectors.dtype).clamp(0, shared["alpha"])
    own = (vectors * (changed & (counts == 1)) * scale[:, None]).sum(dim=0)
    found: _Dense = own + (vectors * changed / counts.clamp(min=1) * (counts > 1)).sum(dim=0)
    return found


def merge_dense(name: str, vectors: _Dense, found: Resolved, kept: _Dense) -> _Dense:
    """The vector [cells] to add to the base, by the method ``name`` from dense ``vectors`` [tasks, cells]; ``kept``
    [tasks, cells] marks what stays of what drops at random."""
    shared = found.shared
    rows = [sparsified(name, v, t, shared, k) for v, t, k in zip(vectors, found.tasks, kept, strict=True)]
    vectors = torch.stack(rows)
    weights = torch.tensor(shared["all_weights"], dtype=vectors.dtype)[:, None]
    weighed = vectors * weights
    if name == "sce":
        merged = _sce(vectors, shared)
    elif name in ("ram", "ramplus", "ramplus_tl"):
        merged = _ram(name, vectors, shared)
    elif name == "changed_mean":
        divisor = (weights * (vectors != 0)).sum(dim=0)
        merged = weighed.sum(dim=0) / torch.where(divisor == 0, 1.0, divisor)
    elif name in ("ties_peft", "dare_ties_peft"):
        ballot = vectors if shared["majority_sign_method"] == "total" else vectors.sign()
        mask = _elect(vectors, ballot.sum(dim=0))
        merged = (weighed * mask).sum(dim=0) / mask.sum(dim=0).clamp(min=1)
    elif name in ("ties", "dare_ties", "della", "breadcrumbs_ties"):
        mask = _elect(weighed, weighed.sum(dim=0))
        divisor = (weights * mask).sum(dim=0)
        merged = (weighed * mask).sum(dim=0)
        if shared["normalize"]:
            merged = merged / torch.where(divisor == 0, 1.0, divisor)
    else:
        merged = weighed.sum(dim=0)
        total = weights.sum()
        if shared.get("normalize") and abs(total) >= 1e-8:
            merged = merged / total
    found_vector: _Dense = merged * shared["lambda"]
    return found_vector
