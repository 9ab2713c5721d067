"""The vocoder on the engine: float64, its transforms, what is left to stock, bad input."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from s3gen_toolkit import Engine, relative, rough_s3gen, seeded
from torch import Tensor
from torch.nn.utils import parametrize

from chatterbox_fast.options import Options
from chatterbox_fast.request import Request
from chatterbox_fast.s3gen import runner, site
from chatterbox_fast.s3gen.engine import Engines, VocoderEngine
from chatterbox_fast.s3gen.support import why_vocoder_unsupported
from chatterbox_fast.s3gen.vocoder import Draws, VocoderWeights, decode, f0, pack_vocoder, stft


@pytest.fixture(scope="module")
def weights(s3gen: Any) -> VocoderWeights:
    return pack_vocoder(s3gen.mel2wav)


@pytest.fixture(scope="module")
def exact(s3gen: Any) -> Any:
    """The vocoder in float64; its window is no buffer, so it stays behind."""
    double = copy.deepcopy(s3gen.mel2wav).double()
    double.stft_window = double.stft_window.double()
    return double


def sound(vocoder: Any, mel: Tensor, *more: Tensor) -> Tensor:
    found, _ = seeded(lambda: vocoder.inference(mel, *more)[0])
    return found


@torch.inference_mode()
def test_error_is_stocks_or_less(s3gen: Any, exact: Any, weights: VocoderWeights) -> None:
    source = torch.Generator().manual_seed(1)
    mel = torch.randn(1, 80, 25, generator=source)
    excitation = 0.3 * torch.randn(1, 1, 25 * 480, generator=source)
    oracle = exact.decode(mel.double(), excitation.double())
    double = decode(pack_vocoder(exact), mel.double().transpose(1, 2), excitation.double())
    assert relative(double, oracle) < 1e-12
    stocks = relative(s3gen.mel2wav.decode(mel, excitation).double(), oracle)
    ours = relative(decode(weights, mel.transpose(1, 2), excitation).double(), oracle)
    assert ours <= 2 * stocks + torch.finfo(torch.float).eps
    assert stocks < 1e-4


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 3])
def test_the_transform_is_torchs(exact: Any, rows: int) -> None:
    vocoder, window = pack_vocoder(exact), exact.stft_window
    for samples in (12, 480, 4800):
        wave = torch.randn(rows, samples, dtype=torch.double)
        real, imaginary = exact._stft(wave)
        expected = torch.cat([real, imaginary], dim=1).transpose(1, 2)
        assert relative(stft(vocoder, wave), expected) < 1e-13
    assert window.dtype == torch.double


@torch.inference_mode()
def test_f0_by_products_is_f0(exact: Any, weights: VocoderWeights) -> None:
    """What a GPU runs, against float64: no further off than the convolutions."""
    x = torch.randn(2, 17, 80, generator=torch.Generator().manual_seed(2))
    for conv, double in zip(weights.f0_convs, pack_vocoder(exact).f0_convs, strict=True):
        oracle = double(x.double())
        assert relative(double.as_product(x.double()), oracle) < 1e-14
        found, expected = conv.as_product(x), conv(x)
        allowed = 2 * relative(expected.double(), oracle) + torch.finfo(torch.float).eps
        assert relative(found.double(), oracle) <= allowed
        x = torch.nn.functional.elu(expected)


@pytest.mark.gpu
def test_f0_is_float32_on_a_gpu(exact: Any, weights: VocoderWeights) -> None:
    """Whatever cuDNN may do. Not yet run on a GPU."""
    gpu = weights._replace(
        f0_convs=tuple(
            each._replace(weight=each.weight.cuda(), bias=each.bias.cuda())
            for each in weights.f0_convs
        ),
        f0_head=weights.f0_head._replace(
            weight=weights.f0_head.weight.cuda(), bias=weights.f0_head.bias.cuda()
        ),
    )
    mel = torch.randn(1, 200, 80, generator=torch.Generator().manual_seed(2))
    oracle = f0(pack_vocoder(exact), mel.double())
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        found = f0(gpu, mel.cuda())
    assert relative(found.double().cpu(), oracle) < 1e-5


def test_a_report_tells_where_the_vocoder_is(s3gen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3Gen's own device is its tokenizer's."""
    monkeypatch.setattr(type(s3gen), "device", torch.device("meta"))
    row = next(row for row in Engine(s3gen).rows() if row.site == "s3gen.vocoder")
    assert row.backend == "cpu, eager"


def test_each_device_has_its_own_generator(
    weights: VocoderWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The phase is drawn on the CPU, the noise where the mel is."""
    run = mock.Mock()
    monkeypatch.setattr(runner, "vocoder_inference", run)
    monkeypatch.setattr(Request, "generator", lambda _, device: device.type)
    mel = torch.empty(1, 80, 4, device="meta")
    engine = mock.Mock(weights=weights)
    site.serve_vocoder(engine, {"speech_feat": mel, "cache_source": mel})
    assert run.call_args.kwargs == {"generator": "meta", "phase_generator": "cpu"}

    def draws(phase: int) -> Draws:
        seeds = (torch.Generator().manual_seed(seed) for seed in (1, phase))
        return runner.draw_source(weights, torch.zeros(1, 3, 80), *seeds)

    one, other = draws(2), draws(3)
    assert torch.equal(one.noise, other.noise)
    assert not torch.equal(one.phase, other.phase)


def test_the_cached_source_is_used(s3gen: Any) -> None:
    mel2wav, mel = s3gen.mel2wav, torch.randn(1, 80, 10)
    cache = 0.2 * torch.randn(1, 1, 700)
    (expected, its), _ = seeded(lambda: mel2wav.inference(mel, cache))
    with Engine(s3gen):
        (found, ours), _ = seeded(lambda: mel2wav.inference(mel, cache_source=cache))
    assert torch.equal(ours[:, :, :700], cache)
    assert relative(ours, its) < 1e-3
    assert relative(found, expected) < 1e-3


def test_a_mel_without_frames_or_of_another_kind(s3gen: Any) -> None:
    mel2wav, good = s3gen.mel2wav, torch.randn(1, 80, 5)
    with Engine(s3gen):
        before = sound(mel2wav, good)
        with pytest.raises(
            ValueError, match="at least one frame, got .1, 80, 0.; no speech tokens"
        ):
            sound(mel2wav, torch.randn(1, 80, 0))
        for bad in (torch.randn(1, 79, 5), good.double(), good[0, 0]):
            with pytest.raises((RuntimeError, IndexError)) as stocks:  # as stock says it
                type(mel2wav).inference(mel2wav, bad)
            with pytest.raises(stocks.type):
                sound(mel2wav, bad)
        assert torch.equal(sound(mel2wav, good), before)


def test_without_onednn_it_is_the_same(s3gen: Any) -> None:
    """torch's own convolutions return another order of dimensions, as those of a GPU do."""
    mel = torch.randn(1, 80, 6)
    with Engine(s3gen):
        expected = sound(s3gen.mel2wav, mel)
        with torch.backends.mkldnn.flags(enabled=False):
            assert relative(sound(s3gen.mel2wav, mel), expected) < 1e-4


def test_extreme_mels_stay_finite(s3gen: Any) -> None:
    for scale in (0.0, 1e2, 1e5):
        mel = scale * torch.randn(1, 80, 6)
        with Engine(s3gen):
            found = sound(s3gen.mel2wav, mel)
        assert torch.isfinite(found).all()
        assert found.abs().max() <= 0.99


def test_a_folded_weight_follows_its_norm() -> None:
    s3gen = rough_s3gen()
    vocoder, mel = s3gen.mel2wav, torch.randn(1, 80, 6)
    excitation = torch.randn(1, 1, 6 * 480)
    engine = Engine(s3gen)

    def agrees() -> bool:
        expected = sound(vocoder, mel, excitation)
        with engine:
            return relative(sound(vocoder, mel, excitation), expected) < 1e-4

    assert agrees()
    before = sound(vocoder, mel, excitation)
    with torch.no_grad():
        vocoder.resblocks[4].convs1[1].parametrizations.weight.original0 *= 3
    assert relative(sound(vocoder, mel, excitation), before) > 1e-3
    assert agrees()
    with torch.no_grad():
        vocoder.resblocks[8].activations2[0].alpha += 0.5
        vocoder.resblocks[2].activations1[0].alpha[3] = 0.0
    assert agrees()
    for module in vocoder.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    assert why_vocoder_unsupported(vocoder) is None
    assert agrees()


def test_what_is_not_stocks_is_left_to_stock(s3gen: Any) -> None:
    vocoder = copy.deepcopy(s3gen.mel2wav)
    assert why_vocoder_unsupported(vocoder) is None
    vocoder.istft_params = {"n_fft": 16, "hop_len": 8}
    assert str(why_vocoder_unsupported(vocoder)).startswith("HiFTGenerator has istft_params {")
    vocoder.istft_params = {"n_fft": 16, "hop_len": 4}
    vocoder.resblocks[0].activations1[0].alpha_logscale = True
    assert "resblocks.0.activations1.0 has alpha_logscale True, not False" in str(
        why_vocoder_unsupported(vocoder)
    )
    vocoder.resblocks[0].activations1[0].alpha_logscale = False
    vocoder.train()
    assert why_vocoder_unsupported(vocoder) == "the module is in training mode"


def test_one_set_of_weights_a_module(s3gen: Any) -> None:
    engines = Engines(VocoderEngine, why_vocoder_unsupported, Options())
    first = engines.of(s3gen.mel2wav)
    assert isinstance(first, VocoderEngine)
    assert engines.of(s3gen.mel2wav) is first
    assert not first.weights.conv_pre.weight.is_inference()
    assert engines.of(copy.deepcopy(s3gen.mel2wav)) is not first
