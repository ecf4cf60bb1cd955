"""Methods of PEFT, prepared for the benchmark; the only file of it that imports PEFT.

LoRA, DoRA and SHiRA put their numbers into the model's linear layers. Prompt and prefix tuning put virtual tokens
before the text: :class:`Prompted` does that with PEFT's own tensors, but lets positions start after padding and answers
be sampled with a cache, as the laboratory's rollouts need (PEFT does both only inside ``generate``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from thinwire.errors import MisuseError
from thinwire.lab.sparserl.methods.base import Prepared, Setting, adamw, prepared

__all__ = ["Prompted", "attach", "attach_prompt", "shira_rank"]


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MisuseError("this method needs PEFT: pip install 'thinwire[bench]'") from error
    return peft


def _config(name: str, settings: Mapping[str, Any]) -> Any:
    return getattr(_peft(), name)(task_type="CAUSAL_LM", **settings)


def _plain(config: Any) -> dict[str, Any]:
    """A configuration as JSON can hold it."""
    found = {}
    for key, value in config.to_dict().items():
        if isinstance(value, set | frozenset):
            value = sorted(value)
        if value is None or isinstance(value, str | int | float | bool | list):
            found[key] = value
    return found


def attach(name: str, model: Any, setting: Setting, **settings: Any) -> Prepared:
    """``model`` with an adapter in its linear layers, of PEFT's configuration class ``name``, trained by AdamW.

    Raises:
        MisuseError: PEFT is not installed, or does not know how to put this adapter into this model.
    """
    torch.manual_seed(setting.seed)  # PEFT draws from the global generator
    config = _config(name, {"target_modules": "all-linear", **settings})
    try:
        adapted = _peft().get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise MisuseError(f"PEFT cannot put {name} into a {type(model).__name__}: {error}") from error
    return prepared(adapted.eval(), lambda params: adamw(params, setting.lr), settings=_plain(config))


def attach_prompt(name: str, model: Any, setting: Setting, **settings: Any) -> Prepared:
    """``model`` behind virtual tokens, of PEFT's configuration class ``name``, trained by AdamW.

    Raises:
        MisuseError: PEFT is not installed.
    """
    torch.manual_seed(setting.seed)
    config = _config(name, settings)
    wrapped = Prompted(_peft().get_peft_model(model, config).eval())
    _begin_with(wrapped.inner, setting.context)
    return prepared(wrapped, lambda params: adamw(params, setting.lr), settings=_plain(config))


@torch.no_grad()
def _begin_with(inner: Any, context: Sequence[int]) -> None:
    """Let virtual tokens begin as real text: random ones ruin a small model."""
    count, base = int(inner.active_peft_config.num_virtual_tokens), inner.base_model
    if len(context) < count:
        return
    tokens = torch.tensor([list(context[-count:])])
    if str(inner.active_peft_config.peft_type.value) == "PREFIX_TUNING":
        cache = base(input_ids=tokens, use_cache=True).past_key_values
        if not hasattr(_peft(), "initialize_kv_prefix_from_past_key_values"):
            raise MisuseError("prefix tuning needs a newer PEFT, which can set a prefix: pip install -U peft")
        _peft().initialize_kv_prefix_from_past_key_values(inner, past_key_values=cache)
    else:
        inner.prompt_encoder[inner.active_adapter].embedding.weight.copy_(base.get_input_embeddings()(tokens)[0])


def shira_rank(model: Any, density: float) -> int:
    """The ``r`` with which SHiRA trains about ``density`` of the linear layers: it trains r (in + out) of in x out.

    >>> shira_rank(torch.nn.Sequential(torch.nn.Linear(400, 400)), 0.01)
    2
    """
    sizes = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    if not sizes:
        raise MisuseError("SHiRA trains cells of torch.nn.Linear layers, and this model has none")
    return max(1, round(density * sum(i * o for i, o in sizes) / sum(i + o for i, o in sizes)))


class Prompted(torch.nn.Module):
    """A causal language model of PEFT with virtual tokens, called as one without.

    ``inner`` is what ``get_peft_model`` made for prompt tuning (embeddings go before the text) or prefix tuning (keys
    and values go into the cache). Attention masks, positions and logits are of the text alone.
    """

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self._count = int(inner.active_peft_config.num_virtual_tokens)
        self._prefix = str(inner.active_peft_config.peft_type.value) == "PREFIX_TUNING"

    @property
    def config(self) -> Any:
        """The base model's."""
        return self.inner.base_model.config

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: Any = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        output_hidden_states: bool = False,
    ) -> Any:
        """As Transformers' models. ``logits_to_keep`` 0 keeps those of all text tokens; hidden states are of the text
        too."""
        rows, width = input_ids.shape
        attention = torch.nn.functional.pad(attention_mask, (self._count, 0), value=1)
        positions = position_ids + self._count
        fresh = past_key_values is None or past_key_values.get_seq_length() == 0
        base = self.inner.base_model
        given: dict[str, Any] = {"input_ids": input_ids}
        if fresh and self._prefix:
            past_key_values = self._filled(rows, past_key_values)
        elif fresh:
            prompt = self.inner.get_prompt(batch_size=rows)
            text = base.get_input_embeddings()(input_ids)
            given = {"inputs_embeds": torch.cat([prompt.to(text.dtype), text], dim=1)}
            positions = torch.cat([torch.arange(self._count).expand(rows, -1), positions], dim=1)
        return base(
            **given, attention_mask=attention, position_ids=positions, past_key_values=past_key_values,
            use_cache=use_cache, logits_to_keep=logits_to_keep or width, output_hidden_states=output_hidden_states,
        )  # fmt: skip

    def _filled(self, rows: int, cache: Any) -> Any:
        """A cache that begins with the virtual tokens' keys and values."""
        found = self.inner.get_prompt(batch_size=rows)
        if cache is None:
            return found
        for layer, part in enumerate(found.layers):
            cache.update(part.keys, part.values, layer)
        return cache
