"""The page about a chain: plain facts first (:mod:`facts`), then figures, then HTML."""
