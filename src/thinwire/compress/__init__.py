"""Compressors of gradients and updates, error feedback, and the sparse all-reduce that carries them."""

from thinwire.compress.base import Compressor, Layout, Packet
from thinwire.compress.feedback import ErrorFeedback
from thinwire.compress.lowrank import LowRank
from thinwire.compress.quantize import QSGD, Float8, Int4, Int8, Quantize, Sign
from thinwire.compress.schedule import Accordion, ByteBudget, Constant, Plateau, Warmup
from thinwire.compress.sparsify import BlockTopK, RandomK, Threshold, TopK
from thinwire.compress.values import BFloat16, Float16, Float32
from thinwire.compress.visible import VisibleTopK

__all__ = [
    "QSGD",
    "Accordion",
    "BFloat16",
    "BlockTopK",
    "ByteBudget",
    "Compressor",
    "Constant",
    "ErrorFeedback",
    "Float8",
    "Float16",
    "Float32",
    "Int4",
    "Int8",
    "Layout",
    "LowRank",
    "Packet",
    "Plateau",
    "Quantize",
    "RandomK",
    "Sign",
    "Threshold",
    "TopK",
    "VisibleTopK",
    "Warmup",
]
