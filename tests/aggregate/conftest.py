"""Failures inside the contracts explain themselves."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("thinwire.testing.aggregators", "thinwire.testing.signals", "thinwire.testing.laws")
