"""Instruments: which weights change, how much, and how much of that is rounding alone."""
