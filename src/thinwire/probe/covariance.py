"""The spectrum of gradients over many batches: in how few directions do they lie?

k gradients of P weights have a k x k Gram matrix, whose eigenvalues are those of their covariance (times k), however
large P is. Keeping the gradients takes k P numbers; :class:`GradientCovariance` keeps ``sketch`` numbers of each.

**The sketch.** Weight j of block b adds ``sign_j`` times its gradient to bucket ``(j + shift_b) mod s``, with random
signs and shifts that only the seed decides: CountSketch (Charikar, Chen and Farach-Colton 2002), but weights of one
block never share a bucket. Dot products of sketches are unbiased, and as two weights meet in a bucket with probability
1/s at most,

    variance of <Sx, Sy>  <=  (|x|^2 |y|^2 + <x, y>^2) / s,

so that by Chebyshev's inequality ``|<Sx, Sy> - <x, y>| <= |x| |y| sqrt(2 / (s delta))`` with probability 1 - delta.
The squared norms on the diagonal are exact.

>>> from thinwire.probe.rank import rank_of
>>> covariance = GradientCovariance(sketch=None)  # three multiples of one gradient
>>> for sign in (1.0, -1.0, 2.0):
...     covariance.update({"weight": sign * torch.arange(100.0)})
>>> round(rank_of(covariance.spectrum(), "stable"), 3)
1.0
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from thinwire.errors import MisuseError
from thinwire.probe.spectrum import Spectrum, spectrum_of_gram

__all__ = ["GradientCovariance", "gradients_of"]


def gradients_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """The gradients of a model's parameters by name; tied ones once, frozen ones not, zeros where there is none yet."""
    return {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


class GradientCovariance:
    """Dot products between gradients that come one at a time.

    ``sketch``: numbers kept of each, a power of two is fastest; None keeps them whole, in float32 on the host, and is
    exact. Memory is ``sketch`` floats a gradient and as many again while one comes in, whatever the model's size.

    Raises:
        MisuseError: ``sketch`` is less than 1.
    """

    def __init__(self, sketch: int | None = 65536, *, seed: int = 0) -> None:
        if sketch is not None and sketch < 1:
            raise MisuseError(f"a sketch keeps 1 number or more, not {sketch}", sketch=sketch)
        self._sketch, self._seed = sketch, seed
        self._shapes: dict[str, tuple[int, ...]] | None = None
        self._rows: list[Tensor] = []
        self._norms: list[float] = []

    def __len__(self) -> int:
        """Gradients taken in."""
        return len(self._rows)

    def update(self, gradients: torch.nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Take in one gradient: a model's, or named tensors, the same names and shapes each time, in any order.

        Raises:
            MisuseError: names or shapes differ from the first gradient's; NaN or infinity (with the name); no reals.
        """
        named = dict(gradients_of(gradients) if isinstance(gradients, torch.nn.Module) else gradients)
        shapes = {name: tuple(tensor.shape) for name, tensor in sorted(named.items())}
        if self._shapes is not None and shapes != self._shapes:
            other = sorted(set(shapes.items()) ^ set(self._shapes.items()))[0][0]
            raise MisuseError(f"gradients keep their names and shapes; {other!r} is new, gone or reshaped", name=other)
        norm = 0.0
        for name, tensor in named.items():
            if tensor.is_complex() or not tensor.is_floating_point():
                raise MisuseError(f"the gradient of {name!r} is {tensor.dtype}, not of real floats", name=name)
            part = float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64).square())
            if not math.isfinite(part):
                raise MisuseError(f"the gradient of {name!r} holds NaN or infinity; skip this batch", name=name)
            norm += part
        # all is checked: now it counts
        self._shapes = shapes
        flat = (named[name].detach().reshape(-1) for name in shapes)
        self._rows.append(self._whole(flat) if self._sketch is None else self._sketched(flat, self._sketch))
        self._norms.append(norm)

    def gram(self, *, centred: bool = False) -> Tensor:
        """Dot products of all gradients [k, k], float64; ``centred`` takes their mean away first."""
        count = len(self._rows)
        gram = torch.zeros(count, count, dtype=torch.float64)
        for i, row in enumerate(self._rows):
            for j in range(i):
                gram[i, j] = gram[j, i] = float(torch.dot(row.double(), self._rows[j].double()))
            gram[i, i] = self._norms[i]
        if centred and count:
            gram = gram - gram.mean(dim=0) - gram.mean(dim=1, keepdim=True) + gram.mean()
        return gram

    def spectrum(self, *, centred: bool = False) -> Spectrum:
        """Singular values of the k x P stack of gradients, for :func:`thinwire.probe.rank.rank_of`.

        Squared and divided by k they are the eigenvalues of the second moment (``centred``: of the covariance).
        """
        return spectrum_of_gram(self.gram(centred=centred))

    def error(self, delta: float = 0.05) -> float:
        """The bound on a dot product's error, as a share of the two norms, that holds with probability 1 - ``delta``.

        Raises:
            MisuseError: ``delta`` is not in (0, 1].
        """
        if not 0 < delta <= 1:
            raise MisuseError(f"delta is {delta}; use more than 0 and at most 1", delta=delta)
        return 0.0 if self._sketch is None else math.sqrt(2 / (self._sketch * delta))

    @staticmethod
    def _whole(tensors: Iterable[Tensor]) -> Tensor:
        parts = [tensor.to("cpu", torch.float32) for tensor in tensors]
        return torch.cat(parts) if parts else torch.zeros(0)

    def _sketched(self, tensors: Iterable[Tensor], size: int) -> Tensor:
        """Blocks of ``size`` weights, each with signs and a shift of its own; tensors begin blocks of their own."""
        generator = torch.Generator().manual_seed(self._seed)
        total = torch.zeros(size, dtype=torch.float64)
        for tensor in tensors:
            for part in torch.split(tensor, size) if tensor.numel() else ():
                width = part.numel()
                bits = torch.randint(0, 256, (-(-width // 8),), generator=generator, dtype=torch.uint8)
                signs = 1.0 - 2.0 * _unpack(bits)[:width]
                shift = int(torch.randint(0, size, (), generator=generator))
                signed = part.to("cpu", torch.float32) * signs
                first = min(width, size - shift)
                total[shift : shift + first] += signed[:first]
                total[: width - first] += signed[first:]
        return total.float()


_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


def _unpack(packed: Tensor) -> Tensor:
    """Eight bits of each byte as 0.0 or 1.0."""
    return (packed[:, None] & _BITS).ne(0).reshape(-1).float()
