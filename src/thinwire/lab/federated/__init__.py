"""Federated learning in the lab: shards of clients, their devices, their models, and what their updates give away."""
