"""Random S3Gens that no layer can hide in, utterances for them, how far off a result is."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from chatterbox_fast.options import Options
from chatterbox_fast.overrides import apply_all, undo_all
from chatterbox_fast.s3gen.site import flow_site, lengths_site, vocoder_site
from chatterbox_fast.site import Row
from chatterbox_fast.testing import random_s3gen

VOCABULARY = 6561


def rough_s3gen(size: Any = "tiny", *, meanflow: bool = False) -> Any:
    """A random S3Gen without the zeros and ones of its initialisation, and with a voice.

    Stock's biases are zero and its norms and Snakes one at first: whoever forgot them would not be
    found out. F0 lies on both sides of the voiced threshold, by up to some hundred Hz.
    """
    return roughened(random_s3gen(size, meanflow=meanflow, seed=1))


def roughened(s3gen: Any) -> Any:
    """The same S3Gen, changed as `rough_s3gen` says."""
    source = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for part in (s3gen.flow, s3gen.mel2wav):
            for parameter in part.parameters():
                if parameter.ndim == 1:
                    parameter += 0.2 * torch.randn(parameter.shape, generator=source)
        if s3gen.meanflow:
            mixer = s3gen.flow.decoder.estimator.time_embed_mixer.weight
            mixer += 0.02 * torch.randn(mixer.shape, generator=source)
        s3gen.mel2wav.f0_predictor.classifier.weight *= 600
    return s3gen


def deep_s3gen() -> Any:
    """Stock's depth; the estimator is narrow, and so are the encoder's feed-forward networks."""
    s3gen = random_s3gen("tiny")
    stock = import_module("chatterbox.models.s3gen.s3gen")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        s3gen.flow.decoder.estimator = stock.ConditionalDecoder(
            channels=[32], attention_head_dim=64, num_heads=2
        )
        s3gen.flow.encoder = stock.UpsampleConformerEncoder(
            input_layer="linear",
            pos_enc_layer_type="rel_pos_espnet",
            selfattention_layer_type="rel_selfattn",
            linear_units=64,
        )
    return s3gen.eval()


def utterance(
    tokens: int = 12, prompt: int = 10, *, rows: int = 1, frames: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Arguments of ``flow.inference``; the prompt's mel has `frames`, else two a token."""
    source = torch.Generator().manual_seed(seed)

    def some(count: int) -> Tensor:
        return torch.randint(0, VOCABULARY, (rows, count), generator=source)

    return {
        "token": some(tokens),
        "token_len": torch.full((rows,), tokens),
        "prompt_token": some(prompt)[:1].float(),  # as stock's S3Gen hands it on
        "prompt_token_len": torch.tensor([float(prompt)]),
        "prompt_feat": torch.randn(
            1, 2 * prompt if frames is None else frames, 80, generator=source
        ),
        "prompt_feat_len": None,
        "embedding": torch.randn(1, 192, generator=source),
        "finalize": True,
    }


def relative(found: Tensor, expected: Tensor) -> float:
    """The error's norm over the norm of what is expected."""
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


class Engine:
    """Within this context, `s3gen` runs on the engine; else it is stock's."""

    def __init__(self, s3gen: Any, **options: Any) -> None:
        own = Options.of(**options)
        self.sites = [flow_site(s3gen, own), vocoder_site(s3gen, own)]
        replaced = *self.sites, lengths_site(s3gen, own)
        self.changes = [change for site in replaced for change in site.changes()]

    def rows(self) -> list[Row]:
        """What a report says."""
        return [row for site in self.sites for row in site.describe()]

    def __enter__(self) -> None:
        apply_all(self.changes)

    def __exit__(self, *error: object) -> None:
        undo_all(self.changes)


def seeded(call: Any, seed: int = 3) -> tuple[Any, Tensor]:
    """What the call returns after a seed, and the state that it leaves."""
    torch.manual_seed(seed)
    result = call()
    return result, torch.get_rng_state()
