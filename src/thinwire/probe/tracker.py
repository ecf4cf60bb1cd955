"""Following a model while it is trained: which of its weights change, and how many of those rounding alone explains.

>>> model = torch.nn.Linear(64, 64).to(torch.bfloat16)
>>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
>>> tracker = SparsityTracker(model, optimizer=optimizer, null=True)
>>> for step in range(3):
...     model(torch.randn(8, 64).bfloat16()).square().mean().backward()
...     optimizer.step()
...     stats = tracker.step(step)
>>> 0 < stats.density < 0.9, stats.excess is not None
(True, True)
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from thinwire.errors import MisuseError
from thinwire.probe.changes import NO_WORDS, Changes, Limits, Words, plain_tensor
from thinwire.probe.frequency import ChangeFrequency
from thinwire.probe.history import History, rows_of
from thinwire.probe.kinds import Place, place_of, places_of
from thinwire.probe.snapshots import ExactSnapshot, FastSnapshot, Snapshot
from thinwire.probe.spatial import Structure, structure_of
from thinwire.probe.statistics import LagStats, StepStats
from thinwire.probe.tracker_null import TrackerNull

__all__ = ["SparsityTracker"]

Named = nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


class SparsityTracker:
    """Compares a model's parameters with what they were some steps ago, each time :meth:`step` is called.

    Args:
        model: a module, or tensors by name (a mapping is read anew in each step). Of names that share a tensor the
            first counts. Parameters that do not require gradients are left out, unless ``frozen``. Of a DTensor this
            rank's shard is measured; ``stats.reduce()`` adds up ranks.
        optimizer: the one that updates them; the null asks it for its class and hyperparameters.
        mode: ``exact`` keeps all weights, as they are viewed, once for each lag. ``fast`` keeps one byte a weight and
            lag, and knows how many changed but not by how much (:mod:`thinwire.probe.snapshots`).
        lags: compare with so many steps ago, at multiples of it; by default 1, 8, 32, in fast mode 1.
        threshold, relative, ulps: a change must be beyond all of them to count
            (:class:`thinwire.probe.changes.Limits`).
        null: measure the precision null beside (:mod:`thinwire.probe.null_simulation`). An optimiser that cannot be
            made of parameter groups alone is made by a callable given here.
        masters: what the optimiser updates, by the parameters' names, where parameters are views of it.
        gradient_rms: the size of the gradients by name, for optimisers that depend on it (SGD), if ``.grad`` is
            not there.
        frequency: count how often each weight changes: 2 bytes and 2 bits more a weight.
        spatial: keep where the last changes were, 1 bit a weight, for :meth:`structure`.
        every: measure in every so many calls only (the null follows all).
        view: measure floating-point parameters as this data type: fp32 masters as the bf16 that workers receive.
        log: a file to which the rows of each step are appended (:mod:`thinwire.probe.history`); else they are in
            memory.
        sample, seed: of the null.

    Raises:
        MisuseError: nothing to measure; lags, limits or modes that do not go together; a null without an optimiser.
    """

    def __init__(
        self,
        model: Named,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        mode: Literal["exact", "fast"] = "exact",
        lags: Sequence[int] | None = None,
        threshold: float = 0.0,
        relative: float = 0.0,
        ulps: int = 0,
        null: bool | Callable[[list[dict[str, Any]]], torch.optim.Optimizer] = False,
        masters: Mapping[str, Tensor] | None = None,
        gradient_rms: Mapping[str, float] | None = None,
        frequency: bool = False,
        spatial: bool = False,
        frozen: bool = False,
        every: int = 1,
        view: torch.dtype | None = None,
        log: str | os.PathLike[str] | None = None,
        sample: int = 1 << 16,
        seed: int = 0,
    ) -> None:
        if mode not in ("exact", "fast"):
            raise MisuseError(f"mode={mode!r}; known are exact and fast")
        self.lags = tuple(sorted(set(lags if lags is not None else (1,) if mode == "fast" else (1, 8, 32))))
        if not self.lags or self.lags[0] < 1 or every < 1:
            raise MisuseError(f"lags={self.lags}, every={every}; give numbers of steps of at least 1")
        self.limits = Limits(threshold, relative, ulps)
        if mode == "fast" and not self.limits.none:
            raise MisuseError("fast mode knows no differences; leave thresholds out, or use mode='exact'")
        self._model = model if isinstance(model, nn.Module | Mapping) else dict(model)
        self._kind: type[Snapshot] = ExactSnapshot if mode == "exact" else FastSnapshot
        self._mode, self._view, self._every, self._frozen = mode, view, every, frozen
        self._count = 0
        self._kept: dict[int, dict[str, Snapshot]] = {lag: {} for lag in self.lags}
        self._taken: dict[int, dict[str, int]] = {lag: {} for lag in self.lags}
        self._marks: dict[str, tuple[int, dict[str, Snapshot]]] = {}
        self._words: dict[str, Words] = {}
        self._spatial = spatial
        self.frequency: dict[str, ChangeFrequency] | None = {} if frequency else None
        self._places = places_of(self._model)
        tensors = self._current()
        if not tensors:
            raise MisuseError("there is nothing to measure: no parameter requires gradients (frozen=True measures all)")
        self._follow(tensors)
        self._null = None
        if null:
            make = None if null is True else null
            self._null = TrackerNull(
                tensors, optimizer, make, masters=masters, view=view, lags=self.lags, sample=sample, seed=seed,
                gradient_rms=gradient_rms,
            )  # fmt: skip
        self.history = History(log)

    # --- what is measured ---------------------------------------------------------------------------------------------

    def _current(self) -> dict[str, Tensor]:
        """The tensors of now, one name each."""
        if isinstance(self._model, nn.Module):
            named: Iterable[tuple[str, Tensor]] = self._model.named_parameters()
        else:
            named = self._model.items()
        found, seen = dict[str, Tensor](), set[Any]()
        for name, tensor in named:
            if not isinstance(tensor, Tensor):
                raise MisuseError(f"{name!r} is a {type(tensor).__name__}, not a tensor", name=name)
            if isinstance(tensor, nn.Parameter) and not tensor.requires_grad and not self._frozen:
                continue
            plain = plain_tensor(tensor)
            memory = (plain.data_ptr(), plain.dtype, tuple(plain.shape), plain.device)
            if plain.numel() and not tensor.is_complex() and memory in seen:
                continue
            seen.add(memory)
            found[name] = tensor
        return found

    def _follow(self, tensors: Mapping[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
        """Start with new tensors, forget old ones; names added, removed and restarted."""
        first = self._kept[self.lags[0]]
        removed = [name for name in first if name not in tensors]
        restarted = [name for name, tensor in tensors.items() if name in first and not first[name].fits(tensor)]
        added = [name for name in tensors if name not in first]
        for name in removed + restarted:
            for lag in self.lags:
                del self._kept[lag][name], self._taken[lag][name]
            self._words.pop(name, None)
            if self.frequency is not None:
                self.frequency.pop(name, None)
        for name in added + restarted:
            for lag in self.lags:
                self._kept[lag][name] = self._kind(tensors[name], self._view)
                self._taken[lag][name] = self._count
            elements = plain_tensor(tensors[name]).numel()
            if self._spatial or self.frequency is not None:
                self._words[name] = np.zeros(-(-elements // 64), np.uint64)
            if self.frequency is not None:
                self.frequency[name] = ChangeFrequency(elements)
            if name not in self._places:
                self._places[name] = place_of(name)
        return added, removed, restarted

    # --- a step -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, step: int | None = None) -> StepStats:
        """Measure, after an optimiser's step; ``step`` is the number to report, by default that of the call, from 1 on.

        Raises:
            MisuseError: a tensor that cannot be measured; a null that needs gradients and finds none.
        """
        started = time.perf_counter()
        self._count += 1
        number = self._count if step is None else step
        tensors = self._current()
        nulls = {} if self._null is None else self._null.step()
        added, removed, restarted = self._follow(tensors)
        lags: dict[int, LagStats] = {}
        for lag in self.lags:
            period = lag * -(-self._every // lag)
            if self._count % period == 0:
                found = {name: c for name, t in tensors.items() if (c := self._measure(lag, name, t)) is not None}
                lags[lag] = LagStats(lag, found, self._places_of(found), nulls.get(lag))
            elif (self._count + lag) % period == 0:
                for name, tensor in tensors.items():
                    self._kept[lag][name].renew(tensor)
                    self._taken[lag][name] = self._count
        about = (tuple(added), tuple(removed), tuple(restarted))
        stats = StepStats(number, lags, *about, time.perf_counter() - started)
        if lags:
            self.history.append(number, rows_of(stats))
        return stats

    def _measure(self, lag: int, name: str, tensor: Tensor) -> Changes | None:
        """What changed in exactly ``lag`` steps; None if what is kept is not that old."""
        words = self._words.get(name, NO_WORDS) if lag == self.lags[0] else NO_WORDS
        found = self._kept[lag][name].compare(tensor, self.limits, renew=True, words=words)
        exact = self._count - self._taken[lag][name] == lag
        self._taken[lag][name] = self._count
        if exact and words.size and self.frequency is not None:
            self.frequency[name].update(words)
        return found if exact else None

    def _places_of(self, names: Iterable[str]) -> dict[str, Place]:
        return {name: self._places[name] for name in names}

    # --- further questions --------------------------------------------------------------------------------------------

    def mark(self, name: str) -> None:
        """Keep the weights of now under a name, as another snapshot; a mark of this name is replaced."""
        self._marks[name] = (self._count, {n: self._kind(t, self._view) for n, t in self._current().items()})

    def since(self, name: str) -> LagStats:
        """What changed since a mark; ``lag`` is the number of steps since. Tensors that are new or others are left out.

        Raises:
            MisuseError: there is no such mark.
        """
        if name not in self._marks:
            raise MisuseError(f"there is no mark {name!r}; marks are {', '.join(self._marks) or 'none'}", name=name)
        count, kept = self._marks[name]
        tensors = {n: t for n, t in self._current().items() if n in kept and kept[n].fits(t)}
        found = {n: kept[n].compare(t, self.limits, renew=False) for n, t in tensors.items()}
        return LagStats(self._count - count, found, self._places_of(found))

    def structure(self, name: str, *, heads: int | None = None, permutations: int = 199, seed: int = 0) -> Structure:
        """Whether the last changes of a matrix lie in rows, columns or heads: see :mod:`thinwire.probe.spatial`.

        Raises:
            MisuseError: neither ``spatial`` nor ``frequency`` was asked for, or there is no such matrix.
        """
        tensor = self._current().get(name)
        if tensor is None or name not in self._words:
            raise MisuseError(f"no positions are kept of {name!r}; make the tracker with spatial=True", name=name)
        return structure_of(self._words[name], plain_tensor(tensor), heads=heads, permutations=permutations, seed=seed)

    @property
    def nbytes(self) -> int:
        """Bytes that the tracker keeps of the weights, without its null and its history."""
        kept = [s for by_name in self._kept.values() for s in by_name.values()]
        kept += [s for _, by_name in self._marks.values() for s in by_name.values()]
        masks = sum(words.nbytes for words in self._words.values())
        return sum(s.nbytes for s in kept) + masks + sum(f.nbytes for f in (self.frequency or {}).values())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all rows (:meth:`thinwire.probe.history.History.save`)."""
        self.history.save(path)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the history (:func:`thinwire.probe.plots.history_figure`)."""
        from thinwire.probe.plots import history_figure

        history_figure(list(self.history.rows()), path)

    # --- going on elsewhere -------------------------------------------------------------------------------------------

    def _configuration(self) -> dict[str, Any]:
        return {
            "mode": self._mode, "lags": list(self.lags), "view": str(self._view), "every": self._every,
            "limits": [self.limits.absolute, self.limits.relative, self.limits.ulps],
            "frequency": self.frequency is not None, "null": self._null is not None,
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on, for ``torch.save``: snapshots with their digests, marks, counters,
        the null. The history stays in its log."""
        return {
            "configuration": self._configuration(),
            "count": self._count,
            "kept": {lag: {n: s.state_dict() for n, s in by_name.items()} for lag, by_name in self._kept.items()},
            "taken": {lag: dict(taken) for lag, taken in self._taken.items()},
            "marks": {
                mark: (count, {n: s.state_dict() for n, s in kept.items()})
                for mark, (count, kept) in self._marks.items()
            },
            "frequency": {n: f.state_dict() for n, f in (self.frequency or {}).items()},
            "null": None if self._null is None else self._null.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the tracker of a model with the same parameters was; the weights may have changed since.

        Raises:
            MisuseError: another configuration, other names, shapes or data types, or bytes that are not what they were.
        """
        if state["configuration"] != self._configuration():
            raise MisuseError(
                f"the saved tracker is another: {state['configuration']}, this is {self._configuration()}"
            )
        tensors = self._current()
        names = {name for by_name in state["kept"].values() for name in by_name}
        if names != set(tensors):
            odd = sorted(names ^ set(tensors))
            raise MisuseError(f"the saved tracker followed other parameters; they differ in {', '.join(odd[:5])}")
        kept = {lag: self._loaded(by_name, tensors) for lag, by_name in state["kept"].items()}
        marks = {
            mark: (count, self._loaded({n: s for n, s in saved.items() if n in tensors}, tensors))
            for mark, (count, saved) in state["marks"].items()
        }
        if self._null is not None:
            self._null.load_state_dict(state["null"])
        for name, saved in state["frequency"].items():
            assert self.frequency is not None  # as the configurations are equal
            self.frequency[name].load_state_dict(saved)
        self._kept, self._marks, self._count = kept, marks, int(state["count"])
        self._taken = {lag: dict(taken) for lag, taken in state["taken"].items()}

    def _loaded(self, states: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Snapshot]:
        found = {}
        for name, saved in states.items():
            found[name] = self._kind(tensors[name], self._view)
            found[name].load_state_dict(saved)
        return found
