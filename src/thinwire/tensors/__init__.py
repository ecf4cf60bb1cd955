"""Maths on tensors: bit-level views, diff, apply and undo, digests, names and tied weights of a state dict."""
