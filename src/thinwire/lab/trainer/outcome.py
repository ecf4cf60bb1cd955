"""What any run ends with: facts, weights in a file, and their digest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from thinwire.sync.encode import take_snapshot
from thinwire.sync.files import staged_file
from thinwire.sync.layout import StateSource
from thinwire.tensors.tree import state_of

__all__ = ["Outcome", "weights_digest", "write_text", "write_weights"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A run's result, whatever was trained. ``bytes_*`` are one worker's gradient payload over the whole run;
    ``digest`` is that of the final weights and buffers, as ``thinwire inspect --digest`` tells it. ``finished`` is
    False after ``stop_after``."""

    config: dict[str, Any]
    workers: int
    device: str
    parameters: int
    steps: int
    finished: bool
    bytes_received: int
    bytes_sent: int
    bytes_dense: int
    seconds: float
    digest: str

    @property
    def saved(self) -> float:
        """Share of the bytes of an uncompressed run that were not received."""
        return 1 - self.bytes_received / self.bytes_dense if self.bytes_dense else 0.0


def weights_digest(model: nn.Module) -> str:
    """Digest of all parameters and buffers as they lie in memory; tied ones count once."""
    return take_snapshot(StateSource(state_of(_tensors(model))), threads=1).tree.digest


def write_weights(path: Path, model: nn.Module) -> None:
    """Parameters and buffers as a safetensors file, which is there whole or not at all; tied ones are written once,
    under their first name, from which Transformers ties them again."""
    from safetensors.torch import save_file

    tensors: dict[str, Any] = _tensors(model)
    with staged_file(path) as temporary:
        save_file(tensors, str(temporary))


def write_text(path: Path, text: str) -> None:
    """A text file, which is there whole or not at all."""
    with staged_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        found[name] = tensor.cpu().contiguous()
    return found
