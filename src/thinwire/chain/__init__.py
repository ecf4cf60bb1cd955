"""Belief: what a sequence of manifests proves, and the cheapest way to a version. Pure functions and one acceptor."""
