"""Federated tests run on one thread, and Flower tells no round of theirs."""

from __future__ import annotations

import logging

import pytest
import torch


@pytest.fixture(autouse=True)
def quiet():
    torch.set_num_threads(1)
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.WARNING)
    yield
    logger.setLevel(before)
