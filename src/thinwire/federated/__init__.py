"""Federated rounds in few bytes: the protocol, for any framework. State dicts in, bytes out."""
