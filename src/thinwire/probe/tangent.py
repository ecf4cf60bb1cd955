"""The empirical neural tangent kernel of a policy, and what advantages make of it.

For outputs f_i of examples i (an answer's log-probability; logits) and weights w, the kernel is

    K_ij = < df_i / dw , df_j / dw >        (Jacot et al. 2018, arXiv:1806.07572)

summed over outputs where an example has several. A small step of policy gradient with advantages A moves the
log-probabilities by K A times the learning rate, and its gradient has the squared norm ``A^T K A``: the spectrum of
``diag(A) K diag(A)`` says in how many directions an update points at all.

The Jacobian of n examples, O outputs and P weights has n O P numbers. Three contractions lead to the same kernel
("Fast finite width neural tangent kernel", Novak et al. 2022, arXiv:2206.08720):

============  ===========================================================  =======================================
contraction   memory besides the model's                                    work, in backward passes of one example
============  ===========================================================  =======================================
``jacobian``  n O P numbers                                                n O
``blocks``    n O times the weights of a block of layers                   n O times the number of blocks
``products``  P numbers and the graph of all examples' gradients           n O (1 + 2 n)
============  ===========================================================  =======================================

>>> line = torch.nn.Linear(2, 1, bias=False)
>>> tangent_kernel(line, torch.tensor([[1.0, 0.0], [1.0, 2.0]])).tolist()  # a linear model's kernel is its inputs'
[[1.0, 1.0], [1.0, 5.0]]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from thinwire.errors import MisuseError
from thinwire.probe.functional import StandIn, Weights, differentiable, trainable, widened

__all__ = [
    "Contraction",
    "Inputs",
    "advantage_kernel",
    "alignment",
    "answer_logprobs",
    "drift",
    "tangent_kernel",
]

Contraction = Literal["auto", "jacobian", "blocks", "products"]
Inputs = Tensor | Mapping[str, Tensor]
Outputs = Callable[[Any, Any], Tensor]

_COLUMNS = 1 << 14
"""Weights whose derivatives are widened to float64 at a time."""


def tangent_kernel(
    model: torch.nn.Module,
    inputs: Inputs,
    outputs: Literal["logits", "logprob"] | Outputs = "logits",
    *,
    parameters: Iterable[str] | None = None,
    contraction: Contraction = "auto",
    full: bool = False,
    memory_max: int = 1 << 30,
    vectorised: bool = False,
) -> Tensor:
    """The kernel of n examples: float64 [n, n], the trace over outputs; with ``full`` [n, O, n, O].

    Args:
        model: in evaluation mode while this runs; its weights, gradients and mode are left as they were. Weights of
            less than 32 bits are widened to float32 first. Tied weights count once, with the sum of their derivatives.
        inputs: one tensor [n, ...] that the model is called with, or named tensors [n, ...] (its keywords).
        outputs: ``logits``, what the model returns (its ``logits``, if it has such); ``logprob``,
            :func:`answer_logprobs`; or ``outputs(model, inputs)`` returning [m, ...] for m examples of which no one
            sees another. It must call the model that it is given.
        parameters: names of the weights to differentiate by; all that require gradients, if None.
        contraction: as above; ``auto`` takes the first of them that needs at most ``memory_max`` bytes.
        vectorised: differentiate all examples at once. Much faster, but a model that looks at its data
            to decide what to do cannot be (Transformers' can with ``attn_implementation="eager"``).

    Raises:
        MisuseError: no weights, unknown names, inputs of different lengths, outputs that are no floats or not one row
            an example, NaN or infinity in the kernel.
    """
    if contraction not in get_args(Contraction):
        known = ", ".join(get_args(Contraction))
        raise MisuseError(f"there is no contraction {contraction!r}; use one of {known}", contraction=contraction)
    count = _length(inputs)
    weights = trainable(model, parameters)
    if count == 0:
        return torch.zeros((0, 0, 0, 0) if full else (0, 0), dtype=torch.float64)
    with differentiable(model):
        function = _function(model, outputs)
        with torch.no_grad():
            width = _check_outputs(function(weights, _rows(inputs, 0, 1)), 1)
        jacobian = _Jacobian(function, weights, inputs, count, width, vectorised)
        if contraction == "auto":
            contraction = _affordable(weights, count * width, memory_max)
        if contraction == "products":
            kernel = jacobian.by_products()
        elif contraction == "blocks":
            kernel = jacobian.by_blocks(_blocks(weights, count * width, memory_max))
        else:
            kernel = jacobian.by_blocks([list(weights)])
    if not bool(torch.isfinite(kernel).all()):
        raise MisuseError("the kernel holds NaN or infinity; look for them in the weights and in the outputs")
    kernel = (kernel + kernel.T) / 2
    apart = kernel.reshape(count, width, count, width)
    return apart if full else torch.einsum("iojo->ij", apart)


def answer_logprobs(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Log-probability of what was done, [n]: the outputs of a policy's kernel.

    Either of answers, with ``tokens`` and ``attention`` int64 [n, T] and ``mask`` [n, T], which is not 0 at the tokens
    of the answer and may hold weights: the sum over an answer's tokens of log pi(token | those before it) times
    ``mask``, ``model`` being a Transformers causal language model, padded on the left. Or of ``actions`` int64 [n]
    given ``inputs`` [n, ...], by the softmax of what the model returns.

    Raises:
        MisuseError: neither these nor those names.
    """
    if {"tokens", "attention", "mask"} <= inputs.keys():
        tokens, attention, mask = inputs["tokens"], inputs["attention"], inputs["mask"]
        positions = (attention.cumsum(dim=1) - 1).clamp(min=0)
        out = model(input_ids=tokens, attention_mask=attention, position_ids=positions, use_cache=False)
        scores = torch.log_softmax(_logits(out)[:, :-1].float(), dim=-1)
        chosen = scores.gather(-1, tokens[:, 1:, None]).squeeze(-1)
        return (chosen * mask[:, 1:].to(chosen)).sum(dim=1)
    if {"inputs", "actions"} <= inputs.keys():
        scores = torch.log_softmax(_logits(model(inputs["inputs"])), dim=-1)
        return scores.gather(-1, inputs["actions"][:, None]).squeeze(-1)
    raise MisuseError(
        f"log-probabilities need tokens, attention and mask, or inputs and actions; found {', '.join(inputs)}"
    )


def alignment(first: Tensor, second: Tensor) -> float:
    """Cosine between two kernels as vectors: <K, K'> / (|K| |K'|), in [-1, 1]; 1 if both are 0, 0 if one of them is.

    Raises:
        MisuseError: their shapes differ, or they hold NaN or infinity.

    >>> alignment(torch.eye(2), torch.ones(2, 2))
    0.7071067811865475
    """
    if first.shape != second.shape:
        raise MisuseError(f"kernels {tuple(first.shape)} and {tuple(second.shape)} are not of the same examples")
    a, b = first.double(), second.double()
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise MisuseError("a kernel holds NaN or infinity; look for them in the weights")
    a, b = (k / k.abs().max() if k.numel() and bool(k.any()) else k for k in (a, b))
    norms = float(a.norm() * b.norm())
    if norms == 0:
        return float(not a.any() and not b.any())
    return max(-1.0, min(1.0, float((a * b).sum()) / norms))


def drift(first: Tensor, second: Tensor) -> float:
    """How far a kernel has turned: 1 - :func:`alignment`. A multiple of it has not (0)."""
    return 1.0 - alignment(first, second)


def advantage_kernel(kernel: Tensor, advantages: Tensor) -> Tensor:
    """``diag(A) K diag(A)`` [n, n], float64: the Gram matrix of the examples' gradients of policy gradient.

    Raises:
        MisuseError: the shapes do not fit.
    """
    if kernel.dim() != 2 or advantages.shape != kernel.shape[:1] or kernel.shape[0] != kernel.shape[1]:
        raise MisuseError(f"a kernel {tuple(kernel.shape)} does not fit {tuple(advantages.shape)} advantages")
    weights = advantages.double()
    return weights[:, None] * kernel.double() * weights


class _Jacobian:
    """Derivatives of n examples' outputs, made where they are needed."""

    def __init__(
        self,
        function: Callable[[Weights, Inputs], Tensor],
        weights: Weights,
        inputs: Inputs,
        count: int,
        width: int,
        vectorised: bool,
    ) -> None:
        self._function, self._weights, self._inputs = function, weights, inputs
        self._count, self._width, self._vectorised = count, width, vectorised

    def by_blocks(self, blocks: Sequence[Sequence[str]]) -> Tensor:
        """The sum over blocks of weights of J_b J_b^T, [n O, n O] float64."""
        size = self._count * self._width
        kernel = torch.zeros(size, size, dtype=torch.float64)
        for names in blocks:
            rows = self._rows_of(names)
            for name in names:
                for part in torch.split(rows.pop(name).reshape(size, -1), _COLUMNS, dim=1):
                    wide = part.double()  # small eigenvalues are differences of large products
                    kernel += (wide @ wide.T).cpu()
        return kernel

    def _rows_of(self, names: Sequence[str]) -> Weights:
        """The Jacobian by some of the weights: [n, O, ...] each."""
        chosen = {name: self._weights[name] for name in names}
        rest = {name: weight for name, weight in self._weights.items() if name not in chosen}

        def outputs(weights: Weights, inputs: Inputs) -> Tensor:
            return self._function({**rest, **weights}, inputs).reshape(-1, self._width)

        if self._vectorised:
            whole = {k: v[:, None] for k, v in self._inputs.items()} if isinstance(self._inputs, Mapping) else None
            rows = vmap(jacrev(lambda w, i: outputs(w, i)[0]), in_dims=(None, 0))(
                chosen, self._inputs[:, None] if isinstance(self._inputs, Tensor) else whole
            )
            return dict(rows)
        size = (self._count, self._width)
        found = {name: weight.new_empty(*size, *weight.shape) for name, weight in chosen.items()}
        for i in range(self._count):
            example = _rows(self._inputs, i, i + 1)
            row = jacrev(lambda weights, example=example: outputs(weights, example)[0])(chosen)
            for name in names:
                found[name][i] = row[name].detach()
        return found

    def by_products(self) -> Tensor:
        """Column by column J (J^T e), e being one output of one example.

        J v is the derivative of ``u -> <J^T u, v>``, so it is of the gradients that training uses. Forward mode differs
        from them: it knows nothing of an embedding's ``padding_idx``.
        """
        size = self._count * self._width
        kernel = torch.zeros(size, size, dtype=torch.float64)
        weights = {name: weight.clone().requires_grad_() for name, weight in self._weights.items()}
        leaves = list(weights.values())
        everything = self._function(weights, self._inputs).flatten()
        zero = torch.zeros_like(everything, requires_grad=True)
        pulled = torch.autograd.grad(everything, leaves, zero, create_graph=True, materialize_grads=True)
        used = [i for i, gradient in enumerate(pulled) if gradient.requires_grad]
        for i in range(self._count):
            out = self._function(weights, _rows(self._inputs, i, i + 1)).flatten()
            for o in range(self._width):
                direction = torch.autograd.grad(out[o], leaves, retain_graph=True, materialize_grads=True)
                column = torch.autograd.grad(
                    [pulled[k] for k in used], zero, [direction[k] for k in used], retain_graph=True
                )[0]
                kernel[:, i * self._width + o] = column.double().cpu()
        return kernel


def _function(model: torch.nn.Module, outputs: str | Outputs) -> Callable[[Weights, Inputs], Tensor]:
    """What is differentiated: outputs as a function of weights and inputs."""
    if isinstance(outputs, str) and outputs not in ("logits", "logprob"):
        raise MisuseError(f"there are no outputs {outputs!r}; use logits, logprob or a function", outputs=outputs)
    others = widened(model)

    def function(weights: Weights, inputs: Inputs) -> Tensor:
        stand_in = StandIn(model, {**others, **weights})
        if callable(outputs):
            return outputs(stand_in, inputs)
        if outputs == "logprob":
            if isinstance(inputs, Tensor):
                raise MisuseError("log-probabilities need named inputs: see thinwire.probe.tangent.answer_logprobs")
            return answer_logprobs(stand_in, inputs)
        return _logits(stand_in(inputs) if isinstance(inputs, Tensor) else stand_in(**inputs))

    return function


def _affordable(weights: Weights, rows: int, memory_max: int) -> Contraction:
    sizes = [weight.numel() * weight.element_size() * rows for weight in weights.values()]
    if sum(sizes) <= memory_max:
        return "jacobian"
    return "blocks" if max(sizes) <= memory_max else "products"


def _blocks(weights: Weights, rows: int, memory_max: int) -> list[list[str]]:
    """Neighbouring weights whose rows fit into ``memory_max`` bytes together; one weight at least."""
    blocks: list[list[str]] = []
    room = -math.inf
    for name, weight in weights.items():
        size = weight.numel() * weight.element_size() * rows
        if size > room:
            blocks.append([])
            room = memory_max
        blocks[-1].append(name)
        room -= size
    return blocks


def _check_outputs(out: Tensor, count: int) -> int:
    """Outputs an example.

    Raises:
        MisuseError: no floats, or not a row for each example.
    """
    if not out.is_floating_point() or out.dim() == 0 or out.shape[0] != count or out.numel() == 0:
        raise MisuseError(
            f"outputs are {out.dtype} {tuple(out.shape)} for {count} example(s); return floats, one row an example",
            shape=tuple(out.shape),
        )
    return out.numel() // count


def _length(inputs: Inputs) -> int:
    tensors = [inputs] if isinstance(inputs, Tensor) else list(inputs.values())
    lengths = {len(tensor) if isinstance(tensor, Tensor) and tensor.dim() else None for tensor in tensors}
    if len(lengths) != 1 or None in lengths:
        raise MisuseError("inputs are a tensor [n, ...], or named tensors of one length n")
    return int(next(iter(lengths)) or 0)


def _rows(inputs: Inputs, first: int, last: int) -> Inputs:
    if isinstance(inputs, Tensor):
        return inputs[first:last]
    return {name: tensor[first:last] for name, tensor in inputs.items()}


def _logits(out: Any) -> Tensor:
    found: Tensor = out if isinstance(out, Tensor) else out.logits
    return found
