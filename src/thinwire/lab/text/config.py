"""The options of ``thinwire train lm``. Importing this imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from thinwire.errors import MisuseError
from thinwire.lab.config import option
from thinwire.lab.trainer.options import AGGREGATION, TrainingOptions

__all__ = ["CORRUPTIONS", "OF_TOKENS", "SHAPES", "SHARDS", "LmConfig", "Shape"]

SHARDS = ("iid", "non_iid", "clean_vs_corrupt")
OF_TOKENS = ("token_swap", "random_tokens", "label_noise")
CORRUPTIONS = ("none", *OF_TOKENS, "duplicated_batch", "stale", "sign_flip")
_TASK, _OPTIMISATION, _RUN = "Data and model", "Optimisation", "Run"


class Shape(NamedTuple):
    """Sizes of a model."""

    layers: int
    width: int
    heads: int
    context: int


SHAPES = {"gpt-tiny": Shape(2, 64, 4, 64), "gpt-small": Shape(4, 224, 7, 128)}


@dataclass(frozen=True, kw_only=True)
class LmConfig(TrainingOptions):
    """Which text, which model, and what is wrong with which worker; all else is in
    :class:`~thinwire.lab.trainer.options.TrainingOptions`. A sample is a window of ``context`` tokens.

    >>> LmConfig(layers=3).shape
    Shape(layers=3, width=64, heads=4, context=64)
    >>> LmConfig(data="tinyshakespeare").shape
    Shape(layers=4, width=224, heads=7, context=128)

    Raises:
        MisuseError: an option has a value that it cannot have, or two contradict each other.
    """

    sections: ClassVar[tuple[str, ...]] = (_TASK,)  # come first in help and YAML

    data: str = option("grammar", "grammar (a program writes it), tinyshakespeare, wikitext2, wikitext2-small, the "
                       "path of a .txt file, or hf:NAME[:CONFIG] of a Hugging Face data set.", _TASK)  # fmt: skip
    data_root: str | None = option(None, "Folder that holds text/; default: $THINWIRE_DATA.", _TASK)
    tokens: str = option("characters", "What a token is.", _TASK, choices=("characters", "bpe"))
    vocabulary: int = option(1024, "Tokens of bpe, at the most.", _TASK, least=256, most=1 << 16)
    train_limit: int | None = option(None, "Train on the first so many tokens only.", _TASK, least=1)
    valid_limit: int | None = option(None, "Validate with the first so many tokens only.", _TASK, least=1)
    model: str = option("auto", "gpt-tiny has 0.1 million weights, gpt-small 2.4 million; auto: gpt-tiny for grammar, "
                        "else gpt-small.", _TASK, choices=("auto", *SHAPES))  # fmt: skip
    layers: int | None = option(None, "Layers; default: the model's.", _TASK, least=1, most=1000)
    width: int | None = option(None, "Width; default: the model's.", _TASK, least=1, most=1 << 16)
    heads: int | None = option(None, "Heads; default: the model's.", _TASK, least=1, most=1 << 16)
    context: int | None = option(None, "Tokens that it sees at once; default: the model's.", _TASK, least=2,
                                 most=1 << 16)  # fmt: skip
    dropout: float = option(0.0, "Dropout.", _TASK, least=0, below=1)
    tied: bool = option(True, "Use the input's embeddings for the output, too.", _TASK)

    epochs: int = option(2, "Passes over the training windows.", _OPTIMISATION, least=1)
    steps: int | None = option(None, "Steps of the whole run, instead of epochs.", _OPTIMISATION, least=1)
    batch_size: int = option(16, "Windows of one worker in one step.", _OPTIMISATION, least=1)
    optimizer: str = option("adamw", "Optimiser.", _OPTIMISATION, choices=("sgd", "adamw"))
    lr: float | None = option(None, "Peak learning rate; 0.05 for SGD and 0.64 / width for AdamW if left out.",
                              _OPTIMISATION, above=0)  # fmt: skip
    weight_decay: float = option(0.1, "Decay of matrices; biases and norms have none.", _OPTIMISATION, least=0)
    warmup_epochs: float = option(0.2, "Epochs in which the rate rises to its peak.", _OPTIMISATION, least=0)
    clip_norm: float = option(1.0, "Largest norm of the whole gradient; 0 does not clip.", _OPTIMISATION, least=0)

    shards: str = option("iid", "Which windows a worker has. non_iid: a part of the text of its own; clean_vs_corrupt: "
                         "as iid, but some workers are corrupted.", AGGREGATION, choices=SHARDS)  # fmt: skip
    corruption: str = option("none", "What is wrong with corrupted workers.", AGGREGATION, choices=CORRUPTIONS)
    corruption_prob: float | None = option(None, "Probability that a token, or a step, is corrupted; default: 0.3 of "
                                           "tokens, every step.", AGGREGATION, least=0, most=1)  # fmt: skip
    corrupt_workers: int = option(1, "How many are corrupted, the last ones.", AGGREGATION, least=1)
    stale_steps: int = option(4, "How old the weights of corruption stale are.", AGGREGATION, least=1, most=1000)

    evaluate_every: int = option(0, "Steps between validations; 0: at each epoch's end.", _RUN, least=0)
    sample: int = option(200, "Characters that the model writes at the end.", _RUN, least=0, most=100_000)

    def __post_init__(self) -> None:
        super().__post_init__()
        contradictions = {
            f"corruption {self.corruption} is for shards clean_vs_corrupt; give both": (
                self.corruption != "none" and self.shards != "clean_vs_corrupt"
            ),
            "give steps or epochs, not both": self.steps is not None and self.epochs != 2,
            "a width is a multiple of the number of heads; choose others": self.shape.width % self.shape.heads,
        }
        for message, holds in contradictions.items():
            if holds:
                raise MisuseError(message)

    @property
    def shape(self) -> Shape:
        """The model's, with what was asked for instead."""
        name = self.model if self.model != "auto" else "gpt-tiny" if self.data == "grammar" else "gpt-small"
        made = {key: getattr(self, key) or value for key, value in SHAPES[name]._asdict().items()}
        return Shape(**made)

    @property
    def peak_lr(self) -> float:
        """``lr``, or the default of optimiser and model."""
        if self.lr is not None:
            return self.lr
        return 0.05 if self.optimizer == "sgd" else 0.64 / self.shape.width

    @property
    def probability(self) -> float:
        """``corruption_prob``, or the default for what is corrupted."""
        if self.corruption_prob is not None:
            return self.corruption_prob
        return 0.3 if self.corruption in OF_TOKENS else 1.0
