"""One model that serves many fine-tunes of its base: tasks are switched in place, and the base comes back bit for bit.

A task costs memory and time by its *changed* weights. Names follow PEFT where the meaning is the same
(``load_adapter``, ``set_adapter``, ``disable_adapter``, ``delete_adapter``), though nothing is low-rank here.

>>> from thinwire.sync.encode import make_patch, take_snapshot
>>> from thinwire.sync.layout import StateSource
>>> from thinwire.tensors.tree import state_of
>>> model, tuned = torch.nn.Linear(3, 1, bias=False), torch.nn.Linear(3, 1, bias=False)
>>> _ = torch.nn.init.constant_(model.weight, 1.0), torch.nn.init.constant_(tuned.weight, 2.0)
>>> snapshot = take_snapshot(StateSource(state_of(model)))
>>> router = SparseTaskRouter(model, {"double": make_patch(snapshot, StateSource(state_of(tuned)))})
>>> with router.task("double"):
...     model(torch.ones(1, 3)).tolist()
[[6.0]]
>>> router.forward(torch.ones(2, 3), task_id=["double", None]).tolist()
[[6.0], [3.0]]
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from thinwire.errors import MisuseError
from thinwire.integrations.batches import groups_of, join_rows, take_rows
from thinwire.integrations.overlay import Model, Names, Overlay, Stack, Task
from thinwire.integrations.task_store import TaskStore
from thinwire.integrations.turns import Turns
from thinwire.merge.delta import TensorDelta
from thinwire.merge.recipe import layers_of, recipe_of
from thinwire.merge.tensor import merge_tensor, surveyed
from thinwire.sync.files import map_private
from thinwire.wire.patch import Patch
from thinwire.wire.spec import TABLE_BYTES_MAX

__all__ = ["SparseTaskRouter", "TaskSource"]

TaskSource = Patch | str | os.PathLike[str]
"""A patch, or the path of a patch file (``thinwire diff BASE TUNED -o FILE``)."""


class SparseTaskRouter:
    """Puts tasks on ``model`` and takes them off again, in place.

    Args:
        model: the base: a module (on any device), or a state dict. Its tensors must stay where they are.
        tasks: patches from the base, by name; all must start from exactly these weights.
        names: maps the tensors' names in the patches to those in the model, where they differ.
        store: where tasks that are not loaded are looked for when they are first asked for (:class:`TaskStore`).
        timeout_s: how long a thread waits for others that use another task.

    Threads that want the same task use it at once; those that want another one wait their turn. What calls the model
    outside of :meth:`task`, :meth:`disable_adapter` and :meth:`forward` is not protected from them.

    The memory of the parameters stays the same, so that compiled models and captured graphs see each switch. Autograd
    sees it too: a backward pass after a switch of what the forward pass has saved raises, instead of being wrong.

    Raises:
        WrongBaseError: a patch starts from other weights than the model's; both digests are named.
        MisuseError: a patch adds, removes or reshapes tensors, or the model has others.
        MalformedError, UnsupportedError: a patch is damaged.
    """

    def __init__(
        self,
        model: Model,
        tasks: Mapping[str, TaskSource] | None = None,
        *,
        names: Names | None = None,
        store: TaskStore | str | os.PathLike[str] | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        self.model = model
        self.store = TaskStore(store) if isinstance(store, str | os.PathLike) else store
        self._overlay = Overlay(model, names)
        self._turns = Turns(self._overlay.switch, timeout_s=timeout_s)
        for name, source in (tasks or {}).items():
            self.load_adapter(source, name)

    # --- what there is ---------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> dict[str, Task]:
        """The loaded tasks by name: their changes, their size in memory, the digest of the weights they make."""
        return dict(self._overlay.tasks)

    @property
    def active_adapters(self) -> list[str]:
        """The tasks that are on the model now; later ones overwrite earlier ones."""
        return list(self._turns.state)

    def digest(self, hash_name: str = "blake3") -> str:
        """Digest of the model as it is now, hashed from its memory; with no task on, that of the base.

        Raises:
            MisuseError: no task has been loaded yet.
        """
        with self._turns.at(self._here()):
            return self._overlay.tree(hash_name).digest

    # --- loading ---------------------------------------------------------------------------------------------------

    def load_adapter(self, source: TaskSource, adapter_name: str, *, replace: bool = False) -> Task:
        """Add a task, proved: the base must be the patch's parent, and the result is hashed.

        With ``replace`` it takes the place of the one of this name, also where that is active (PEFT's hot-swap).

        Raises:
            MisuseError: there is a task of this name already; a patch or a model that does not suit.
            WrongBaseError, MalformedError, UnsupportedError: as on construction; the tasks stay as they were.
            RetryError: other threads did not leave their tasks in time.
        """
        patch = source if isinstance(source, Patch) else _read(Path(source))
        with self._turns.at(()):
            if adapter_name in self._overlay.tasks and not replace:
                raise MisuseError(f"there is a task {adapter_name!r} already; replace=True swaps it", task=adapter_name)
            task = self._overlay.read(patch)
            self._overlay.tasks[adapter_name] = task
        return task

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "task_arithmetic",
        **settings: Any,
    ) -> Task:
        """Merge loaded tasks into a new one, in sparse space: a weighted sum, or any other method by its name.

        ``settings`` are the method's parameters, such as ``density`` (:func:`thinwire.merge.recipe.recipe_of`).

        Raises:
            MisuseError: a task, a method or a parameter is not there; not one weight a task; the name is taken; or the
                tasks cannot be merged.
            RetryError: other threads did not leave their tasks in time.
        """
        if len(adapters) != len(weights):
            raise MisuseError(f"{len(adapters)} tasks have {len(weights)} weights; give each one")
        self._ensure(adapters)
        with self._turns.at(()):
            tasks = self._overlay.tasks
            for name in adapters:
                if name not in tasks:
                    raise MisuseError(f"there is no task {name!r}; known are {sorted(tasks)[:10]}", task=name)
            if adapter_name in tasks:
                raise MisuseError(f"there is a task {adapter_name!r} already", task=adapter_name)
            merged = _merged([tasks[name] for name in adapters], combination_type, weights, settings)
            tasks[adapter_name] = task = self._overlay.prepared(merged)
        return task

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget a task and free its memory.

        Raises:
            MisuseError: there is no such task, or it is active.
        """
        with self._turns.at(()):
            if adapter_name in self._turns.resident:
                raise MisuseError(f"{adapter_name!r} is active; set_adapter(None) first", task=adapter_name)
            if self._overlay.tasks.pop(adapter_name, None) is None:
                raise MisuseError(f"there is no task {adapter_name!r}", task=adapter_name)

    def _ensure(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self._overlay.tasks and self.store is not None:
                tensors = self.model.state_dict() if isinstance(self.model, torch.nn.Module) else self.model
                size_max = 2 * sum(t.nbytes for t in tensors.values()) + TABLE_BYTES_MAX
                self.load_adapter(self.store.get(name, size_max=size_max), name, replace=True)

    # --- switching -------------------------------------------------------------------------------------------------

    def _here(self) -> Stack:
        mine = self._turns.mine()
        return self._turns.resident if mine is None else mine

    @contextmanager
    def task(self, *names: str) -> Iterator[SparseTaskRouter]:
        """Tasks on the model within the context; exactly what was there before is there again at its end.

        Of several, later ones overwrite earlier ones where they change the same weights. The outermost context of a
        thread starts from the base, whatever :meth:`set_adapter` chose; one inside another adds to it.

        Raises:
            MisuseError: there is no such task, and no store that has it.
            RetryError: other threads used other tasks for longer than ``timeout_s``.
        """
        self._ensure(names)
        with self._turns.at((self._turns.mine() or ()) + names):
            yield self

    @contextmanager
    def disable_adapter(self) -> Iterator[SparseTaskRouter]:
        """The base within the context, whatever is active outside.

        Raises:
            RetryError: other threads used tasks for longer than ``timeout_s``.
        """
        with self._turns.at(()):
            yield self

    def set_adapter(self, adapter_name: str | Sequence[str] | None) -> None:
        """Make a task (or several, later ones over earlier ones) active until further notice; None is the base.

        Raises:
            MisuseError: there is no such task, or the thread is in a task's context.
            RetryError: other threads used other tasks for longer than ``timeout_s``.
        """
        chosen = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name or ())
        self._ensure(chosen)
        self._turns.settle(chosen)

    # --- running ---------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, task_id: str | Sequence[str | None] | None = None, **kwargs: Any) -> Any:
        """Call the model with a task, or each row of a batch with its own.

        ``task_id`` is a task for the whole batch, or one for each row (None: what is active otherwise). Rows of one
        task run together; tensors with as many rows as ``task_id`` has entries are split, others are passed as they
        are. The outputs are put together in the order of the rows.

        Raises:
            MisuseError: the model is not callable; an output cannot be put together (a loss, a cache).
            RetryError: other threads used other tasks for longer than ``timeout_s``.
        """
        if not isinstance(self.model, torch.nn.Module):
            raise MisuseError("the router holds a state dict, which cannot be called; give it the module")
        if task_id is None:
            with self._turns.at(self._here()):
                return self.model(*args, **kwargs)
        if isinstance(task_id, str):
            with self.task(task_id):
                return self.model(*args, **kwargs)
        groups = groups_of(task_id)
        parts = []
        for name, rows in groups.items():
            mine = take_rows((args, kwargs), rows, len(task_id)) if len(groups) > 1 else (args, kwargs)
            parts.append(self.forward(*mine[0], task_id=name, **mine[1]))
        if not parts:
            raise MisuseError("task_id is empty: give one task for each row")
        return join_rows(parts, list(groups.values()))

    __call__ = forward


def _merged(
    tasks: Sequence[Task], method: str, weights: Sequence[float], settings: Mapping[str, Any]
) -> dict[str, TensorDelta]:
    like = {name: delta for task in tasks for name, delta in task.deltas.items()}
    recipe = recipe_of(method, len(tasks), weight=list(weights), layers=layers_of(like), **settings)

    def deltas(name: str) -> list[TensorDelta]:
        d = like[name]
        none = TensorDelta(d.dtype, d.shape, d.positions[:0], d.base[:0], d.new[:0])
        return [task.deltas.get(name, none) for task in tasks]

    recipe = surveyed(recipe, ((name, deltas(name)) for name in like))
    return {name: merge_tensor(name, deltas(name), recipe) for name in like}


def _read(path: Path) -> Patch:
    if not path.is_file():
        raise MisuseError(f"there is no patch {path}", path=str(path))
    return Patch.parse(map_private(path) if path.stat().st_size else b"")  # type: ignore[arg-type]
