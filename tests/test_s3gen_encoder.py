"""The encoder on the engine: float64, its parts, how long it may be."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from chatterbox.models.s3gen.transformer.attention import RelPositionMultiHeadedAttention
from chatterbox.models.s3gen.transformer.upsample_encoder import Upsample1D
from s3gen_toolkit import Engine, relative, rough_s3gen, seeded, utterance
from torch import Tensor

from chatterbox_fast.s3gen.encoder import _both_halves, by_distance, encode, pack_encoder
from chatterbox_fast.s3gen.layers import full_conv
from chatterbox_fast.s3gen.support import why_flow_unsupported


@pytest.fixture(scope="module")
def flow() -> Any:
    return rough_s3gen().flow


def stock_encoding(flow: Any, tokens: Tensor) -> Tensor:
    lengths = torch.full((len(tokens),), tokens.shape[1])
    hidden, _ = flow.encoder(flow.input_embedding(tokens), lengths)
    found: Tensor = flow.encoder_proj(hidden)
    return found


@torch.inference_mode()
@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (2, 1), (5, 3), (61, 1)])
def test_error_is_stocks_or_less(flow: Any, tokens: int, rows: int) -> None:
    ids = utterance(tokens, 0, rows=rows)["token"]
    double = copy.deepcopy(flow).double()
    oracle = stock_encoding(double, ids)
    assert relative(encode(pack_encoder(double), ids), oracle) < 1e-13
    stocks = relative(stock_encoding(flow, ids).double(), oracle)
    ours = relative(encode(pack_encoder(flow), ids).double(), oracle)
    assert ours <= 2 * stocks + torch.finfo(torch.float).eps
    assert stocks < 1e-5


@pytest.mark.parametrize("length", [1, 2, 7])
def test_the_shift_is_stocks(length: int) -> None:
    scores = torch.randn(2, 3, length, 2 * length - 1)
    shift = RelPositionMultiHeadedAttention(3, 6, 0.0).rel_shift
    found = by_distance(scores)
    assert torch.equal(found, shift(scores))
    assert found.data_ptr() == scores[..., length - 1 :].data_ptr(), "a view"


def test_upsampling_without_the_copies_is_stocks() -> None:
    stock = Upsample1D(6, 4).double()
    x = torch.randn(2, 9, 6, dtype=torch.double)
    expected, _ = stock(x.transpose(1, 2), torch.tensor([9, 9]))
    conv = full_conv(_both_halves(stock.conv.weight), stock.conv.bias.repeat(2))
    found = conv(x)[:, :9].unflatten(-1, (2, 4)).flatten(1, 2)
    assert relative(found, expected.transpose(1, 2)) < 1e-14


def test_the_lookahead_reads_three_tokens(flow: Any) -> None:
    weights = pack_encoder(flow)
    ids = utterance(12, 0)["token"]
    other = ids.clone()
    other[0, 7] = (ids[0, 7] + 1) % 6561
    x, y = (
        weights.ahead(weights.before.embedded(F.embedding(each, weights.tokens)))[:, -12:]
        for each in (ids, other)
    )
    assert (x != y).any(-1)[0].nonzero().flatten().tolist() == [4, 5, 6, 7]


def test_longer_than_the_table_is_stocks() -> None:
    """Stock's table has 5000 positions, and grows; the engine's does not."""
    s3gen = rough_s3gen()
    for embed in (s3gen.flow.encoder.embed, s3gen.flow.encoder.up_embed):
        middle = embed.pos_enc.pe.shape[1] // 2
        embed.pos_enc.pe = embed.pos_enc.pe[:, middle - 29 : middle + 30]  # 30 positions
    assert pack_encoder(s3gen.flow).longest == 15
    for tokens in (15, 16):
        arguments = utterance(tokens - 4, 4)
        expected, _ = seeded(lambda a=arguments: copy.deepcopy(s3gen.flow).inference(**a)[0])
        with Engine(s3gen):
            found, _ = seeded(lambda a=arguments: s3gen.flow.inference(**a)[0])
        assert torch.equal(found, expected) == (tokens == 16)
        assert relative(found, expected) < 1e-5


def test_other_encoders_are_left_to_stock() -> None:
    flow = rough_s3gen().flow
    flow.encoder.use_dynamic_chunk = True
    assert why_flow_unsupported(flow) == "encoder has use_dynamic_chunk True, not False"
    flow.encoder.use_dynamic_chunk = False
    layer = flow.encoder.up_encoders[0]
    layer.self_attn.linear_k = torch.nn.Linear(512, 512, bias=False)
    assert why_flow_unsupported(flow) == "the encoder's keys have no bias"
    layer.feed_forward.activation = torch.nn.Mish()
    assert "activation is Mish(), not SiLU" in str(why_flow_unsupported(flow))
