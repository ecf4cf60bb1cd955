"""An asynchronous RL run on one machine: a trainer publishes, workers follow, sample and report.

Every process writes what happens to a journal of its own; the director reads them all, and the live view, the
summary and the page are made from those records alone.
"""
