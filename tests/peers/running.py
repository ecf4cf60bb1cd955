"""Parties of a run: threads, with one store between them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from thinwire.peers.protocol import Carrier
from thinwire.stores.memory import MemoryStore
from thinwire.testing.peers import Party

WAIT_S = 60.0


def run_threads(carriers: Sequence[Carrier], scenario: Callable[..., Any], *args: Any) -> list[Any]:
    """``scenario`` by one thread a carrier; the first publishes. All carriers are left in the end."""
    store, barrier = MemoryStore(), threading.Barrier(len(carriers), timeout=WAIT_S)
    for rank, carrier in enumerate(carriers):
        carrier.join(store, publishing=rank == 0)
    parties = [Party(carrier, rank, len(carriers), store, barrier.wait) for rank, carrier in enumerate(carriers)]
    try:
        with ThreadPoolExecutor(len(carriers)) as pool:
            return list(pool.map(lambda party: scenario(party, *args), parties))
    finally:
        for carrier in carriers:
            carrier.leave()
