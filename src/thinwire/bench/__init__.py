"""Benchmarks: every figure in the docs comes from here, with its peers beside it."""
