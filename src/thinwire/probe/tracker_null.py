"""The null that a tracker measures beside a run: a shadow of a sample of the weights, with the run's own optimiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from thinwire.errors import MisuseError
from thinwire.probe.changes import plain_tensor
from thinwire.probe.null_simulation import NullStep, Shadow
from thinwire.probe.snapshots import viewed_dtype

__all__ = ["TrackerNull"]

_SCALE_FREE = ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adafactor", "RMSprop", "Adagrad", "Adadelta", "Rprop")
"""Optimisers that do not see the size of the gradients, as long as it is the same for many steps."""


class TrackerNull:
    """Follows the hyperparameters of ``optimizer`` and drives a sample of what it updates by random gradients.

    The sample starts from the real weights again whenever all lags start anew, so that a null is always one of the
    weights that there are: in 1 step, 8 or 32, from where the run was then.

    Args:
        tensors: the parameters by name. masters: what the optimiser updates in their stead, by name.
        make: makes an optimiser of parameter groups; by default the optimiser's class does.
        gradient_rms: the gradients' sizes by name, where ``.grad`` will not tell.

    Raises:
        MisuseError: no optimiser; it updates none of the tensors; it cannot be made of parameter groups.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer | None,
        make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None,
        *,
        masters: Mapping[str, Tensor] | None,
        view: torch.dtype | None,
        lags: Sequence[int],
        sample: int,
        seed: int,
        gradient_rms: Mapping[str, float] | None,
    ) -> None:
        if optimizer is None:
            raise MisuseError("a null needs to know the optimiser; give optimizer=")
        self._optimizer, self._given = optimizer, dict(gradient_rms or {})
        self._groups: dict[str, dict[str, Any]] = {}
        self._updated: dict[str, Tensor] = {}
        views: dict[str, torch.dtype] = {}
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for name, tensor in tensors.items():
            updated = (masters or {}).get(name, tensor)
            if id(updated) in groups and updated.is_floating_point():
                self._groups[name], self._updated[name] = groups[id(updated)], updated
                views[name] = viewed_dtype(tensor, view)
        if not self._updated:
            raise MisuseError("the optimiser updates none of the parameters; give masters= if it updates copies")
        self._total = {name: plain_tensor(tensor).numel() for name, tensor in tensors.items()}
        self._scale_free = type(optimizer).__name__ in _SCALE_FREE
        try:
            self._shadow = Shadow(
                self._updated, make or type(optimizer), options={n: _options(g) for n, g in self._groups.items()},
                view=views, lags=lags, sample=sample, seed=seed,
            )  # fmt: skip
        except TypeError as error:
            raise MisuseError(
                f"{type(optimizer).__name__} cannot be made of parameter groups alone ({error}); give null= a callable"
            ) from error
        done = max((_steps_of(optimizer, p) for p in self._updated.values()), default=0)
        if done:
            self._shadow.burn_in(done)
        self._sized = False

    def step(self) -> dict[int, NullStep]:
        """One step of the shadow with the hyperparameters of now; shares of all tensors, those not updated included."""
        if not self._sized or not self._scale_free:
            self._sized |= self._measure_gradients()
        by_name = dict(zip(self._groups, self._shadow.optimizer.param_groups, strict=True))
        for name, group in by_name.items():
            group.update(_options(self._groups[name]))
        found = self._shadow.step()
        self._shadow.restart_from(self._updated)
        share = sum(self._total[name] for name in self._updated) / max(1, sum(self._total.values()))
        still = dict.fromkeys(self._total, 0.0)  # what the optimiser does not update does not change
        return {
            lag: NullStep(n.fraction * share, n.error * share, still | n.tensors) for lag, n in found.items()
        }  # fmt: skip

    def _measure_gradients(self) -> bool:
        rms = dict(self._given)
        for name, p in self._updated.items():
            if name not in rms and p.grad is not None and p.grad.numel():
                gradient = plain_tensor(p.grad)
                rms[name] = float(torch.linalg.vector_norm(gradient, dtype=torch.float32)) / sqrt(gradient.numel())
        if not rms and not self._scale_free and not self._sized:
            raise MisuseError(
                f"the updates of {type(self._optimizer).__name__} are as large as its gradients, and there are none; "
                "call step() before zero_grad(), or give gradient_rms="
            )
        self._shadow.set_rms({name: size for name, size in rms.items() if 0 < size < float("inf")})
        return bool(rms)

    def state_dict(self) -> dict[str, Any]:
        """As of :class:`Shadow`."""
        return {"shadow": self._shadow.state_dict(), "sized": self._sized}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As of :class:`Shadow`."""
        self._shadow.load_state_dict(state["shadow"])
        self._sized = bool(state["sized"])


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _steps_of(optimizer: torch.optim.Optimizer, p: Tensor) -> int:
    count = optimizer.state[p].get("step", 0) if p in optimizer.state else 0
    return int(count)
