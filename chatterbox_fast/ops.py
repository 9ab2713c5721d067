"""Public parameters of the ops, checked on the host with the names that users know."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How a row of logits becomes a token. Plain numbers; see `reference.cfg_sample`.

    Attributes:
        cfg_weight: classifier-free guidance, >= 0. At 0 no unconditional row is needed.
        repetition_penalty: > 0; 1 is none.
        temperature: > 0.
        min_p: in [0, 1]; 0 is none.
        top_p: in [0, 1]; 1 is none.
    """

    cfg_weight: float = 0.5
    repetition_penalty: float = 1.2
    temperature: float = 0.8
    min_p: float = 0.05
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError where a parameter is outside its range (NaN always is), TypeError
        where it is no number."""
        for name, value in vars(self).items():
            if not isinstance(value, Real):
                raise TypeError(f"chatterbox_fast: {name} must be a number, got {value!r}")
        _require("cfg_weight", self.cfg_weight, self.cfg_weight >= 0, ">= 0")
        _require("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "> 0")
        _require("temperature", self.temperature, self.temperature > 0, "> 0")
        _require("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]")
        _require("top_p", self.top_p, 0 <= self.top_p <= 1, "in [0, 1]")

    def pack(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The row ``(1, 5)`` that ops read: cfg_weight, penalty, temperature, min_p, 1 - top_p.

        ``1 - top_p`` is taken in double and then rounded, as stock's comparison rounds it.
        """
        row = [
            self.cfg_weight,
            self.repetition_penalty,
            self.temperature,
            self.min_p,
            1 - self.top_p,
        ]
        return torch.tensor([row], dtype=dtype, device=device)


def _require(name: str, value: float, ok: bool, must: str) -> None:
    if not (ok and math.isfinite(value)):
        raise ValueError(f"chatterbox_fast: {name} must be finite and {must}, got {value!r}")
