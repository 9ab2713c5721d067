"""S3Gen in half precision: no further from float32 stock than stock under autocast; no NaN."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from s3gen_toolkit import Engine, relative, utterance
from torch import Tensor

from chatterbox_fast import precision as choosing
from chatterbox_fast.options import Options
from chatterbox_fast.precision import choose_float
from chatterbox_fast.s3gen.encoder import encode, pack_encoder
from chatterbox_fast.s3gen.flow import Kernels, condition, pack_flow, solve, time_table
from chatterbox_fast.s3gen.layers import (
    Linear,
    Norm,
    SequenceConv,
    SequenceConvTranspose,
    added,
    bytes_of,
    narrowed,
    saturated,
)
from chatterbox_fast.s3gen.vocoder import ResBlock, decode, pack_vocoder
from chatterbox_fast.testing import random_s3gen

HALVES = [torch.bfloat16, torch.float16]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def our_mel(
    flow: Any, dtype: torch.dtype | None, steps: int = 10, by: str = "reference", **case: Any
) -> Tensor:
    """What the engine makes of an utterance in `dtype`, from fixed noise.

    `by`: what runs the ops; "extension" as on a CPU.
    """
    own = utterance(**case)
    tokens = torch.cat([own["prompt_token"].long(), own["token"]], dim=1)
    encoder, solver = pack_encoder(flow, dtype, by), pack_flow(flow.decoder, dtype, Kernels(by, by))
    mu = encode(encoder, tokens)
    prompt = torch.zeros_like(mu)
    prompt[:, : own["prompt_feat"].shape[1]] = own["prompt_feat"]
    speaker = flow.spk_embed_affine_layer(torch.nn.functional.normalize(own["embedding"], dim=1))
    noise = torch.randn(mu.shape, generator=torch.Generator().manual_seed(1))
    given = condition(solver, mu, speaker, prompt)
    lengths = torch.full((len(given.conv),), noise.shape[1], dtype=torch.int32)
    lengths = lengths if by == "extension" else None
    return solve(solver, time_table(flow.decoder, steps), given, noise, lengths)


def stocks_mel(flow: Any, monkeypatch: pytest.MonkeyPatch, **case: Any) -> Tensor:
    own = utterance(**case)
    frames = 2 * (own["token"].shape[1] + own["prompt_token"].shape[1])
    noise = torch.randn(1, frames, 80, generator=torch.Generator().manual_seed(1))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda like: noise.mT.to(like.dtype))
        mel, _ = flow.inference(**own)
    return mel.mT.float()


def mean_distance(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).abs().mean())


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "seed"), [*((HALVES[0], s) for s in range(3)), (HALVES[1], 0)])
def test_the_mel_is_no_further_off_than_stocks_under_autocast(
    s3gen: Any, dtype: torch.dtype, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = {"tokens": 40, "prompt": 10, "seed": seed}
    expected = stocks_mel(s3gen.flow, monkeypatch, **case)
    exact = our_mel(s3gen.flow, None, **case)[:, -expected.shape[1] :]
    assert relative(exact, expected) < 1e-5, "the same noise"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stocks = mean_distance(stocks_mel(s3gen.flow, monkeypatch, **case), expected)
    for by in ("reference", "extension"):
        ours = our_mel(s3gen.flow, dtype, by=by, **case)[:, -expected.shape[1] :]
        assert ours.dtype == torch.float32
        assert 0 < mean_distance(ours, expected) <= stocks


@torch.inference_mode()
def test_the_audio_is_no_further_off_than_stocks_under_autocast(
    s3gen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a given source: F0 and source are float32 in both.

    Stock's inverse STFT refuses bfloat16; here it gets float32.
    """
    whole = s3gen.mel2wav._istft
    monkeypatch.setattr(s3gen.mel2wav, "_istft", lambda m, p: whole(m.float(), p.float()))
    source = torch.Generator().manual_seed(4)
    mel = torch.randn(1, 80, 60, generator=source)
    excitation = 0.2 * torch.randn(1, 1, 60 * 480, generator=source)
    expected = s3gen.mel2wav.decode(mel, excitation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stocks = mean_distance(s3gen.mel2wav.decode(mel, excitation), expected)
    for dtype in HALVES:
        ours = decode(pack_vocoder(s3gen.mel2wav, dtype), mel.mT.contiguous(), excitation)
        assert ours.dtype == torch.float32
        assert 0 < mean_distance(ours, expected) <= stocks


@torch.inference_mode()
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [0.0, 1e4, 1e5])
@pytest.mark.parametrize("by", ["reference", "extension"])
def test_extreme_inputs_stay_finite(
    s3gen: Any, by: str, dtype: torch.dtype, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: Callable[..., Any] = utterance

    def loud(**case: Any) -> dict[str, Any]:
        own = plain(**case)
        return own | {"prompt_feat": scale * own["prompt_feat"]}

    monkeypatch.setitem(our_mel.__globals__, "utterance", loud)
    mel = our_mel(s3gen.flow, dtype, 3, by)
    assert torch.isfinite(mel).all()
    mel = scale * torch.randn(1, 8, 80)
    vocoder = pack_vocoder(s3gen.mel2wav, dtype, snake=by)
    wave = decode(vocoder, mel, torch.randn(1, 1, 8 * 480))
    assert torch.isfinite(wave).all()
    assert wave.abs().max() <= 0.99


def test_saturation() -> None:
    """Infinities become the largest number, in float16 alone; NaN is somebody's mistake."""
    values = torch.tensor([1e6, -torch.inf, torch.nan, 2.0])
    found = narrowed(values, torch.float16)
    assert found.dtype == torch.float16
    assert found[[0, 1, 3]].tolist() == [65504, -65504, 2]
    assert found[2].isnan()
    assert torch.equal(saturated(values.half())[:2], found[:2])
    assert torch.equal(narrowed(values, torch.bfloat16)[:2], values.bfloat16()[:2])
    assert saturated(values) is values
    assert values[1] == -torch.inf


def test_each_layer_saturates() -> None:
    x, weight = torch.full((1, 4, 8), 6e4), torch.ones(8, 8, 1, 3, dtype=torch.float16)
    conv, transposed = SequenceConv(weight, None, 1), SequenceConvTranspose(weight, None, 1, 1)
    block: Any = ResBlock(((torch.neg, conv, torch.neg, conv),))  # type: ignore[arg-type]
    product = Linear(weight[:, :, 0, 0], None, onednn=False)
    for found in (conv(x), transposed(x), block(x.half()), added(x, product(x), torch.float16)):
        assert torch.isfinite(found).all()
    for by, out in itertools.product(("reference", "extension"), (product(x), conv.unbounded(x))):
        assert torch.isinf(out).any()
        norm = Norm(torch.ones(8), torch.zeros(8), 1e-5, by)
        assert torch.isfinite(norm.of_sum(x.clone(), out, torch.float16)).all()
        assert torch.isfinite(norm.mish(out, None, None, torch.float16)).all()


@torch.inference_mode()
def test_what_stays_in_float32(s3gen: Any) -> None:
    """What phases are made of, what nothing bounds, norms, and tables."""
    vocoder = pack_vocoder(s3gen.mel2wav, torch.bfloat16)
    flow = pack_flow(s3gen.flow.decoder, torch.bfloat16)
    wide = (
        *vocoder.f0_convs, vocoder.f0_head, vocoder.merge, vocoder.conv_post,
        flow.x_conv, flow.x_around, flow.given_conv, flow.given_around,
        flow.final_act, flow.final_act.norm, flow.middle[0].transformers[0].norm,
        vocoder.stages[0].blocks[0].layers[0][0],
    )  # fmt: skip
    assert {tensor.dtype for each in wide for tensor in each if isinstance(tensor, Tensor)} == {
        torch.float32
    }
    narrow = (flow.middle[0].transformers[0].qkv, flow.up_conv, vocoder.conv_pre)
    assert {each.weight.dtype for each in narrow} == {torch.bfloat16}
    encoder = pack_encoder(s3gen.flow)
    half = pack_encoder(s3gen.flow, torch.float16)
    assert sum(bytes_of(half.before.layers).values()) < 0.6 * sum(
        bytes_of(encoder.before.layers).values()
    )


@torch.inference_mode()
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_cpu_that_multiplies_bf16_speaks_in_it(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From tokens to audio; one that does not computes the same, more slowly."""
    s3gen = random_s3gen("tiny").eval()
    arguments = utterance(20, 5)
    voice = {name: arguments[name] for name in ("prompt_token", "prompt_feat", "embedding")}
    voice |= {"prompt_token_len": torch.tensor([5]), "prompt_feat_len": None}

    def speak(**options: Any) -> tuple[Tensor, list[str], int]:
        engine = Engine(s3gen, **options)
        torch.manual_seed(1)
        with engine:
            mel = s3gen.flow_inference(arguments["token"], ref_dict=dict(voice))
            wave, _ = s3gen.inference(arguments["token"], ref_dict=dict(voice))
        assert wave.isfinite().all()
        assert wave.dtype == mel.dtype == torch.float32
        runs = [row.runs for row in engine.rows() if row.site in ("s3gen.flow", "s3gen.vocoder")]
        return mel, runs, wave.shape[-1]

    monkeypatch.setattr(choosing, "cpu_multiplies_bf16", lambda: False)
    exact, runs, samples = speak(precision=precision)
    assert runs == ["engine, exact"] * 2
    monkeypatch.setattr(choosing, "cpu_multiplies_bf16", lambda: True)
    narrow, runs, as_many = speak(precision=precision)
    assert runs == ["engine, bf16"] * 2
    assert as_many == samples
    assert 1e-4 < relative(narrow, exact) < 0.05


@pytest.mark.parametrize("asked", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_bf16_on_a_cpu_that_multiplies_it(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(precision: str, own: torch.dtype = torch.float) -> Any:
        return choose_float(Options.of(precision=precision), CPU, own)

    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    for precision in ("bf16", "int8"):
        why = "S3Gen's bf16 needs a CPU with AVX512_BF16 or AMX, and oneDNN"
        assert chosen(precision) == ("exact", torch.float, why)
    monkeypatch.setattr(torch.cpu, asked, lambda: True)
    assert chosen("bf16") == ("bf16", torch.bfloat16, "asked for")
    assert chosen("int8") == ("bf16", torch.bfloat16, "int8 is T3's alone")
    assert chosen("auto")[0] == chosen("fp16")[0] == chosen("exact")[0] == "exact"
    assert chosen("bf16", torch.double)[:2] == ("exact", torch.double)
    with torch.backends.mkldnn.flags(enabled=False):
        assert chosen("bf16")[0] == "exact"
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")  # an older torch
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert chosen("bf16")[0] == "exact"


def test_which_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    capability = (9, 0)

    def chosen(precision: str, device: torch.device, own: torch.dtype = torch.float) -> Any:
        return choose_float(Options.of(precision=precision), device, own)

    assert chosen("exact", CPU) == ("exact", torch.float, "asked for")
    assert chosen("auto", CPU) == ("exact", torch.float, "the default on a CPU")
    assert chosen("fp16", CPU) == ("exact", torch.float, "a CPU gains nothing from fp16")
    monkeypatch.setattr(choosing, "cpu_multiplies_bf16", lambda: True)
    assert chosen("bf16", torch.device("xpu")) == ("exact", torch.float, "S3Gen is float32 on xpu")
    assert chosen("exact", GPU) == ("exact", torch.float, "asked for")
    assert chosen("fp16", GPU) == ("fp16", torch.float16, "asked for")
    assert chosen("auto", GPU) == ("bf16", torch.bfloat16, "the default on a GPU")
    assert chosen("int8", GPU) == ("bf16", torch.bfloat16, "int8 is T3's alone")
    assert chosen("bf16", GPU, torch.double)[:2] == ("exact", torch.double)
    capability = (8, 0)
    assert chosen("auto", GPU)[:2] == ("bf16", torch.bfloat16)
    capability = (7, 5)
    assert chosen("auto", GPU)[:2] == ("fp16", torch.float16)
