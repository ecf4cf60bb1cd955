"""How good a language model is, and what it writes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from thinwire.lab.text.data import windows
from thinwire.lab.text.model import next_token_loss

__all__ = ["evaluate", "generate", "loss_sum", "perplexity"]

_BATCH = 32


def evaluate(model: nn.Module, tokens: Tensor, *, context: int, batch: int = _BATCH) -> float:
    """Mean cross-entropy, in nats a token, over the windows of ``tokens`` (int ``[N]``).

    Raises:
        MisuseError: ``tokens`` are fewer than a window.

    >>> from thinwire.lab.text.model import make_gpt
    >>> model = make_gpt(4, context=8, layers=1, width=8, heads=1, seed=0)
    >>> evaluate(model, torch.arange(100) % 4, context=8) > 1.39  # log(4): it knows nothing yet
    True
    """
    total, count = loss_sum(model, windows(tokens, context), batch=batch)
    return total / count


@torch.no_grad()
def loss_sum(model: nn.Module, pieces: Tensor, *, batch: int = _BATCH) -> tuple[float, int]:
    """Sum of the cross-entropies of all targets in windows ``[N, context + 1]``, and their number."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for part in torch.split(pieces, batch):
        whole = part.to(device).long()
        targets = whole[:, 1:]
        total += float(next_token_loss(model, whole[:, :-1], targets)) * targets.numel()
        count += targets.numel()
    model.train(was_training)
    return total, count


def perplexity(loss: float) -> float:
    """``exp(loss)``, infinite where that is too large a number.

    >>> perplexity(0.0), perplexity(1e4)
    (1.0, inf)
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@torch.no_grad()
def generate(
    model: nn.Module, prompt: Tensor, count: int, *, context: int, generator: torch.Generator, temperature: float = 0.8
) -> Tensor:
    """``count`` tokens, int64 on the CPU, drawn one after the other behind ``prompt`` (int ``[P]``, P at least 1), of
    which the model sees the last ``context``. The same for the same CPU ``generator``.

    >>> from thinwire.lab.text.model import make_gpt
    >>> model = make_gpt(4, context=8, layers=1, width=8, heads=1, seed=0)
    >>> len(generate(model, torch.tensor([1]), 20, context=8, generator=torch.Generator().manual_seed(0)))
    20
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    seen = prompt.long().tolist()
    start = len(seen)
    for _ in range(count):
        inputs = torch.tensor([seen[-context:]], device=device)
        logits = model(inputs).logits[0, -1].float().cpu()
        chances = torch.softmax(logits / temperature, dim=0)
        seen.append(int(torch.multinomial(chances, 1, generator=generator)))
    model.train(was_training)
    return torch.tensor(seen[start:], dtype=torch.int64)
