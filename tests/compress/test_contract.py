"""Every compressor and every value codec keeps its contract: one row each."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from thinwire.compress.base import Compressor
from thinwire.compress.feedback import ErrorFeedback
from thinwire.compress.lowrank import LowRank
from thinwire.compress.quantize import QSGD, Float8, Int4, Int8, Quantize, Sign
from thinwire.compress.sparsify import BlockTopK, RandomK, Threshold, TopK
from thinwire.compress.values import BFloat16, Float16, Float32, ValueCodec
from thinwire.testing.codecs import ValueCodecContract
from thinwire.testing.compressors import Claims, CompressorContract

CODECS: list[tuple[ValueCodec, Claims]] = [
    (Float32(), Claims(contraction=1.0, exact=True)),
    (BFloat16(), Claims(contraction=1 - 2.0**-16)),
    (Float16(), Claims()),  # what is below its range is lost whole
    (Int8(), Claims(contraction=0.99)),
    (Int8(block=7), Claims(contraction=0.999)),
    (Int4(), Claims(contraction=1 / 256)),
    (Float8(), Claims(contraction=0.99)),
    (QSGD(), Claims(unbiased=True)),
    (QSGD(levels=1), Claims(unbiased=True)),
    (QSGD(levels=2, block=33), Claims(unbiased=True)),
    (QSGD(levels=127, block=64, norm="l2"), Claims(unbiased=True)),
    (QSGD(levels=3, norm="l2"), Claims(unbiased=True)),
    (Sign(), Claims(contraction=1 / 256)),
    (Sign(block=13), Claims(contraction=1 / 13)),
]

COMPRESSORS: list[tuple[Compressor, Claims]] = [
    (Quantize(Float32()), Claims(contraction=1.0, exact=True)),
    (Quantize(BFloat16()), Claims(contraction=1 - 2.0**-16)),
    (Quantize(Float16()), Claims()),
    (Quantize(Int8()), Claims(contraction=0.99)),
    (Quantize(Int4()), Claims(contraction=1 / 256)),
    (Quantize(Float8()), Claims(contraction=0.99)),
    (Quantize(QSGD(levels=1, block=100)), Claims(unbiased=True)),
    (Quantize(Sign()), Claims(contraction=1 / 256)),
    (LowRank(1), Claims(contraction=0.0)),
    (LowRank(3, seed=5), Claims(contraction=0.0)),
    (LowRank(1000), Claims(contraction=1.0, exact=True)),
    (TopK(0.05), Claims(contraction=0.05)),
    (TopK(1.0), Claims(contraction=1.0, exact=True)),
    (TopK(0.1, values="int8"), Claims(contraction=0.099)),
    (TopK(0.3, values=QSGD()), Claims()),
    (Threshold(0.05), Claims(contraction=0.05)),
    (Threshold(0.1, values="float8", every=2), Claims(contraction=0.099)),
    (BlockTopK(0.1, block=8), Claims(contraction=0.1)),
    (RandomK(0.1), Claims(contraction=0.0)),
    (RandomK(0.3, values="bfloat16", seed=3), Claims(contraction=0.0)),
    (ErrorFeedback(TopK(0.05)), Claims(contraction=0.05)),
    (ErrorFeedback(TopK(0.1, values="int8"), momentum=0.9), Claims(contraction=0.099)),
    (ErrorFeedback(LowRank(2)), Claims(contraction=0.0)),
    (ErrorFeedback(Quantize(Sign())), Claims(contraction=1 / 256)),
]

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class TestValueCodecs(ValueCodecContract):
    @pytest.fixture(params=CODECS, ids=lambda row: repr(row[0]))
    def row(self, request: pytest.FixtureRequest) -> Any:
        return request.param

    @pytest.fixture
    def codec(self, row: tuple[ValueCodec, Claims]) -> ValueCodec:
        return row[0]

    @pytest.fixture
    def claims(self, row: tuple[ValueCodec, Claims]) -> Claims:
        return row[1]

    @pytest.fixture(params=DEVICES)
    def device(self, request: pytest.FixtureRequest) -> Any:
        return request.param


class TestCompressors(CompressorContract):
    @pytest.fixture(params=COMPRESSORS, ids=lambda row: repr(row[0]))
    def row(self, request: pytest.FixtureRequest) -> Any:
        return request.param

    @pytest.fixture
    def compressor(self, row: tuple[Compressor, Claims]) -> Compressor:
        return row[0]

    @pytest.fixture
    def claims(self, row: tuple[Compressor, Claims]) -> Claims:
        return row[1]

    @pytest.fixture(params=DEVICES)
    def device(self, request: pytest.FixtureRequest) -> Any:
        return request.param


@pytest.mark.gpu
@pytest.mark.parametrize("codec", [codec for codec, _ in CODECS], ids=str)
def test_both_kinds_of_device_decode_the_same_bits(codec: ValueCodec) -> None:
    data = codec.encode(torch.randn(10_001), seed=3)
    assert torch.equal(codec.decode(data.cuda(), 10_001).cpu(), codec.decode(data, 10_001))
