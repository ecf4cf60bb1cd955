"""ASPG: adaptive sparse policy gradients. Moments, and steps, only of the few cells whose gradients matter most.

A cell's importance is an average of its gradient's magnitude, ``sqrt(v)`` bias-corrected, while it is active, and the
magnitude of its gradient when the set is chosen while it is not. Every ``refresh_every`` steps the cells of largest
importance become (or stay) active. Those that stay keep their moments; those that enter start from zero with a bias
correction of their own. State takes 16 bytes an active cell (position, two moments, the step of entry).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from thinwire.errors import MalformedError, MisuseError, RefuseError
from thinwire.optim import kernels, residuals
from thinwire.optim.flat import flat_pair, local
from thinwire.optim.oracle import AdamStep, SGDStep
from thinwire.optim.selection import Active, choose, draw

__all__ = ["ASPG"]

_NAMES = ("positions", "exp_avg", "exp_avg_sq", "entered")
_AGES_MAX = 1 << 16  # for any beta2 up to 0.9995 older cells have no correction left in float32

State = dict[str, Any]
Work = tuple[torch.Tensor, torch.Tensor, torch.Tensor, State]  # parameter, weights, gradient, state


def _check(group: dict[str, Any]) -> None:
    def between(name: str, low: float, high: float, open_end: bool = False) -> None:
        value = group[name]
        if not (low <= value < high if open_end else low <= value <= high):
            raise MisuseError(f"{name} must be from {low} to {'below ' if open_end else ''}{high}, not {value}")

    if not 0 < group["density"] <= 1:
        raise MisuseError(f"density must be above 0 and at most 1, not {group['density']}")
    for name in ("lr", "eps", "weight_decay", "warmup_steps"):
        between(name, 0, float("inf"))
    for beta in group["betas"]:
        if not 0 <= beta < 1:
            raise MisuseError(f"betas must be from 0 to below 1, not {group['betas']}")
    between("momentum", 0, 1, open_end=True)
    if group["refresh_every"] < 1 or group["stickiness"] < 1:
        raise MisuseError("refresh_every and stickiness must be at least 1")
    for name, known in (
        ("style", ("adam", "sgd")),
        ("choice", ("gradient", "random")),
        ("scope", ("global", "tensor")),
        ("decay", ("active", "all")),
        ("residual_dtype", tuple(residuals.DTYPES)),
    ):
        if group[name] not in known:
            raise MisuseError(f"{name} must be {' or '.join(known)}, not {group[name]!r}")
    if group["choice"] == "random" and group["error_feedback"]:
        raise MisuseError(
            "a random choice is kept, so what waits of other cells would wait for ever: no error_feedback"
        )
    for p in group["params"]:
        if p.dtype not in kernels.FLOATS:
            raise MisuseError(f"ASPG knows float32, bfloat16 and float16, not {p.dtype}; convert the model")
        if local(p).numel() >= 2**31:
            raise MisuseError("a tensor has 2^31 elements or more, beyond int32 positions; shard it")


class ASPG(Optimizer):
    """AdamW or SGD on the active cells only.

    Args:
        params: as for any optimiser of torch; float32, bfloat16 or float16. Of DTensors (FSDP2), each rank selects in
            its own shard.
        lr, betas, eps, weight_decay: as in AdamW. With ``style="sgd"``, ``momentum``, ``dampening``, ``nesterov`` and
            ``weight_decay`` as in SGD, and ``betas[1]`` averages importance.
        density: share of cells that are active, above 0, at most 1. 1: all are, and nothing is selected.
        refresh_every: steps between selections.
        warmup_steps: the set is chosen anew in each of the first so many steps, in which no average is one yet. The
            learning rate is a scheduler's matter, and density stays as it is, or memory would peak here.
        stickiness: an active cell counts so many times its importance: a single gradient is noisier than an average.
        choice: ``gradient``, as above, or ``random``: cells drawn before the first step and kept, whatever their
            gradients. ``seed`` draws the same ones on all ranks, and none but a change of density moves any.
        scope: ``global``, over all tensors of a group, or ``tensor``, the same share of each.
        decay: AdamW's decay of the ``active`` cells only, or of ``all``, which is a pass over all weights.
        masters: float32 weights of the active cells of 16-bit tensors (4 bytes more each), so that small steps add up.
            What a cell's has beyond its rounding is lost when it leaves.
        error_feedback: what is not applied of a gradient waits in a dense residual, is added to the next, and takes
            part in the choice: importance is then the magnitude of that sum, for all cells. Nothing is lost:
            ``sum(applied) + residual == sum(gradients)``. It costs 4 bytes of *every* weight (2 with
            ``residual_dtype="bfloat16"``, rounded in each step) and two passes over the gradient in every step.
        nonfinite: ``raise`` or ``skip`` a step whose gradients that are used are infinite or NaN. ``skipped`` counts.
        maximize: as in torch.
        capturable, foreach: only for signatures' sake; True is refused.

    Raises:
        MisuseError: an argument out of range.

    >>> model = torch.nn.Linear(100, 10)
    >>> optimizer = ASPG(model.parameters(), lr=1e-2, density=0.05)
    >>> model(torch.ones(1, 100)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.active_cells()
    50
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, *, density: float = 0.01, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 0.01, style: str = "adam", momentum: float = 0.0,
        dampening: float = 0.0, nesterov: bool = False, refresh_every: int = 100, warmup_steps: int = 0,
        stickiness: float = 2.0, scope: str = "global", decay: str = "active", masters: bool = False,
        choice: str = "gradient", seed: int = 0,
        error_feedback: bool = False, residual_dtype: str = "float32", nonfinite: str = "raise", maximize: bool = False,
        capturable: bool = False, foreach: bool | None = None,
    ) -> None:  # fmt: skip
        if capturable:
            raise MisuseError(
                "ASPG cannot be captured in a graph: selection waits for the device; leave capturable out"
            )
        if foreach:
            raise MisuseError("ASPG has kernels of its own, no foreach; leave it out")
        if nonfinite not in ("raise", "skip"):
            raise MisuseError(f"nonfinite must be raise or skip, not {nonfinite!r}")
        self.nonfinite, self.skipped = nonfinite, 0
        self._tables: dict[tuple[float, float], tuple[list[float], list[float]]] = {}
        defaults = {
            "lr": lr, "density": density, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay,
            "style": style, "momentum": momentum, "dampening": dampening, "nesterov": nesterov,
            "refresh_every": refresh_every, "warmup_steps": warmup_steps, "stickiness": stickiness, "scope": scope,
            "decay": decay, "masters": masters, "maximize": maximize, "error_feedback": error_feedback,
            "residual_dtype": residual_dtype, "choice": choice, "seed": seed, "steps": 0, "chosen_density": 0.0,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the group counts its own steps and is selected from on its own."""
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except MisuseError:
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As in torch; groups that were saved before there was a choice had the one by gradients."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("choice", "gradient")
            group.setdefault("seed", 0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the closure's loss, if there is one.

        Raises:
            RefuseError: a gradient that would be used is infinite or NaN; nothing was changed.
            MisuseError: a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            plans = self._plans()
        except RefuseError:
            if self.nonfinite == "raise":
                raise
            self.skipped += 1
            return loss
        for group, plan in zip(self.param_groups, plans, strict=True):
            if plan:
                self._apply(group, plan)
        return loss

    # --- what will be done: reads only ---

    def _plans(self) -> list[list[tuple[Work, torch.Tensor]]]:
        works = [self._work(group) for group in self.param_groups]
        plans: dict[int, list[tuple[Work, torch.Tensor]]] = {}
        # Residuals are added to in place: last, when nothing can be refused any more.
        for feedback in (False, True):
            mine = [i for i, group in enumerate(self.param_groups) if group["error_feedback"] is feedback]
            if feedback:
                items = [item for i in mine for item in works[i]]
                residuals.check_sums([item[2] for item in items], [item[3].get("residual") for item in items])
                for i in mine:
                    works[i] = [self._compensated(self.param_groups[i], item) for item in works[i]]
            plans |= {i: self._plan(self.param_groups[i], works[i]) for i in mine}
        return [plans[i] for i in range(len(works))]

    def _work(self, group: dict[str, Any]) -> list[Work]:
        work: list[Work] = []
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.layout != torch.strided:
                raise MisuseError("ASPG takes dense gradients; for sparse embeddings use torch.optim.SparseAdam")
            weights, gradient = flat_pair(local(p), local(p.grad))
            work.append((p, weights, gradient, dict(self.state[p]) if p in self.state else _empty(weights)))
        return work

    def _compensated(self, group: dict[str, Any], item: Work) -> Work:
        p, weights, gradient, state = item
        if group["density"] == 1 and "residual" not in state:
            return item  # all is applied
        total = residuals.accumulate(gradient, state.get("residual"), group["residual_dtype"])
        return p, weights, total, {**state, "residual": total}

    def _plan(self, group: dict[str, Any], work: list[Work]) -> list[tuple[Work, torch.Tensor]]:
        """Each tensor with its state after selection and its gradient at the active cells. Changes nothing."""
        if self._due(group) or any(s["step"] == 0 for *_, s in work):
            parts = [work] if group["scope"] == "global" else [[w] for w in work]
            work = [done for part in parts for done in self._refresh(group, part)]
        plan = []
        for item in work:
            values, finite = kernels.gather(item[2], item[3]["positions"])
            if not finite:
                raise RefuseError("a gradient is infinite or NaN; nothing was changed. Skip this step, or clip before")
            plan.append((item, values))
        return plan

    @staticmethod
    def _due(group: dict[str, Any]) -> bool:
        now = group["steps"]
        again = group["choice"] == "gradient"
        early: bool = again and (now % group["refresh_every"] == 0 or now < group["warmup_steps"])
        return early or group["chosen_density"] != group["density"]

    def needed(self, p: torch.Tensor) -> torch.Tensor | None:
        """Which cells of ``p``'s gradient the next step looks at: positions in the order of memory, int32 [k], strictly
        increasing; None, if at all of them. Between selections the values of all others are of no account."""
        group = next((g for g in self.param_groups if any(p is q for q in g["params"])), None)
        if group is None or group["error_feedback"] or self._due(group):
            return None
        if any(q.requires_grad and q not in self.state for q in group["params"]):
            return None  # one that is new makes the whole group choose anew
        found: torch.Tensor = self.state[p]["positions"]
        return found

    def _refresh(self, group: dict[str, Any], work: list[Work]) -> list[Work]:
        gradients = [gradient for _, _, gradient, _ in work]
        if group["density"] == 1:
            return [self._moved(group, item, *_everything(item)) for item in work]
        k = max(1, round(group["density"] * sum(g.numel() for g in gradients)))
        if all(g.numel() == 0 for g in gradients):
            return [self._moved(group, item, *_everything(item)) for item in work]
        if group["choice"] == "random":
            random = np.random.default_rng((group["seed"], group["steps"]))
            drawn = draw([g.numel() for g in gradients], [s["positions"] for *_, s in work], k, random)
            return [self._moved(group, item, stay, new) for item, (stay, new) in zip(work, drawn, strict=True)]
        active = [Active(s["positions"], self._importance(group, g, s)) for _, _, g, s in work]
        hints = [s.get("threshold", 0.0) for *_, s in work if s["positions"].numel()]
        chosen = choose(gradients, active, k, min(hints, default=0.0))
        if chosen is None:
            raise RefuseError("a gradient is infinite or NaN; nothing was changed. Skip this step, or clip before")
        moved = [self._moved(group, item, stay, new) for item, (stay, new) in zip(work, chosen.parts, strict=True)]
        for *_, state in moved:
            state["threshold"] = chosen.threshold
        return moved

    def _importance(self, group: dict[str, Any], gradient: torch.Tensor, state: State) -> torch.Tensor:
        if group["error_feedback"]:  # what waits of the others has been added up, too
            return kernels.gather(gradient, state["positions"])[0].abs_().mul_(group["stickiness"])
        _, corrections = self._table(group, state["step"], state["exp_avg_sq"].device)
        return kernels.importance(
            state["exp_avg_sq"], state["entered"], state["step"], corrections, group["stickiness"]
        )  # fmt: skip

    def _moved(self, group: dict[str, Any], item: Work, stay: torch.Tensor, new: torch.Tensor) -> Work:
        p, weights, gradient, old = item
        if bool(stay.all()) and new.numel() == 0 and old["step"]:
            return item
        zeros = torch.zeros(new.numel(), dtype=torch.float32, device=new.device)
        entered = torch.full_like(new, old["step"] + 1)
        values = [(old["exp_avg"], zeros), (old["exp_avg_sq"], zeros), (old["entered"], entered)]
        if group["masters"] and weights.dtype != torch.float32:
            mine = old.get("masters", weights[old["positions"].long()].float())
            values.append((mine, weights[new.long()].float()))
        moved = kernels.merged(old["positions"], stay, new, values)
        state = {**old, **dict(zip((*_NAMES, "masters"), moved, strict=False))}
        return p, weights, gradient, state

    # --- doing it: nothing in here can be refused ---

    def _apply(self, group: dict[str, Any], plan: list[tuple[Work, torch.Tensor]]) -> None:
        group["steps"] += 1
        group["chosen_density"] = group["density"]
        lr = float(group["lr"])
        for (p, weights, _, state), values in plan:
            state["step"] += 1
            self.state[p] = state
            if "residual" in state:
                residuals.take_out(state["residual"], state["positions"])
            arrays = (values, state["exp_avg"], state["exp_avg_sq"], state["entered"])
            if group["style"] == "sgd":
                step = SGDStep(
                    lr, group["momentum"], group["dampening"], group["weight_decay"], group["nesterov"],
                    group["betas"][1], group["maximize"],
                )  # fmt: skip
                kernels.sgd(weights, state["positions"], *arrays, state["step"], step, state.get("masters"))
                continue
            shrink = 1 - lr * group["weight_decay"]
            if group["decay"] == "all" and shrink != 1:
                weights.mul_(shrink)
                if "masters" in state:
                    state["masters"].mul_(shrink)
            adam = self._adam(group, state["step"], lr, 1.0 if group["decay"] == "all" else shrink, weights.device)
            whole = state["positions"].numel() == weights.numel() and group["density"] == 1
            if whole and weights.dtype == torch.float32 and bool((state["entered"] == 1).all()):
                # torch's sqrt is not always the nearest float: where every cell steps, its own operations are AdamW's
                kernels.adam_everywhere(weights, values, state["exp_avg"], state["exp_avg_sq"], state["step"], lr, adam)
                continue
            kernels.adam(weights, state["positions"], *arrays, state["step"], adam, state.get("masters"))

    def _table(self, group: dict[str, Any], ages: int, device: torch.device) -> tuple[list[float], torch.Tensor]:
        """``1 - beta1^t`` and, float32, ``sqrt(1 - beta2^t)`` for t from 0 (not used) on."""
        beta1, beta2 = group["betas"]
        first, second = self._tables.setdefault((beta1, beta2), ([1.0], [1.0]))
        for age in range(len(first), min(ages, _AGES_MAX) + 1):
            first.append(1 - beta1**age)
            second.append((1 - beta2**age) ** 0.5)
        return first, torch.tensor(second, dtype=torch.float64).float().to(device)

    def _adam(self, group: dict[str, Any], ages: int, lr: float, decay: float, device: torch.device) -> AdamStep:
        first, corrections = self._table(group, ages, device)
        rates = (lr / torch.tensor(first, dtype=torch.float64)).float().to(device)
        beta1, beta2 = group["betas"]
        return AdamStep(rates, corrections, beta1, beta2, group["eps"], decay, group["maximize"])

    # --- state ---

    def active_cells(self) -> int:
        """How many cells are active, on this rank."""
        return sum(state["positions"].numel() for state in self.state.values())

    def state_bytes(self) -> int:
        """Bytes of all state tensors, on this rank."""
        tensors: Iterable[Any] = (x for state in self.state.values() for x in state.values())
        return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch: numbers of the groups come from the saved state, density among them. To go on with another
        density, set ``group["density"]`` afterwards; the set follows in the next step.

        Raises:
            MalformedError: positions that do not fit the parameters; nothing was changed.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        found = [(p, state_dict["state"][i]) for p, i in zip(params, ids, strict=False) if i in state_dict["state"]]
        for p, state in found:
            _check_state(state, local(p).numel())
        super().load_state_dict(state_dict)
        for p, state in found:  # torch's way would make all of it the parameter's data type
            self.state[p] = {
                name: x.detach().to(local(p).device, copy=True) if isinstance(x, torch.Tensor) else x
                for name, x in state.items()
            }


def _empty(weights: torch.Tensor) -> State:
    cells = torch.empty(0, dtype=torch.int32, device=weights.device)
    floats = torch.empty(0, dtype=torch.float32, device=weights.device)
    return {"step": 0, "positions": cells, "exp_avg": floats, "exp_avg_sq": floats, "entered": cells}


def _everything(item: Work) -> tuple[torch.Tensor, torch.Tensor]:
    """All cells that are active stay, and all others enter."""
    _, weights, _, state = item
    out = torch.ones(weights.numel(), dtype=torch.bool, device=weights.device)
    out[state["positions"].long()] = False
    return torch.ones_like(state["positions"], dtype=torch.bool), out.nonzero().flatten().int()


def _check_state(state: State, numel: int) -> None:
    at = state.get("positions")
    lengths = {x.numel() for name, x in state.items() if isinstance(x, torch.Tensor) and name != "residual"}
    if at is None or at.dtype != torch.int32 or len(lengths) != 1 or not set(_NAMES) <= set(state):
        raise MalformedError(
            "this is no state of ASPG, or parts of it are missing; save it with optimizer.state_dict()"
        )
    if at.numel() and not (int(at[0]) >= 0 and int(at[-1]) < numel and bool((at[1:] > at[:-1]).all())):
        raise MalformedError(
            f"active positions do not increase within a tensor of {numel} elements; is it this model's?"
        )
    if "residual" in state and state["residual"].numel() != numel:
        raise MalformedError(f"a residual of {state['residual'].numel()} elements for a tensor of {numel}")
    entered = state["entered"]
    if entered.dtype != torch.int32 or (
        at.numel() and not 1 <= int(entered.min()) <= int(entered.max()) <= state["step"]
    ):
        raise MalformedError("cells that entered in a step that has not been; the state is damaged")
    if any(state[name].dtype != torch.float32 for name in ("exp_avg", "exp_avg_sq")):
        raise MalformedError("moments are float32; the state is damaged")
