"""Whether it pays to predict a weight's next step from its last one, beside the hot/cold context.

Adam's steps resemble each other, so a hot weight's new value may be guessed as ``old + factor * (old - older)``, in
float32 and rounded, and the distance from the guess be coded instead of the step. Both sides would have to hold the
weights of two versions. Here the streams of one patch over all tensors are coded both ways, with the coder of the
patches; nothing else of a patch would change. Weights that were zero in the first version are counted apart: for some
steps they stay so small that each next one is thousands of units in the last place long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.table import Table

from thinwire.bench.measure import load, machine, versions
from thinwire.errors import MisuseError
from thinwire.tensors.bits import cells_of
from thinwire.wire import rans
from thinwire.wire.context import COLD, ContextWriter, Histogram, choose_bounds
from thinwire.wire.positions import gaps_of
from thinwire.wire.spec import DTYPES
from thinwire.wire.values import steps

__all__ = ["guess", "momentum_markdown", "momentum_table", "run_momentum"]

Row = dict[str, Any]
Cells = npt.NDArray[np.uint16]
_BF16 = DTYPES["BF16"]
_MAGNITUDE = 0x7FFF


def guess(old: Cells, older: Cells, factor: float) -> Cells:
    """``old + factor * (old - older)`` of bf16 cells [n], in float32, rounded; ``old`` where that is not finite.

    >>> one, two, three = torch.tensor([[1.0], [2.0], [3.0]]).bfloat16().view(torch.uint16).numpy()
    >>> bool(guess(two, one, 1.0) == three)
    True
    """
    wide, before = ((x.astype(np.uint32) << 16).view(np.float32) for x in (old, older))
    with np.errstate(all="ignore"):
        found = wide + np.float32(factor) * (wide - before)
    cells = torch.from_numpy(found).to(torch.bfloat16).view(torch.uint16).numpy()
    return np.where(np.isfinite(found), cells, old)


@dataclass(frozen=True, slots=True)
class _Patch:
    """The changes between two states: positions, old and new cells, and the class of each change."""

    positions: npt.NDArray[np.uint32]
    old: Cells
    new: Cells
    classes: npt.NDArray[np.uint8]
    gaps: npt.NDArray[np.uint32]

    def coded(self, stream: npt.NDArray[Any], chosen: npt.NDArray[np.bool_] | None = None) -> int:
        """Bytes of a stream, each class's values apart; of ``chosen`` changes alone."""
        total = 0
        for k in np.unique(self.classes):
            member = self.classes == k
            if chosen is not None:
                member &= chosen
            if member.any():
                total += len(rans.encode(stream[member], rans.EFFORT_SMALL))
        return total


def _between(old: Cells, new: Cells) -> _Patch:
    positions = np.flatnonzero(old != new).astype(np.uint32)
    histogram = Histogram(_BF16)
    histogram.add(old, new, stride=1)
    bounds = choose_bounds(histogram)
    classes, gaps = np.full(positions.size, COLD, np.uint8), gaps_of(positions, 0)
    if bounds:
        ContextWriter(_BF16, bounds).add(old, 0, positions, 0, positions.size, classes, gaps)
    return _Patch(positions, old[positions], new[positions], classes, gaps)


def _row(patch: _Patch, first: Cells, older: Cells, factors: Sequence[float]) -> Row:
    count, hot = patch.positions.size, patch.classes != COLD
    zero = (first[patch.positions] & _MAGNITUDE) == 0
    plain = steps(patch.old, patch.new, is_float=True)
    row: Row = {
        "changed": count, "hot": round(float(hot.mean()), 4), "were_zero": int(zero.sum()),
        "positions": round(patch.coded(patch.gaps) / count, 4), "values": round(patch.coded(plain) / count, 4),
        "values_not_zero": round(patch.coded(plain, ~zero) / max(1, int((~zero).sum())), 4),
        "guessed": {}, "guessed_not_zero": {},
    }  # fmt: skip
    for factor in factors:
        base = np.where(hot, guess(patch.old, older[patch.positions], factor), patch.old)
        codes = steps(base, patch.new, is_float=True)
        row["guessed"][str(factor)] = round(patch.coded(codes) / count, 4)
        row["guessed_not_zero"][str(factor)] = round(patch.coded(codes, ~zero) / max(1, int((~zero).sum())), 4)
    for name, values in (("share", "values"), ("share_not_zero", "values_not_zero")):
        best = min(row["guessed" + values.removeprefix("values")].values())
        row[name] = round((row["positions"] + best) / (row["positions"] + row[values]), 4)
    return row


def run_momentum(
    states: Iterable[Mapping[str, torch.Tensor]],
    source: str,
    *,
    factors: Sequence[float] = (0.7, 0.8, 0.9, 1.0),
    report: Callable[[str], None] = lambda _: None,
) -> Iterator[Row]:
    """A row for every version from the third on: bytes a change of positions and values, with and without the guess.

    ``share`` is what the patch would be of what it is; ``*_not_zero`` leave out the weights that were zero at first.

    Raises:
        MisuseError: the states are not bf16 throughout.
    """
    older: Cells | None = None
    old: Cells | None = None
    first: Cells | None = None
    common = {"bench": "momentum", "source": source, "machine": machine(), "versions": versions()}
    for step, state in enumerate(states):
        report(f"{source}: version {step + 1}")
        if any(tensor.dtype != torch.bfloat16 for tensor in state.values()):
            raise MisuseError("the versions must be bf16 throughout")
        new = np.concatenate([cells_of(tensor) for _, tensor in sorted(state.items())])
        first = new if first is None else first
        if old is not None and older is not None and (old != new).any():
            yield {
                **common,
                "step": step,
                "elements": new.size,
                "load": load(),
                **_row(_between(old, new), first, older, factors),
            }
        older, old = old, new


def momentum_table(rows: Sequence[Row]) -> Table:
    """One line a version."""
    table = Table(title="Bytes a change: steps, and distances from a guess", title_justify="left")
    for heading in (
        "step", "changed", "were zero", "positions", "values", "guessed", "patch", "values, not zero",
        "guessed, not zero", "patch, not zero",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row["step"]), f"{row['changed']:,}", f"{row['were_zero'] / row['changed']:.0%}",
            f"{row['positions']:.3f}", f"{row['values']:.3f}", f"{min(row['guessed'].values()):.3f}",
            f"{row['share']:.0%}", f"{row['values_not_zero']:.3f}", f"{min(row['guessed_not_zero'].values()):.3f}",
            f"{row['share_not_zero']:.0%}",
        )  # fmt: skip
    return table


def momentum_markdown(rows: Sequence[Row], steps: Sequence[int] = (2, 4, 8, 12, 16, 20)) -> str:
    """The table for the documentation: some steps of each source."""
    lines = [
        "| versions of | step | changed | were zero at first | positions | values | guessed | patch "
        "| values, others | guessed, others | patch, others |",
        "|---|" + "---:|" * 10,
    ]
    for row in rows:
        if row["step"] in steps:
            cells = (
                f"{row['changed']:,}", f"{row['were_zero'] / row['changed']:.0%}", f"{row['positions']:.3f}",
                f"{row['values']:.3f}", f"{min(row['guessed'].values()):.3f}", f"{row['share']:.0%}",
                f"{row['values_not_zero']:.3f}", f"{min(row['guessed_not_zero'].values()):.3f}",
                f"{row['share_not_zero']:.0%}",
            )  # fmt: skip
            lines.append(f"| {row['source']} | {row['step']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
