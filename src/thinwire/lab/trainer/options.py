"""The options that every training recipe has. Importing this imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from thinwire.errors import MisuseError
from thinwire.lab.config import check, option

__all__ = ["AGGREGATES", "AGGREGATION", "COMPRESSORS", "LOGS", "TrainingOptions"]

COMPRESSORS = (
    "none", "topk", "threshold", "randomk", "blocktopk", "sign", "qsgd", "int8", "fp8", "powersgd",
)  # fmt: skip
AGGREGATES = (
    "uniform", "signal", "median", "trimmed_mean", "krum", "multi_krum", "centred_clipping", "outlier_skip", "adacons",
    "adasum",
)  # fmt: skip
LOGS = ("jsonl", "tensorboard", "wandb")
AGGREGATION = "Aggregation"
_OPTIMISATION, _COMPRESSION, _MACHINE, _RUN = "Optimisation", "Gradient compression", "Machine", "Run"


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How to optimise, on what, what travels between workers, and what is kept of a run.

    Sizes of batches are those of one worker. A recipe's own config is a dataclass derived from this one.

    Raises:
        MisuseError: an option has a value that it cannot have, or two contradict each other.
    """

    epochs: int = option(5, "Passes over the training samples.", _OPTIMISATION, least=1)
    batch_size: int = option(64, "Samples of one worker in one step.", _OPTIMISATION, least=1)
    accumulate: int = option(1, "Parts in which a batch is computed, to need less memory.", _OPTIMISATION, least=1)
    optimizer: str = option("sgd", "Optimiser.", _OPTIMISATION, choices=("sgd", "adamw"))
    lr: float | None = option(None, "Peak learning rate; 0.05 for SGD and 0.001 for AdamW if left out.", _OPTIMISATION,
                              above=0)  # fmt: skip
    momentum: float = option(0.9, "Momentum of SGD.", _OPTIMISATION, least=0, below=1)
    nesterov: bool = option(False, "Nesterov's momentum.", _OPTIMISATION)
    weight_decay: float = option(5e-4, "Decay of matrices and filters; biases and norms have none.", _OPTIMISATION,
                                 least=0)  # fmt: skip
    schedule: str = option("cosine", "How the learning rate falls.", _OPTIMISATION,
                           choices=("cosine", "step", "constant"))  # fmt: skip
    decay_every: float = option(0.3, "Schedule step: share of the run after which the rate falls, again and again.",
                                _OPTIMISATION, above=0, most=1)  # fmt: skip
    decay_factor: float = option(0.1, "Schedule step: by what it falls.", _OPTIMISATION, above=0, most=1)
    warmup_epochs: float = option(0.5, "Epochs in which the rate rises to its peak.", _OPTIMISATION, least=0)
    label_smoothing: float = option(0.0, "Share of the target that goes to all classes alike.", _OPTIMISATION,
                                    least=0, below=1)  # fmt: skip
    clip_norm: float = option(0.0, "Largest norm of the whole gradient; 0 does not clip.", _OPTIMISATION, least=0)

    compress: str = option("none", "How gradients are compressed.", _COMPRESSION, choices=COMPRESSORS)
    density: float = option(0.01, "Share of the gradient that is sent.", _COMPRESSION, above=0, most=1)
    values: str = option("float32", "Type of the values that are sent.", _COMPRESSION,
                         choices=("float32", "bfloat16", "float16", "int8", "float8"))  # fmt: skip
    block: int = option(32, "Elements in a block of blocktopk.", _COMPRESSION, least=1)
    rank: int = option(4, "Rank of powersgd.", _COMPRESSION, least=1)
    mode: str = option("auto", "Algorithm of the exchange.", _COMPRESSION,
                       choices=("auto", "split", "shared", "gather", "dense"))  # fmt: skip
    error_feedback: bool = option(True, "Keep what was not sent, and send it later.", _COMPRESSION)
    feedback_momentum: float = option(0.0, "Momentum before compression (Deep Gradient Compression); then use "
                                      "--momentum 0.", _COMPRESSION, least=0, below=1)  # fmt: skip
    density_warmup_steps: int = option(0, "Steps in which the density falls to its value.", _COMPRESSION, least=0)

    aggregate: str = option("uniform", "How the workers' gradients become one. uniform: their mean; signal: weighted "
                            "by how good they are; the others are robust, and go without compression.", AGGREGATION,
                            choices=AGGREGATES)  # fmt: skip
    signal: str = option("loss_ema", "What aggregate signal weights the workers by; several with commas.", AGGREGATION)
    faulty: int = option(1, "Bad workers that krum, multi_krum and trimmed_mean are to bear.", AGGREGATION, least=0)

    workers: int = option(1, "Processes to start on this machine; under torchrun, torchrun says it.", _MACHINE,
                          least=1, most=1024)  # fmt: skip
    device: str = option("auto", "Where to compute.", _MACHINE, choices=("auto", "cpu", "cuda"))
    backend: str = option("auto", "What carries gradients between workers.", _MACHINE,
                          choices=("auto", "gloo", "nccl"))  # fmt: skip
    precision: str = option("float32", "Type of the activations (autocast); float16 scales the loss.", _MACHINE,
                            choices=("float32", "bfloat16", "float16"))  # fmt: skip
    deterministic: bool = option(False, "On CUDA, kernels whose result does not vary (a CPU's never does).", _MACHINE)
    bucket_mb: float = option(25.0, "Size of the buckets in which gradients are exchanged.", _MACHINE, above=0)
    timeout_s: float = option(300.0, "Longest wait for another worker.", _MACHINE, above=0)

    seed: int = option(1, "Of weights, order and augmentation.", _RUN, least=0, most=2**31 - 1)
    out: str | None = option(None, "Folder of the run: checkpoints, logs, weights; without it nothing is kept.", _RUN)
    checkpoint_every: int = option(0, "Steps between checkpoints; 0 writes one at each epoch's end.", _RUN, least=0)
    keep_checkpoints: int = option(2, "How many checkpoints stay.", _RUN, least=1)
    resume: str | None = option(None, "auto: go on from the newest checkpoint in --out, if any; or the path of one.",
                                _RUN)  # fmt: skip
    stop_after: int | None = option(None, "Stop with a checkpoint after so many steps of the whole run.", _RUN, least=1)
    log: str = option("jsonl", f"Where metrics go, in --out: {', '.join(LOGS)}; several with commas.", _RUN)
    print_every: int = option(50, "Steps between lines where there is no terminal.", _RUN, least=1)
    live: bool = option(False, "Show every worker's loss, signal, weight and speed, and log them.", _RUN)

    def __post_init__(self) -> None:
        check(self)
        unknown = set(self.logs) - set(LOGS)
        contradictions = {
            f"log is {self.log!r}; give some of {', '.join(LOGS)}": unknown,
            f"{self.accumulate} parts of a batch of {self.batch_size} are not equal; choose a divisor": (
                self.batch_size % self.accumulate
            ),
            "feedback_momentum takes the place of the optimiser's; use it with optimizer sgd and momentum 0": (
                self.feedback_momentum and (self.optimizer != "sgd" or self.momentum)
            ),
            "feedback_momentum is a part of error feedback; leave error_feedback on": (
                self.feedback_momentum and not self.error_feedback
            ),
            "nesterov needs a momentum": self.nesterov and (self.optimizer != "sgd" or not self.momentum),
            "resume auto looks into the folder of the run; give out": self.resume == "auto" and self.out is None,
            "a run is kept in a folder; give out": (
                self.out is None and (self.stop_after or self.checkpoint_every or self.logs != ("jsonl",))
            ),
        }
        for message, holds in contradictions.items():
            if holds:
                raise MisuseError(message)

    @property
    def logs(self) -> tuple[str, ...]:
        """The names in ``log``."""
        return tuple(name.strip() for name in self.log.split(",") if name.strip())

    @property
    def signals(self) -> tuple[str, ...]:
        """The names in ``signal``."""
        return tuple(name.strip() for name in self.signal.split(",") if name.strip())

    @property
    def peak_lr(self) -> float:
        """``lr``, or the optimiser's default."""
        if self.lr is not None:
            return self.lr
        return 0.05 if self.optimizer == "sgd" else 1e-3
