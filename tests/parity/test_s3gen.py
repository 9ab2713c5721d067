"""S3Gen's stages, patched against stock: the same mel, the same audio, the same generator after."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from s3gen_toolkit import Engine, relative, rough_s3gen, seeded, utterance

MEL = 1e-5
"""The largest relative error of a mel."""


@pytest.fixture(scope="module")
def s3gen() -> Any:
    return rough_s3gen()


@pytest.fixture(scope="module")
def meanflow() -> Any:
    return rough_s3gen(meanflow=True)


@pytest.mark.parametrize(
    "case",
    [
        {"tokens": 12, "prompt": 10},
        {"tokens": 1, "prompt": 3},
        {"tokens": 60, "prompt": 7, "seed": 1},
        {"tokens": 9, "prompt": 4, "frames": 7, "seed": 2},
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


@pytest.mark.parametrize("n_timesteps", [2, 1, 5])
def test_meanflow_is_stocks(meanflow: Any, n_timesteps: int) -> None:
    arguments = utterance() | {"n_timesteps": n_timesteps, "meanflow": True}
    arguments["noised_mels"] = torch.randn(1, 80, 24)
    (expected, _), state = seeded(lambda: meanflow.flow.inference(**arguments))
    with Engine(meanflow):
        (found, _), after = seeded(lambda: meanflow.flow.inference(**arguments))
    assert relative(found, expected) <= MEL
    assert torch.equal(after, state)
