"""What a swarm saves the store: consumers in processes, each behind a line of its own, over real sockets.

Every host, the store's and the trainer's too, is behind a line of the same rate. Measured are, for each version, the
bytes that left the store (all of them: manifests, polls, TCP's own), those that left the trainer beyond its upload, and
the time from the beginning of ``publish()`` until each consumer holds the version, verified.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from thinwire.bench.measure import load, machine, versions
from thinwire.bench.net.launch import launch
from thinwire.bench.net.namespaces import SlowNetwork
from thinwire.bench.swarm_worker import WAYS
from thinwire.errors import MisuseError
from thinwire.sync.warm import compile_kernels

__all__ = ["run_swarm"]

_TIMEOUT_S = 900.0


def _row(way: str, number: int, ranks: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """One version, over all hosts."""
    store, trainer, *followers = (rows[number] for rows in ranks)
    payload = trainer["payload_bytes"]
    late = sorted(follower["verified"] - trainer["began"] for follower in followers)
    sent = [follower["line"]["tx"] for follower in followers]
    seeded = max(trainer["line"]["tx"] - trainer["uploaded_bytes"], 0)
    wrong = sum(follower["digest"] != trainer["digest"] for follower in followers)
    return {
        "bench": "swarm", "way": way, "version": number + 1, "kind": "delta" if number else "anchor",
        "consumers": len(followers), "mismatches": wrong, "payload_bytes": payload,
        "store_sent_bytes": store["line"]["tx"], "store_sent": store["line"]["tx"] / payload,
        "trainer_seeded_bytes": seeded, "trainer_seeded": seeded / payload,
        "consumers_sent_mean": sum(sent) / len(sent) / payload, "consumers_sent_max": max(sent) / payload,
        "published_s": trainer["published"] - trainer["began"],
        "first_s": late[0], "median_s": median(late), "last_s": late[-1],
    }  # fmt: skip


def run_swarm(
    *,
    consumers: int = 16,
    rate: str = "100mbit",
    model_bytes: int = 16 << 20,
    densities: Sequence[float] = (0.3, 0.3, 0.3),
    ways: Sequence[str] = WAYS,
    report: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """One row for each way and version; the first version is an anchor, the others change so many of the weights.

    Raises:
        MisuseError: another way, or there can be no slow network here (it needs root).
        RankError: a process failed.
    """
    if not ways or not set(ways) <= set(WAYS) or consumers < 1:
        raise MisuseError(f"ways are {', '.join(WAYS)}, and there is at least one consumer")
    compile_kernels(levels=("small",))  # here, so that hosts find them on the disk
    rows = []
    about = {"rate": rate, "load": load(), "machine": machine(), "versions": versions()}
    for way in ways:
        report(f"{way}: {consumers} consumers are starting")
        with SlowNetwork(consumers + 2, rate) as network, tempfile.TemporaryDirectory() as folder:
            found = launch(
                "thinwire.bench.swarm_worker",
                [str(Path(folder)), way, str(model_bytes), json.dumps(list(densities))],
                ranks=consumers + 2, network=network, timeout_s=_TIMEOUT_S,
            )  # fmt: skip
        rows += [{**_row(way, number, found), **about} for number in range(len(densities) + 1)]
    return rows
