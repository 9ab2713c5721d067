"""finalize=False, which holds back what the lookahead has not seen yet, and no number of steps:
both are S3Gen's own defaults, and stock fails with either.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from s3gen_toolkit import Engine, relative, seeded, utterance
from torch import Tensor

from chatterbox_fast.s3gen.engine import FlowEngine


def mel(s3gen: Any, arguments: dict[str, Any]) -> Tensor:
    found, _ = seeded(lambda: s3gen.flow.inference(**arguments)[0])
    return found


HELD_BACK = 6
"""Frames of the lookahead's three tokens."""


@contextmanager
def holding_back(s3gen: Any) -> Iterator[None]:
    """Stock's finalize=True cut as its finalize=False is meant to be: mask and noise as well."""
    encoder, decoder = s3gen.flow.encoder, s3gen.flow.decoder

    def encode(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        hidden, mask = type(encoder).forward(encoder, *inputs)
        return hidden[:, :-HELD_BACK], mask[..., :-HELD_BACK]

    def decode(*, noised_mels: Tensor | None, **inputs: Any) -> Any:
        if noised_mels is not None:
            noised_mels = noised_mels[..., :-HELD_BACK]
        return type(decoder).forward(decoder, noised_mels=noised_mels, **inputs)

    encoder.forward, decoder.forward = encode, decode
    try:
        yield
    finally:
        del encoder.forward, decoder.forward


def voice_of(arguments: dict[str, Any]) -> dict[str, Any]:
    names = ("prompt_token", "prompt_token_len", "prompt_feat", "prompt_feat_len", "embedding")
    return {name: arguments[name] for name in names}


@pytest.mark.parametrize("kind", ["s3gen", "meanflow"])
@pytest.mark.parametrize("entry", ["forward", "mel of forward", "flow_inference", "flow.inference"])
@torch.inference_mode()
def test_stocks_own_defaults(entry: str, kind: str, request: pytest.FixtureRequest) -> None:
    """Each entry with finalize=False and, where it takes one, without a number of steps."""
    s3gen, own = request.getfixturevalue(kind), utterance(12, 6)
    steps = 2 if s3gen.meanflow else 10

    def call(given: dict[str, Any]) -> Tensor:
        """`given` by stock's names for S3Gen; flow.inference() has others."""
        if entry == "flow.inference":
            given = {"n_timesteps": given.get("n_cfm_timesteps"), "finalize": given["finalize"]}
            mel: Tensor = s3gen.flow.inference(**own | given | {"meanflow": s3gen.meanflow})[0]
            return mel
        entered = s3gen.flow_inference if entry == "flow_inference" else s3gen
        voice = {"ref_wav": None, "ref_sr": None, "ref_dict": voice_of(own)}
        skip = {"skip_vocoder": True} if entry == "mel of forward" else {}
        found: Tensor = entered(own["token"], **voice, **skip, **given)
        return found

    with pytest.raises((RuntimeError, TypeError)):
        call({"finalize": False})
    with holding_back(s3gen):
        expected, state = seeded(lambda: call({"finalize": True, "n_cfm_timesteps": steps}))
    with Engine(s3gen):
        found, after = seeded(lambda: call({"finalize": False}))
    assert torch.equal(after, state)
    # A phase drifts with what F0 is off: as in tests/parity.
    assert relative(found, expected) < (1e-3 if entry == "forward" else 1e-5)
    assert found.shape[-1] == (480 if entry == "forward" else 1) * 2 * (12 - 3)


@pytest.mark.parametrize("prompt", [6, 2, 0])
def test_meanflow_is_cut_at_its_end(meanflow: Any, prompt: int) -> None:
    """Stock's noise for the speech stays at the speech; what is cut is its tail."""
    noise = torch.randn(1, 80, 2 * 12, generator=torch.Generator().manual_seed(5))
    own = utterance(12, prompt) | {"meanflow": True, "n_timesteps": 2, "noised_mels": noise}
    with Engine(meanflow), mock.patch.object(FlowEngine, "mel", autospec=True) as run:
        run.side_effect = lambda _engine, _tokens, _speaker, _prompt, noise, _steps: noise
        whole = mel(meanflow, own)
        cut = mel(meanflow, own | {"finalize": False})
        short = mel(meanflow, own | {"finalize": False, "noised_mels": noise[..., :4]})
    assert torch.equal(whole, noise)
    assert short.shape == cut.shape, "all four frames are cut"
    assert torch.equal(cut, noise[..., :-6])
    with Engine(meanflow):
        found = mel(meanflow, own | {"finalize": False})
        long = torch.zeros(1, 80, 2 * (12 + prompt) + 1)
        with pytest.raises(ValueError, match="noised_mels must have at most the"):
            mel(meanflow, own | {"noised_mels": long})
    assert found.shape == (1, 80, 18)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize(("tokens", "prompt"), [(3, 0), (2, 0), (1, 0), (3, 6), (2, 6), (0, 6)])
def test_too_few_tokens_to_be_cut(s3gen: Any, tokens: int, prompt: int) -> None:
    message = rf"more than 3 tokens beyond prompt_feat's {2 * prompt} frames, got {tokens}$"
    with Engine(s3gen):
        with pytest.raises(ValueError, match=message):
            mel(s3gen, utterance(tokens, prompt) | {"finalize": False})
        found = mel(s3gen, utterance(4, prompt) | {"finalize": False})
    assert found.shape == (1, 80, 2)
