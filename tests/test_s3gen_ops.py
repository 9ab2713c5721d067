"""What S3Gen's engine dispatches from tokens to audio, at stock's depth."""

from __future__ import annotations

import copy
import ctypes
import os
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from s3gen_toolkit import Engine, deep_s3gen, utterance
from toolkit import EMULATED, Dispatched
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from chatterbox_fast.options import Options
from chatterbox_fast.overrides import apply_all, undo_all
from chatterbox_fast.s3gen.encoder import encode, pack_encoder
from chatterbox_fast.s3gen.flow import condition, pack_flow, solve, time_table
from chatterbox_fast.s3gen.layers import each_layer, without_onednn
from chatterbox_fast.s3gen.site import lengths_site, why_without_lengths
from chatterbox_fast.s3gen.vocoder import Draws, decode, f0, pack_vocoder, source
from chatterbox_fast.testing import random_s3gen

MOST = 6000
"""Operations of ten steps that are no views, and kernels that a GPU launches for them."""


@pytest.fixture(scope="module")
def deep() -> Any:
    return deep_s3gen()


def a_request(device: str = "cpu") -> tuple[Tensor, dict[str, Any]]:
    """Tokens, and the voice as S3Gen takes it."""
    arguments = utterance(4, 3)
    names = ("prompt_token", "prompt_token_len", "prompt_feat", "embedding")
    voice = {name: arguments[name].to(device) for name in names}
    return arguments["token"].to(device), voice | {"prompt_feat_len": None}


def dispatched(s3gen: Any) -> Dispatched:
    """By one utterance, the second one: tables and packed weights are there."""
    token, voice = a_request()
    s3gen.inference(token, ref_dict=dict(voice))
    with Dispatched() as counted:
        s3gen.inference(token, ref_dict=dict(voice))
    return counted


def test_under_half_of_stocks_operations(deep: Any) -> None:
    """Stock looks at the host in every step, the engine once: are the tokens in range?"""
    stocks = dispatched(deep)
    assert stocks.ops.total() > 13000, "this is not stock's depth"
    assert stocks.looks() > 140
    with Engine(deep):
        ours = dispatched(deep)
    assert ours.ops.total() <= MOST
    assert ours.looks() == 1


def test_every_way_to_look_is_counted() -> None:
    x = torch.ones(3)
    looks = (
        x.tolist, x.cpu, x.numpy, x.nonzero, x.sum().item, x.sum().__bool__, x.sum().__float__,
        x.long().sum().__int__, x.long().sum().__index__,
    )  # fmt: skip
    for look in looks:
        with Dispatched() as counted:
            look()
        assert counted.looks() == 1, look


def test_the_token_count_is_not_copied_from_the_host(
    deep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its copy would be a second wait, and the toolkit sees none between a CPU and itself."""
    token, voice = a_request()
    flow = mock.Mock(return_value=(torch.zeros(1), None))
    monkeypatch.setattr(deep.flow, "inference", flow)
    two = token.repeat(2, 1)
    for each in (two, token):
        deep.flow_inference(each, ref_dict=dict(voice))
    monkeypatch.setattr(torch, "LongTensor", mock.Mock(side_effect=AssertionError("a copy")))
    changes = lengths_site(deep, Options()).changes()
    apply_all(changes)
    try:
        deep.flow_inference(two, ref_dict=dict(voice))
        deep.flow_inference(token, ref_dict=dict(voice))
        deep.flow_inference(token[0], None, None, dict(voice))
        own = torch.tensor([3])
        deep.flow_inference(token, ref_dict=dict(voice), speech_token_lens=own)
    finally:
        undo_all(changes)
    stocks_two, stocks, ours_two, *ours, given = (
        call.kwargs["token_len"] for call in flow.call_args_list
    )
    assert torch.equal(ours_two, stocks_two)
    for count in ours:
        assert torch.equal(count, stocks)
        assert count.dtype == stocks.dtype
    assert given is own
    assert why_without_lengths(lambda: None) == (
        "flow_inference() takes no speech_token_lens, speech_tokens"
    )


def test_a_cpu_attends_by_the_kernel() -> None:
    """Nothing is padded there; the kernel is the faster one all the same."""
    s3gen = random_s3gen("tiny").eval()
    token, voice = a_request()
    with Engine(s3gen), Dispatched() as counted:
        s3gen.inference(token, ref_dict=dict(voice))
    blocks = sum(type(each).__name__ == "BasicTransformerBlock" for each in s3gen.modules())
    assert blocks > 0
    assert counted.ops["chatterbox_fast::padded_attention"] == 10 * blocks
    assert counted.ops["aten::full"] < 10, "lengths are made once"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "most"), [("exact", MOST), ("bf16", MOST), ("fp16", MOST + 200)]
)
def test_launches_of_a_request(deep: Any, precision: str, most: int) -> None:
    """Those in a graph too. No profiler of a GPU has counted yet.

    In float16 sums that nothing bounds are held within its numbers: a launch each.
    """
    s3gen = copy.deepcopy(deep).cuda()
    token, voice = a_request("cuda")
    with Engine(s3gen, precision=precision):
        s3gen.inference(token, ref_dict=dict(voice))
        count = launched(lambda: s3gen.inference(token, ref_dict=dict(voice)))
    assert (0.95 if EMULATED else 0.5) * most < count <= most


def launched(call: Callable[[], Any]) -> int:
    """Kernels that the call launches: as the emulated GPU counts them, or as a profiler does."""
    if EMULATED:
        count = ctypes.CDLL(f"{os.environ['EMULATED_GPU']}/libcudart.so.13").gpu_launched
        before = count()
        call()
        return int(count() - before)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    on_device = [
        e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA
    ]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in on_device)


@pytest.mark.gpu
def test_one_wait_on_a_gpu() -> None:
    """From tokens to audio, as torch counts them. Not yet run on a GPU."""
    s3gen = random_s3gen("tiny").cuda().eval()
    token, voice = a_request("cuda")
    with Engine(s3gen):
        for _ in range(2):
            s3gen.inference(token, ref_dict=dict(voice))
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                s3gen.inference(token, ref_dict=dict(voice))
            finally:
                torch.cuda.set_sync_debug_mode("default")
    said = [each for each in map(str, waits) if "called a synchronizing" in each]
    assert len(said) == 1, said


def test_f0_is_no_convolution_on_a_gpu(deep: Any) -> None:
    """Which cuDNN would round to TF32; a matrix product is none."""
    weights = pack_vocoder(deep.mel2wav)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        on_gpu = weights._replace(
            f0_convs=each_layer(weights.f0_convs, to_gpu), f0_head=to_gpu(weights.f0_head)
        )
        with Dispatched() as counted:
            pitch = f0(on_gpu, torch.empty(1, 9, 80, device="cuda"))
    assert pitch.shape == (1, 9)
    assert pitch.is_cuda
    assert counted.ops["aten::elu_"] == 5
    assert not [op for op in counted.ops if "conv" in op or "mkldnn" in op]


def to_gpu(layer: Any) -> Any:
    """A layer with tensors of such shapes on a GPU, which has to be fake."""
    weight, bias = (torch.empty_like(each, device="cuda") for each in layer[:2])
    return layer._replace(weight=weight, bias=bias)


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
