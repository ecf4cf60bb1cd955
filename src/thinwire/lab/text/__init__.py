"""Training language models with compressed, weighted gradients: texts, tokens, shards, corruption, models, one recipe.

``train(LmConfig(...))`` in :mod:`thinwire.lab.text.recipe` is what ``thinwire train lm`` calls. The parts stand alone,
for programs that let workers take turns in one process:

>>> import torch
>>> from thinwire.lab.text.corruption import corrupt
>>> from thinwire.lab.text.data import load_text, windows
>>> from thinwire.lab.text.evaluation import evaluate
>>> from thinwire.lab.text.model import make_gpt, next_token_loss
>>> from thinwire.lab.text.shards import make_text_shards
>>> text = load_text("grammar")
>>> pieces = windows(text.tokens_train, context=64)
>>> shards = make_text_shards(len(pieces), workers=2, kind="iid", seed=0)
>>> model = make_gpt(text.vocabulary, context=64, layers=1, width=32, heads=2, seed=0)
>>> batches = [corrupt(pieces[shard[:8]], "token_swap", p, vocabulary=text.vocabulary,
...                    generator=torch.Generator().manual_seed(0)) for p, shard in zip((0.0, 0.3), shards)]
>>> gradients = [torch.autograd.grad(next_token_loss(model, *batch), model.parameters()) for batch in batches]
>>> for weight, *both in zip(model.parameters(), *gradients):
...     weight.grad = sum(both) / 2
>>> 2.5 < evaluate(model, text.tokens_valid[:2000], context=64) < 4.5
True
"""
