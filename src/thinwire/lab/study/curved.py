"""How curved the RL objective is where a run starts and where it ends: the sharpness column of a study.

Two matrices at the weights as they are served, on 64 answers that these weights sample to problems that are the same
for every run: the Hessian of the loss of GRPO (its negative eigenvalues are those of an objective that rises), and the
Fisher matrix of the policy, which says how far a step moves what the model says.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import torch

from thinwire.lab.grpo import advantages, grpo_loss
from thinwire.lab.recipes import Recipe
from thinwire.lab.rollouts import token_logprobs
from thinwire.lab.training import rollouts_for
from thinwire.probe.curvature import Matrix, curvature

__all__ = ["Curved", "curvature_of", "curvature_once"]

Curved = dict[str, float]
"""``hessian_trace``, ``hessian_largest``, ``hessian_smallest``, ``fisher_trace``, ``fisher_largest``, the standard
errors ``hessian_trace_error`` and ``fisher_trace_error``, and ``answers``, how many had an advantage."""

_PROBES, _STEPS = 4, 8


def curvature_of(recipe: Recipe, model: Any, *, seed: int) -> Curved:
    """The curvature at ``model``'s weights; where all answers are rewarded alike, the Hessian is 0."""
    batch = rollouts_for(recipe, model, random.Random("curvature"), torch.Generator().manual_seed(seed))
    advantage = advantages(batch.rewards, recipe.group)
    useful = advantage.nonzero().flatten()

    def logprobs(policy: Any, rows: torch.Tensor) -> torch.Tensor:
        return token_logprobs(policy, batch.tokens[rows], batch.attention[rows], first=batch.prompt_width)

    def loss(policy: Any, rows: torch.Tensor) -> torch.Tensor:
        found, mask = logprobs(policy, rows), batch.mask[rows]
        return grpo_loss(found, found.detach(), mask, advantage[rows]) * (len(rows) / len(advantage))

    def answers(policy: Any, rows: torch.Tensor) -> torch.Tensor:
        return (logprobs(policy, rows) * batch.mask[rows]).sum(dim=1)

    def measured(kind: Matrix, objective: Any, rows: torch.Tensor) -> Curved:
        found = curvature(model, objective, [rows], kind=kind, probes=_PROBES, steps=_STEPS, seed=seed)
        return {
            f"{kind}_trace": found.trace, f"{kind}_trace_error": found.trace_error, f"{kind}_largest": found.largest,
            f"{kind}_smallest": found.smallest,
        }  # fmt: skip

    flat = dict.fromkeys(("hessian_trace", "hessian_trace_error", "hessian_largest", "hessian_smallest"), 0.0)
    hessian = measured("hessian", loss, useful) if len(useful) else flat
    fisher = measured("fisher", answers, torch.arange(len(advantage)))
    fisher.pop("fisher_smallest")  # 0: there are fewer answers than weights
    return {**hessian, **fisher, "answers": float(len(useful))}


def curvature_once(recipe: Recipe, model: Any, path: Path, *, seed: int) -> Curved:
    """:func:`curvature_of`, kept in ``path``: many runs start from the same weights."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
        scratch.write_text(json.dumps(curvature_of(recipe, model, seed=seed)))
        os.replace(scratch, path)  # another process may have made the same
    found: Curved = json.loads(path.read_text())
    return found
