"""S3Gen's stages, patched against stock: the same mel, the same audio, the same generator after."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from s3gen_toolkit import Engine, deep_s3gen, relative, roughened, seeded, utterance
from torch import Tensor

from chatterbox_fast.s3gen.runner import draw_source
from chatterbox_fast.s3gen.vocoder import f0, pack_vocoder, source

MEL = 1e-5
"""The largest relative error of a mel."""
AUDIO = 1e-4
"""The largest error of a sample, of the loudest."""


@pytest.mark.parametrize(
    "case",
    [
        {"tokens": 12, "prompt": 10},
        {"tokens": 1, "prompt": 3},
        {"tokens": 60, "prompt": 7, "seed": 1},
        {"tokens": 9, "prompt": 4, "frames": 7, "seed": 2},
        {"tokens": 9, "prompt": 4, "frames": 11, "seed": 2},
        {"tokens": 5, "prompt": 0},
        {"tokens": 6, "prompt": 5, "rows": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("n_timesteps", [10, 3])
def test_mel_is_stocks(s3gen: Any, case: dict[str, Any], n_timesteps: int) -> None:
    arguments = utterance(**case) | {"n_timesteps": n_timesteps}
    (expected, _), state = seeded(lambda: s3gen.flow.inference(**arguments))
    with Engine(s3gen):
        (found, nothing), after = seeded(lambda: s3gen.flow.inference(**arguments))
    assert nothing is None
    assert relative(found, expected) <= MEL
    assert torch.equal(after, state)


def test_mel_is_stocks_at_its_depth() -> None:
    """Where errors add up: every block that stock has, ten steps of them."""
    s3gen, arguments = roughened(deep_s3gen()), utterance(5, 3)
    expected, _ = seeded(lambda: s3gen.flow.inference(**arguments)[0])
    with Engine(s3gen):
        found, _ = seeded(lambda: s3gen.flow.inference(**arguments)[0])
    assert relative(found, expected) <= MEL


def test_a_prompt_of_a_minute(s3gen: Any) -> None:
    arguments = utterance(10, 1500) | {"n_timesteps": 1}
    expected, _ = seeded(lambda: s3gen.flow.inference(**arguments)[0])
    with Engine(s3gen):
        found, _ = seeded(lambda: s3gen.flow.inference(**arguments)[0])
    assert relative(found, expected) <= MEL


@pytest.mark.parametrize("n_timesteps", [2, 1, 5])
def test_meanflow_is_stocks(meanflow: Any, n_timesteps: int) -> None:
    arguments = utterance() | {"n_timesteps": n_timesteps, "meanflow": True}
    arguments["noised_mels"] = torch.randn(1, 80, 24)
    (expected, _), state = seeded(lambda: meanflow.flow.inference(**arguments))
    with Engine(meanflow):
        (found, _), after = seeded(lambda: meanflow.flow.inference(**arguments))
    assert relative(found, expected) <= MEL
    assert torch.equal(after, state)


def random_mel(frames: int, rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(rows, 80, frames, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("frames", "rows"), [(40, 1), (1, 1), (2, 1), (13, 2), (97, 1)])
def test_audio_is_stocks_with_the_source_fixed(s3gen: Any, frames: int, rows: int) -> None:
    """An F0 that is off by rounding drifts in phase over seconds, so the source is given."""
    mel = random_mel(frames, rows)
    (_, excitation), _ = seeded(lambda: s3gen.mel2wav.inference(mel))
    (expected, same), state = seeded(lambda: s3gen.mel2wav.inference(mel, excitation))
    assert torch.equal(same, excitation)
    with Engine(s3gen):
        (found, used), after = seeded(lambda: s3gen.mel2wav.inference(mel, excitation))
    assert found.shape == (rows, 480 * frames)
    assert torch.equal(used, excitation)
    assert torch.equal(after, state)
    assert (found - expected).abs().max() <= AUDIO * expected.abs().max()


@pytest.mark.parametrize(("frames", "rows"), [(40, 1), (1, 1), (13, 2)])
def test_source_is_stocks_where_f0_is(s3gen: Any, frames: int, rows: int) -> None:
    mel2wav, mel = s3gen.mel2wav, random_mel(frames, rows)
    vocoder = pack_vocoder(mel2wav)
    with torch.inference_mode():
        pitch = mel2wav.f0_predictor(mel)
        threshold = mel2wav.m_source.l_sin_gen.voiced_threshold
        if frames == 40:
            assert (pitch > threshold).any()
            assert (pitch < threshold).any()
        assert relative(f0(vocoder, mel.transpose(1, 2)), pitch) < 1e-5

        def stock() -> Tensor:
            upsampled = mel2wav.f0_upsamp(pitch[:, None]).transpose(1, 2)
            return mel2wav.m_source(upsampled)[0].transpose(1, 2)

        def ours() -> Tensor:
            return source(vocoder, pitch, draw_source(vocoder, mel.transpose(1, 2), None, None))

        (expected, state), (found, after) = seeded(stock), seeded(ours)
    # The sum over harmonics is a matrix product, which depends on where its operands lie.
    assert (found - expected).abs().max() <= torch.finfo(torch.float).eps
    assert torch.equal(after, state)


@pytest.mark.parametrize("turbo", [False, True])
def test_tokens_to_audio(s3gen: Any, meanflow: Any, turbo: bool) -> None:
    """The whole of S3Gen as generate() calls it: too short for a phase to drift."""
    module = meanflow if turbo else s3gen
    arguments = utterance(8, 6)
    names = ("prompt_token", "prompt_token_len", "prompt_feat", "embedding")
    voice = {name: arguments[name] for name in names} | {"prompt_feat_len": None}

    def call() -> tuple[Tensor, Tensor]:
        return module.inference(arguments["token"], ref_dict=dict(voice))

    (expected, its_source), state = seeded(call)
    with Engine(module):
        (found, ours), after = seeded(call)
    assert torch.equal(after, state)
    assert relative(ours, its_source) < 1e-3
    assert relative(found, expected) < 1e-3
