"""Where the tests of stores find a Ceph object gateway: see :mod:`thinwire.bench.net.radosgw`."""

from __future__ import annotations

from thinwire.bench.net.radosgw import PACKAGES, PROGRAMS, RadosGateway

__all__ = ["PACKAGES", "PROGRAMS", "RadosGateway"]
