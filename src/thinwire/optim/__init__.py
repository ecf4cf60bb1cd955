"""Optimisers that step few cells: time and memory follow the active ones, not all."""

from thinwire.optim.aspg import ASPG

__all__ = ["ASPG"]
