"""The methods of ``thinwire bench federated``: what runs on the server, and which mods on the clients.

================  ======================================================================================================
method            what it is
================  ======================================================================================================
``fedavg``        McMahan et al. 2017 (arXiv:1602.05629): the model down, the model up
``fedprox``       Li et al. 2020 (arXiv:1812.06127), mu = 0.01
``fedadam``       Reddi et al. 2021 (arXiv:2003.00295): Adam at the server
``sparsesync``    ours: sparse both ways at the density asked for, residuals, versions, anchors
``warmup``        the same, from five times the density down to it in fifteen rounds, both ways
``ef21``          the same with EF21's memory (Richtárik et al. 2021, arXiv:2106.05203)
``adaptive``      the same, the density raised where the loss stands still
``layers``        the same, each layer's share by its energy
``hops``          the same through edges of five clients (0.1 x, 1 x and 5 x the density at worker, edge and centre)
``fedadam+``      the same around FedAdam
``stc``           sparse ternary compression (Sattler et al. 2019, arXiv:1903.02891): signs and a mean size, both ways
``random-k``      random positions from a shared seed, with residuals, up alone
``fedpaq``        Reisizadeh et al. 2020 (arXiv:1909.13014): stochastic 8-bit values, up alone
``qsgd``          Alistarh et al. 2017 (arXiv:1610.02132): seven levels a side, up alone
``powersgd-R``    Vogels et al. 2019 (arXiv:1905.13727) of rank 1, 2 or 4 with residuals, up alone
================  ======================================================================================================
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flwr.serverapp.strategy import FedAdam, FedAvg, FedProx, Strategy

from thinwire.bench.federated_baselines import Compressed, CompressedMod
from thinwire.compress import QSGD, Compressor, ErrorFeedback, LowRank, Quantize, RandomK, Warmup
from thinwire.errors import MisuseError
from thinwire.federated.density import Adaptive
from thinwire.federated.hierarchy import Hop
from thinwire.integrations.flower import SparseSync
from thinwire.integrations.flower_mod import SparseSyncMod

__all__ = ["METHODS", "Settings", "method_of"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What methods may use. ``participation`` is the share of the clients that train in a round."""

    density: float = 0.01
    down_density: float = 0.05
    anchor_every: int = 50
    values: str = "float16"
    participation: float = 1.0
    server_lr: float = 0.01


Method = Callable[[Settings], tuple[Strategy, list[Any]]]


def _plain(settings: Settings) -> dict[str, Any]:
    return {"fraction_train": settings.participation, "fraction_evaluate": 0.0, "min_train_nodes": 1,
            "min_available_nodes": 1}  # fmt: skip


def _sparse(settings: Settings, inner: Strategy | None = None, **changed: Any) -> tuple[Strategy, list[Any]]:
    options: dict[str, Any] = {
        "density": settings.density, "down_density": settings.down_density, "anchor_every": settings.anchor_every,
        "values": settings.values,
    }  # fmt: skip
    return SparseSync(inner or FedAvg(**_plain(settings)), **(options | changed)), [SparseSyncMod()]


def _compressed(settings: Settings, compressor: Compressor) -> tuple[Strategy, list[Any]]:
    return Compressed(FedAvg(**_plain(settings)), compressor), [CompressedMod(compressor)]


def _adam(settings: Settings) -> FedAdam:
    return FedAdam(**_plain(settings), eta=settings.server_lr, tau=1e-3)


METHODS: dict[str, Method] = {
    "fedavg": lambda s: (FedAvg(**_plain(s)), []),
    "fedprox": lambda s: (FedProx(**_plain(s), proximal_mu=0.01), []),
    "fedadam": lambda s: (_adam(s), []),
    "sparsesync": lambda s: _sparse(s),
    "warmup": lambda s: _sparse(s, density=Warmup(min(1.0, 5 * s.density), s.density, 15), down_density=None),
    "ef21": lambda s: _sparse(s, feedback="ef21"),
    "adaptive": lambda s: _sparse(s, density=Adaptive(s.density, s.density / 10, min(1.0, 10 * s.density))),
    "layers": lambda s: _sparse(s, layers="energy"),
    "hops": lambda s: _sparse(
        s, density=s.density / 10, hops=[Hop(5, s.density)], down_density=min(1.0, 5 * s.density)
    ),
    "fedadam+": lambda s: _sparse(s, _adam(s)),
    "stc": lambda s: _sparse(s, values="sign", down_density=s.density, down_values="sign"),
    "random-k": lambda s: _compressed(s, ErrorFeedback(RandomK(s.density))),
    "fedpaq": lambda s: _compressed(s, Quantize(QSGD(levels=127))),
    "qsgd": lambda s: _compressed(s, Quantize(QSGD(levels=7))),
    "powersgd-1": lambda s: _compressed(s, ErrorFeedback(LowRank(1))),
    "powersgd-2": lambda s: _compressed(s, ErrorFeedback(LowRank(2))),
    "powersgd-4": lambda s: _compressed(s, ErrorFeedback(LowRank(4))),
}


def method_of(name: str) -> Method:
    """A method by name. Raises MisuseError for an unknown one, and names the nearest."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(METHODS)}"
        raise MisuseError(f"there is no method {name[:40]!r}; {hint}")
    return METHODS[name]
