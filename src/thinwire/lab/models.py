"""Small language models made here, with random weights and no download."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["tiny_llama"]


def tiny_llama(
    vocabulary: int,
    *,
    hidden: int = 256,
    layers: int = 6,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    positions: int = 64,
    init: float = 0.02,
) -> Any:
    """A Transformers ``LlamaForCausalLM`` with random weights; 4.8 million of them at the default sizes.

    Weights are drawn with standard deviation ``init`` in fp32 and rounded to ``dtype``, so that models of
    one seed are equal up to rounding. Input and output embeddings are tied, as in SmolLM2. The global random state is
    left as it was.

    Example (needs the extra ``rl``)::

        model = tiny_llama(13, seed=1)
        logits = model(input_ids=torch.zeros(2, 5, dtype=torch.int64)).logits  # [2, 5, 13], bf16
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    head = 64
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // head),
        num_key_value_heads=max(1, hidden // head),
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        initializer_range=init,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
    return model.to(dtype).eval()
