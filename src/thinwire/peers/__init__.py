"""Bytes straight to other machines."""
