"""Which client has which samples: even, skewed by Dirichlet draws, few classes each, or by speaker.

The schemes are those of Flower Datasets' partitioners (whose package wants older versions of ``datasets`` than this
one); everything depends on the seed alone. Shards are disjoint; none is empty.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from thinwire.errors import MisuseError

__all__ = ["by_speaker", "dirichlet", "iid", "partition", "pathological"]

Shards = list[npt.NDArray[np.int64]]
_TRIES = 1000


def iid(count: int, clients: int, *, seed: int = 0) -> Shards:
    """Samples drawn alike; sizes differ by one at most.

    >>> [len(shard) for shard in iid(7, 3)]
    [3, 2, 2]
    """
    _check(count, clients)
    return [np.sort(part) for part in np.array_split(np.random.default_rng(seed).permutation(count), clients)]


def dirichlet(
    labels: Sequence[int] | npt.NDArray[np.integer], clients: int, *, alpha: float, least: int = 10, seed: int = 0
) -> Shards:
    """Each class is dealt out in proportions drawn from a symmetric Dirichlet distribution: the smaller ``alpha``, the
    fewer classes a client has (Hsu et al. 2019, arXiv:1909.06335; dealt by class as in Yurochkin et al. 2019,
    arXiv:1905.12022). A client that already has its even share gets no more, and draws are repeated until every client
    has ``least`` samples.

    Raises:
        MisuseError: ``alpha`` is not positive, or in 1,000 draws some client had fewer samples than ``least``.

    >>> shards = dirichlet([0, 1] * 100, 4, alpha=0.5)
    >>> sum(len(shard) for shard in shards), len(np.unique(np.concatenate(shards)))
    (200, 200)
    """
    labels = np.asarray(labels)
    _check(len(labels), clients)
    if not alpha > 0 or not np.isfinite(alpha):
        raise MisuseError(f"alpha is {alpha}; give a positive number, 0.5 say")
    source = np.random.default_rng(seed)
    fair = len(labels) / clients
    for _ in range(_TRIES):
        parts: list[list[npt.NDArray[np.int64]]] = [[] for _ in range(clients)]
        sizes = np.zeros(clients, np.int64)
        for label in np.unique(labels):
            rows = source.permutation(np.flatnonzero(labels == label))
            shares = source.dirichlet(np.full(clients, alpha)) * (sizes < fair)
            total = shares.sum()
            shares = shares / total if total > 0 else np.full(clients, 1 / clients)
            cuts = (np.cumsum(shares)[:-1] * len(rows)).astype(np.int64)
            for client, rows_of_client in enumerate(np.split(rows, cuts)):
                parts[client].append(rows_of_client)
                sizes[client] += len(rows_of_client)
        if sizes.min() >= min(least, len(labels) // clients):
            return [np.sort(np.concatenate(part)) for part in parts]
    raise MisuseError(
        f"no draw gave each of {clients} clients {least} samples; take fewer clients, a larger alpha, or least=1"
    )


def pathological(
    labels: Sequence[int] | npt.NDArray[np.integer], clients: int, *, classes: int = 2, seed: int = 0
) -> Shards:
    """Every client has samples of ``classes`` classes only (McMahan et al. 2017, arXiv:1602.05629, section 3). Classes
    are dealt out in turn, so that all are used about alike; a class's samples are divided evenly.

    Raises:
        MisuseError: there are fewer classes, or too few samples of one for the clients that share it.
    """
    labels = np.asarray(labels)
    _check(len(labels), clients)
    known = np.unique(labels)
    if not 1 <= classes <= len(known):
        raise MisuseError(f"clients of {classes} classes need at least as many; there are {len(known)}")
    source = np.random.default_rng(seed)
    owners: list[list[int]] = [[] for _ in known]
    deck: list[int] = []
    for client in range(clients):
        chosen: list[int] = []
        while len(chosen) < classes:
            if not deck:
                deck = source.permutation(len(known)).tolist()
            fresh = next((k for k, label in enumerate(deck) if label not in chosen), None)
            if fresh is None:  # what is left of the deck is all this client's already
                deck = source.permutation(len(known)).tolist() + deck
                continue
            chosen.append(deck.pop(fresh))
        for label in chosen:
            owners[label].append(client)
    parts: list[list[npt.NDArray[np.int64]]] = [[] for _ in range(clients)]
    for label, of_label in zip(known, owners, strict=True):
        rows = source.permutation(np.flatnonzero(labels == label))
        if len(rows) < len(of_label):
            raise MisuseError(f"{len(rows)} samples of class {label} are too few for {len(of_label)} clients")
        for client, rows_of_client in zip(
            of_label, np.array_split(rows, len(of_label)) if of_label else (), strict=True
        ):
            parts[client].append(rows_of_client)
    return [np.sort(np.concatenate(part)) for part in parts]


_SPEAKER = re.compile(r"(?:\A|\n\n)([A-Z][A-Za-z' .-]{0,40}):\n")


def by_speaker(text: str, clients: int, *, least: int = 1000) -> list[str]:
    """What each of the ``clients`` speakers who say most in a play says, one string a speaker, as LEAF's Shakespeare
    (Caldas et al. 2018, arXiv:1812.01097) has it. A speech begins with the speaker's name, a colon and a new line.

    Raises:
        MisuseError: fewer speakers say ``least`` characters.

    >>> by_speaker("A:\\nTo be.\\n\\nB:\\nWhat?\\n\\nA:\\nOr not.\\n", 2, least=1)
    ['To be.\\nOr not.', 'What?']
    """
    pieces = _SPEAKER.split(text)
    said: dict[str, list[str]] = {}
    for name, speech in zip(pieces[1::2], pieces[2::2], strict=True):
        said.setdefault(name, []).append(speech.strip())
    speeches = sorted(("\n".join(parts) for parts in said.values()), key=len, reverse=True)
    found = [speech for speech in speeches[:clients] if len(speech) >= least]
    if clients < 1 or len(found) < clients:
        raise MisuseError(f"{len(found)} speakers say {least} characters or more; {clients} clients were asked for")
    return found


def partition(labels: Sequence[int] | npt.NDArray[np.integer], clients: int, how: str, *, seed: int = 0) -> Shards:
    """Shards by name: ``iid``, ``dirichlet-ALPHA`` or ``pathological-CLASSES``.

    Raises:
        MisuseError: there is no such scheme; as its function.
    """
    kind, _, number = how.partition("-")
    try:
        if how == "iid":
            return iid(len(labels), clients, seed=seed)
        if kind == "dirichlet":
            return dirichlet(labels, clients, alpha=float(number), seed=seed)
        if kind == "pathological":
            return pathological(labels, clients, classes=int(number), seed=seed)
    except ValueError:
        pass
    raise MisuseError(f"there is no partition {how[:40]!r}; give iid, dirichlet-0.5 or pathological-2")


def _check(count: int, clients: int) -> None:
    if not 1 <= clients <= count:
        raise MisuseError(f"{clients} clients cannot share {count} samples; give 1 to {count}")
