"""GPTs of Transformers' making, small enough for a CPU. The only file of language modelling that imports it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from thinwire.errors import MisuseError

__all__ = ["make_gpt", "next_token_loss"]


def make_gpt(
    vocabulary: int,
    *,
    context: int,
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    dropout: float = 0.0,
    tied: bool = True,
    seed: int | None = None,
) -> nn.Module:
    """A ``GPT2LMHeadModel`` (Radford et al. 2019) with random weights, drawn from torch's global generator, or from
    one of its own with ``seed``. Their deviation is GPT-2's 0.02 at its width of 768, and falls as 1 / sqrt(width).

    ``tied``: the output layer's matrix is that of the input. There are ``12 layers width^2`` weights and a few more.

    Raises:
        MisuseError: ``width`` is no multiple of ``heads``, or Transformers is not installed.

    >>> model = make_gpt(65, context=128, seed=0)
    >>> sum(weight.numel() for weight in model.parameters())
    112448
    >>> model(torch.zeros(2, 9, dtype=torch.int64)).logits.shape
    torch.Size([2, 9, 65])
    """
    if width % heads:
        raise MisuseError(f"a width of {width} is no multiple of {heads} heads; choose another", width=width)
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ModuleNotFoundError:
        raise MisuseError("language models need Transformers: pip install 'thinwire[rl]'") from None
    settings = GPT2Config(
        vocab_size=vocabulary, n_positions=context, n_embd=width, n_layer=layers, n_head=heads,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, tie_word_embeddings=tied, use_cache=False,
        initializer_range=0.02 * (768 / width) ** 0.5,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    family: Any = GPT2LMHeadModel
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        model: nn.Module = family(settings)
    return model.train()


def next_token_loss(model: nn.Module, inputs: Tensor, targets: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy in nats a token of ``targets`` after ``inputs``, both int64 ``[B, T]``.

    >>> model = make_gpt(4, context=8, layers=1, width=8, heads=1, seed=0)
    >>> tokens = torch.tensor([[0, 1, 2, 3]])
    >>> 1.2 < next_token_loss(model, tokens[:, :-1], tokens[:, 1:]).item() < 1.6
    True
    """
    logits = model(inputs).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), label_smoothing=smoothing)
