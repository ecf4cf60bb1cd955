"""Slow networks on one machine, and processes that talk over them."""
