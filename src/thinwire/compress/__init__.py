"""Compressors of gradients and updates, error feedback, and the sparse all-reduce that carries them."""
