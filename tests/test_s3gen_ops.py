"""What S3Gen's engine dispatches from tokens to audio, at stock's depth."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from s3gen_toolkit import Engine, utterance
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from chatterbox_fast.s3gen.encoder import encode
from chatterbox_fast.s3gen.engine import FlowEngine
from chatterbox_fast.s3gen.flow import condition, solve
from chatterbox_fast.s3gen.vocoder import Draws, decode, f0, pack_vocoder, source
from chatterbox_fast.testing import random_s3gen

MOST = 6000
"""Operations of ten steps that are no views; a GPU launches about as many kernels."""


class Dispatched(TorchDispatchMode):
    """Counts the operations that are no views."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


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


def operations(s3gen: Any) -> int:
    """Of one utterance, the second one: tables and packed weights are there."""
    arguments = utterance(4, 3)
    names = ("prompt_token", "prompt_token_len", "prompt_feat", "embedding")
    voice = {name: arguments[name] for name in names} | {"prompt_feat_len": None}
    s3gen.inference(arguments["token"], ref_dict=dict(voice))
    with Dispatched() as dispatched:
        s3gen.inference(arguments["token"], ref_dict=dict(voice))
    return dispatched.count


def test_under_half_of_stocks_operations(deep: Any) -> None:
    assert operations(deep) > 13000, "this is not stock's depth"
    with Engine(deep):
        assert operations(deep) <= MOST


def test_no_value_is_read_on_the_host(deep: Any) -> None:
    """Fake tensors have shapes and no values: a look at one, or a branch on it, would raise."""
    with torch.backends.mkldnn.flags(enabled=False):  # its fused layers have no fake twins
        flow, vocoder = FlowEngine(deep.flow), pack_vocoder(deep.mel2wav)
    table = flow.table(2)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.inference_mode():
        mu = encode(flow.encoder, fake.from_tensor(torch.zeros(1, 9, dtype=torch.long)))
        noise = torch.randn_like(mu)
        with pytest.raises(DataDependentOutputException):
            noise.sum().item()
        given = condition(flow.solver, mu, noise[:, 0], noise)
        mel = solve(flow.solver, table, given, noise)
        draws = Draws(mel.new_zeros(1, 9, 1), mel.new_zeros(1, 9, mel.shape[1] * 480))
        wave = decode(vocoder, mel, source(vocoder, f0(vocoder, mel), draws))
    assert wave.shape == (1, 18 * 480)
