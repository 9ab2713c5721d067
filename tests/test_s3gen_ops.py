"""What S3Gen's engine dispatches from tokens to audio, at stock's depth."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from s3gen_toolkit import Engine, utterance
from toolkit import Dispatched
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from chatterbox_fast.s3gen.encoder import encode, pack_encoder
from chatterbox_fast.s3gen.flow import condition, pack_flow, solve, time_table
from chatterbox_fast.s3gen.layers import without_onednn
from chatterbox_fast.s3gen.vocoder import Draws, decode, f0, pack_vocoder, source
from chatterbox_fast.testing import random_s3gen

MOST = 6000
"""Operations of ten steps that are no views; a GPU launches about as many kernels."""


@pytest.fixture(scope="module")
def deep() -> Any:
    """Stock's depth; the estimator is narrow, and so are the encoder's feed-forward networks."""
    s3gen = random_s3gen("tiny")
    stock = import_module("chatterbox.models.s3gen.s3gen")
    s3gen.flow.decoder.estimator = stock.ConditionalDecoder(
        channels=[32], attention_head_dim=8, num_heads=2
    )
    s3gen.flow.encoder = stock.UpsampleConformerEncoder(
        input_layer="linear",
        pos_enc_layer_type="rel_pos_espnet",
        selfattention_layer_type="rel_selfattn",
        linear_units=64,
    )
    return s3gen.eval()


def dispatched(s3gen: Any) -> Dispatched:
    """By one utterance, the second one: tables and packed weights are there."""
    arguments = utterance(4, 3)
    names = ("prompt_token", "prompt_token_len", "prompt_feat", "embedding")
    voice = {name: arguments[name] for name in names} | {"prompt_feat_len": None}
    s3gen.inference(arguments["token"], ref_dict=dict(voice))
    with Dispatched() as counted:
        s3gen.inference(arguments["token"], ref_dict=dict(voice))
    return counted


def test_under_half_of_stocks_operations(deep: Any) -> None:
    """Stock looks at the host in every step; the engine's one look is not an op of its own."""
    stocks = dispatched(deep)
    assert stocks.ops.total() > 13000, "this is not stock's depth"
    assert stocks.looks() > 140
    with Engine(deep):
        ours = dispatched(deep)
    assert ours.ops.total() <= MOST
    assert ours.looks() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_value_is_read_on_the_host(deep: Any, dtype: torch.dtype) -> None:
    """Fake tensors have shapes and no values: a look at one, or a branch on it, would raise.

    What a bucket captures, and the vocoder. The kernels' fake twins stand in for a GPU's.
    """
    encoder = without_onednn(pack_encoder(deep.flow, dtype))
    solver = without_onednn(pack_flow(deep.flow.decoder, dtype))
    vocoder = without_onednn(pack_vocoder(deep.mel2wav, dtype))
    table = time_table(deep.flow.decoder, 2)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.inference_mode():
        tokens = fake.from_tensor(torch.zeros(1, 9, dtype=torch.long))
        counts = fake.from_tensor(torch.zeros(2, dtype=torch.int32))
        mu = encode(encoder, tokens, counts[:1])
        noise = torch.randn_like(mu)
        with pytest.raises(DataDependentOutputException):
            noise.sum().item()
        given = condition(solver, mu, noise[:, 0], noise)
        mel = solve(solver, table, given, noise, counts)
        draws = Draws(mel.new_zeros(1, 9, 1), mel.new_zeros(1, 9, mel.shape[1] * 480))
        wave = decode(vocoder, mel, source(vocoder, f0(vocoder, mel), draws))
    assert wave.shape == (1, 18 * 480)
    assert mel.dtype == wave.dtype == torch.float32
