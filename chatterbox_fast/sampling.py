"""How a row of logits becomes a token: the parameters, checked, and as the ops read them."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

MAX_VOCABULARY = 65536
"""The most ids the kernels take."""


@dataclass(frozen=True)
class SamplingParams:
    """How a row of logits becomes a token. Plain numbers; see `reference.cfg_sample`.

    Attributes:
        cfg_weight: classifier-free guidance, >= 0. At 0 no unconditional row is needed.
        repetition_penalty: > 0; 1 is none.
        temperature: > 0.
        min_p: in [0, 1]; 0 is none.
        top_p: in [0, 1]; 1 is none.
        top_k: >= 0; 0 is none.
    """

    cfg_weight: float = 0.5
    repetition_penalty: float = 1.2
    temperature: float = 0.8
    min_p: float = 0.05
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError where a parameter is outside its range (NaN always is), TypeError
        where it is no number."""
        for name, value in vars(self).items():
            if not isinstance(value, Real):
                raise TypeError(f"chatterbox_fast: {name} must be a number, got {value!r}")
        _require("cfg_weight", self.cfg_weight, self.cfg_weight >= 0, ">= 0")
        penalty, temperature = self.repetition_penalty, self.temperature
        _require("repetition_penalty", penalty, _as_float32(penalty) > 0, "> 0")
        _require("temperature", temperature, _as_float32(temperature) > 0, "> 0")
        _require("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]")
        _require("top_p", self.top_p, 0 <= self.top_p <= 1, "in [0, 1]")
        _require("top_k", self.top_k, self.top_k >= 0 and self.top_k % 1 == 0, "whole, >= 0")

    def pack(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The row ``(1, 6)`` that ops read.

        cfg_weight, repetition_penalty, temperature, min_p, 1 - top_p, top_k. ``1 - top_p`` is
        taken in double and then rounded, as stock's comparison rounds it.

        Args:
            dtype: of the logits. The row is float64 for float64 logits, else float32.
        """
        row = [
            self.cfg_weight,
            self.repetition_penalty,
            self.temperature,
            self.min_p,
            1 - self.top_p,
            min(self.top_k, MAX_VOCABULARY),
        ]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.tensor([row], dtype=wide, device=device)


def _as_float32(value: float) -> float:
    """What the kernels read: a number may be 0 or infinite there and not as a double."""
    try:
        return ctypes.c_float(value).value
    except OverflowError:  # a whole number beyond a double's range
        return math.inf


def _require(name: str, value: float, ok: bool, must: str) -> None:
    if not (ok and math.isfinite(_as_float32(value))):
        raise ValueError(f"chatterbox_fast: {name} must be finite and {must}, got {value!r}")
