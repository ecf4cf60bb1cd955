"""Merging fine-tunes of one base as sparse deltas: time and memory follow the changed weights, not all of them."""
