"""How curved an objective is around a policy's weights: trace, largest eigenvalue, curvature along the gradient.

Three matrices, of which only products with vectors are ever computed (Pearlmutter 1994), each twice differentiated
backwards:

===========  ==================================  =====================================================================
kind         matrix                              what it says
===========  ==================================  =====================================================================
``hessian``  second derivatives of a loss        how fast the gradient turns; of a policy-gradient loss it has
                                                 negative eigenvalues as well
``fisher``   mean of g_i g_i^T, g_i the          how fast the policy itself moves: with answers that the policy
             gradient of an answer's             sampled, an unbiased estimate of its Fisher matrix (Kakade 2001);
             log-probability                     its eigenvalues are those of the tangent kernel, divided by n
``ggn``      J^T H J, J the derivative of        the Hessian without the curvature of the model (Schraudolph 2002)
             outputs, H the loss's Hessian
             by them
===========  ==================================  =====================================================================

>>> layer = torch.nn.Linear(3, 1, bias=False)
>>> found = curvature(layer, lambda model, batch: model(batch).square().mean(), [torch.eye(3)])
>>> round(found.trace, 4), round(found.largest, 4)  # 2/3 in each of three directions
(2.0, 0.6667)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from thinwire.errors import MisuseError
from thinwire.probe.estimators import hutch_plus_plus, hutchinson, lanczos
from thinwire.probe.functional import StandIn, Weights, differentiable, trainable, widened

__all__ = ["Curvature", "CurvatureOperator", "Matrix", "curvature"]

Matrix = Literal["hessian", "fisher", "ggn"]
Objective = Callable[[Any, Any], Tensor]
Loss = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True, slots=True)
class Curvature:
    """What was found of a curvature matrix of ``size`` weights.

    ``trace`` with its standard error and the interval that holds it with the confidence asked for; ``largest`` and
    ``smallest`` eigenvalue, each with a residual: an eigenvalue is at most that far away. ``gradient_norm`` is that of
    the mean loss, and ``along_gradient`` the curvature in its direction, g^T A g / g^T g (both NaN where the matrix
    has no loss; the latter where the gradient is 0). ``products`` with the matrix were made.
    """

    kind: Matrix
    size: int
    trace: float
    trace_error: float
    trace_interval: tuple[float, float]
    largest: float
    largest_residual: float
    smallest: float
    smallest_residual: float
    gradient_norm: float
    along_gradient: float
    products: int


def curvature(
    model: torch.nn.Module,
    objective: Objective,
    batches: Sequence[Any],
    *,
    kind: Matrix = "hessian",
    loss: Loss | None = None,
    parameters: Iterable[str] | None = None,
    trace: Literal["hutchinson", "hutch++"] = "hutchinson",
    probes: int = 16,
    steps: int = 20,
    confidence: float = 0.95,
    seed: int = 0,
) -> Curvature:
    """The curvature of the mean over ``batches`` at a model's weights, by ``probes + steps`` products or few more.

    Args:
        model, parameters: as for :func:`thinwire.probe.tangent.tangent_kernel`; the model is left as it was.
        objective: ``objective(model, batch)``: for ``hessian`` the batch's mean loss, a scalar to minimise; for
            ``fisher`` log-probabilities [n], one an answer; for ``ggn`` outputs of any shape.
        batches: what ``objective`` takes. All batches count alike, so let them be of one size.
        loss: for ``ggn``, ``loss(outputs, batch)``, a scalar.
        trace: ``hutch++`` where few eigenvalues dominate; it keeps ``probes / 3`` vectors of all weights.
        steps: of Lanczos' iteration for the largest and smallest eigenvalue.

    Raises:
        MisuseError: no batch, an objective of the wrong shape or that does not depend on the weights differentiably,
            NaN or infinity, unknown kind, trace or weights, numbers out of range.
    """
    matrix = CurvatureOperator(model, objective, batches, kind=kind, loss=loss, parameters=parameters)
    if trace not in ("hutchinson", "hutch++"):
        raise MisuseError(f"there is no trace {trace!r}; use hutchinson or hutch++", trace=trace)
    estimate = hutchinson if trace == "hutchinson" else hutch_plus_plus
    found = estimate(matrix.product, matrix.size, probes=probes, seed=seed)
    ends = lanczos(matrix.product, matrix.size, steps=steps, seed=seed + 1)
    gradient = matrix.gradient()
    norm = along = math.nan
    products = found.products + ends.products
    if gradient is not None:
        norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
        if norm > 0:
            unit = gradient / norm
            along = float(torch.dot(unit.double(), matrix.product(unit).double()))
            products += 1
    return Curvature(
        kind, matrix.size, found.value, found.error, found.interval(confidence), ends.largest, ends.largest_residual,
        ends.smallest, ends.smallest_residual, norm, along, products,
    )  # fmt: skip


class CurvatureOperator:
    """A curvature matrix as products with vectors [size], the weights' in the order of their names in the model.

    Arguments and errors as for :func:`curvature`. ``shapes`` are the weights', by name.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        objective: Objective,
        batches: Sequence[Any],
        *,
        kind: Matrix = "hessian",
        loss: Loss | None = None,
        parameters: Iterable[str] | None = None,
    ) -> None:
        if kind not in get_args(Matrix):
            raise MisuseError(f"there is no matrix {kind!r}; use one of {', '.join(get_args(Matrix))}", kind=kind)
        if (kind == "ggn") != (loss is not None):
            raise MisuseError("a loss goes with the matrix 'ggn', and only with it", kind=kind)
        if len(batches) == 0:
            raise MisuseError("curvature is that of data; pass one batch or more")
        self._model, self._objective, self._batches, self._loss = model, objective, batches, loss
        self.kind: Matrix = kind
        self._weights = {n: w.clone().requires_grad_() for n, w in trainable(model, parameters).items()}
        self._others = widened(model)
        self.shapes = {name: tuple(weight.shape) for name, weight in self._weights.items()}
        self.size = sum(weight.numel() for weight in self._weights.values())

    def product(self, vector: Tensor) -> Tensor:
        """The matrix times ``vector`` [size], in the vector's data type.

        Raises:
            MisuseError: another length; as :func:`curvature`.
        """
        if vector.shape != (self.size,):
            raise MisuseError(f"vectors are [{self.size}], not {tuple(vector.shape)}", size=self.size)
        parts = self._split(vector)
        total = torch.zeros(self.size)
        times = {"hessian": self._hessian, "fisher": self._gauss, "ggn": self._gauss}[self.kind]
        with differentiable(self._model):
            for batch in self._batches:
                total = total + times(batch, parts) / len(self._batches)
        return total.to(vector)

    def gradient(self) -> Tensor | None:
        """The gradient [size] of the mean loss; None for ``fisher``, which has none."""
        if self.kind == "fisher":
            return None
        total = torch.zeros(self.size)
        with differentiable(self._model):
            for batch in self._batches:
                out = self._outputs(batch)
                value = out if self._loss is None else self._loss(out, batch)
                total = total + self._flat(self._grad(value, None, create=False)) / len(self._batches)
        return total

    def _hessian(self, batch: Any, parts: Weights) -> Tensor:
        gradients = self._grad(self._outputs(batch), None, create=True)
        return self._flat(self._again(gradients, parts, list(self._weights.values())))

    def _gauss(self, batch: Any, parts: Weights) -> Tensor:
        """J^T H J v: J v is the derivative of u -> <J^T u, v>, and H of the outputs is small."""
        out = self._outputs(batch)
        zero = torch.zeros_like(out, requires_grad=True)
        pulled = self._grad(out, zero, create=True)
        (moved,) = self._again(pulled, parts, [zero])
        if self._loss is None:
            pushed = moved / len(out)
        else:
            leaf = out.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self._loss(leaf, batch), leaf, create_graph=True)
            pushed = torch.zeros_like(leaf)
            if slope.requires_grad:
                (pushed,) = torch.autograd.grad(slope, leaf, moved, materialize_grads=True)
        return self._flat(self._grad(out, pushed.detach(), create=False))

    def _outputs(self, batch: Any) -> Tensor:
        out = self._objective(StandIn(self._model, {**self._others, **self._weights}), batch)
        wanted = {"hessian": "a scalar", "fisher": "log-probabilities [n]", "ggn": "outputs"}[self.kind]
        fits = {"hessian": out.numel() == 1, "fisher": out.dim() == 1 and len(out) > 0, "ggn": out.numel() > 0}
        if not out.is_floating_point() or not fits[self.kind]:
            raise MisuseError(
                f"the objective returned {out.dtype} {tuple(out.shape)}; {self.kind!r} needs {wanted}", kind=self.kind
            )
        if not out.requires_grad:
            raise MisuseError(
                "the objective does not depend on the weights; call the model that it is given, with grad"
            )
        return out.reshape(()) if self.kind == "hessian" else out

    def _grad(self, out: Tensor, by: Tensor | None, *, create: bool) -> tuple[Tensor, ...]:
        leaves = list(self._weights.values())
        found: tuple[Tensor, ...] = torch.autograd.grad(
            out, leaves, by, create_graph=create, retain_graph=True, materialize_grads=True
        )
        return found

    def _again(self, gradients: tuple[Tensor, ...], parts: Weights, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        """Derivatives of <gradients, parts>; 0 where gradients do not depend on the leaves."""
        used = [(g, p) for g, p in zip(gradients, parts.values(), strict=True) if g.requires_grad]
        if not used:
            return tuple(torch.zeros_like(leaf) for leaf in leaves)
        found: tuple[Tensor, ...] = torch.autograd.grad(
            [g for g, _ in used], leaves, [p for _, p in used], retain_graph=True, materialize_grads=True
        )
        return found

    def _split(self, vector: Tensor) -> Weights:
        pieces = torch.split(vector, [weight.numel() for weight in self._weights.values()])
        return {
            name: piece.reshape(weight.shape).to(weight)
            for (name, weight), piece in zip(self._weights.items(), pieces, strict=True)
        }

    @staticmethod
    def _flat(tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat([tensor.detach().reshape(-1).cpu() for tensor in tensors])
