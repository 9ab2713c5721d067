"""What the extension's ops return as torch.compile sees it: shapes and dtypes, no values."""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch

if dispatch.extension_has("cfg_sample"):

    @torch.library.register_fake("chatterbox_fast::cfg_sample")
    def _cfg_sample_fake(
        logits: Tensor,
        seen: Tensor,
        params: Tensor,
        flags: Tensor,
        philox: Tensor | None = None,
        stop_action: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        stop_token: int,
        turbo: bool = False,
        forget: int = -1,
        philox_threads: int = 0,
    ) -> Tensor:
        return seen.new_empty(seen.shape[0], dtype=torch.long)


if dispatch.extension_has("skinny_linear"):

    @torch.library.register_fake("chatterbox_fast::skinny_linear")
    def _skinny_linear_fake(
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None = None,
        norm: Tensor | None = None,
        residual: Tensor | None = None,
        *,
        eps: float = 0.0,
        gated: bool = False,
    ) -> Tensor:
        return x.new_empty(x.shape[0], weight.shape[0] // 2 if gated else weight.shape[0])


if dispatch.extension_has("decode_attention"):

    @torch.library.register_fake("chatterbox_fast::decode_attention")
    def _decode_attention_fake(
        qkv: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        position: Tensor,
        flags: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        watched: Tensor | None = None,
        probabilities: Tensor | None = None,
        arrivals: Tensor | None = None,
        *,
        splits: int = 0,
    ) -> Tensor:
        return qkv.new_empty(qkv.shape[0], qkv.shape[2] * qkv.shape[3])


if dispatch.extension_has("resample"):

    @torch.library.register_fake("chatterbox_fast::resample")
    def _resample_fake(
        waveform: Tensor,
        filters: Tensor,
        first: Tensor | None = None,
        *,
        stride: int,
        left: int,
        length: int,
    ) -> Tensor:
        return waveform.new_empty(waveform.shape[0], length)


if dispatch.extension_has("istft"):

    @torch.library.register_fake("chatterbox_fast::istft")
    def _istft_fake(spectrum: Tensor, window: Tensor, limit: float) -> Tensor:
        return window.new_empty(spectrum.shape[0], 4 * (spectrum.shape[1] - 1))


if dispatch.extension_has("padded_attention"):

    @torch.library.register_fake("chatterbox_fast::padded_attention")
    def _padded_attention_fake(qkv: Tensor, lengths: Tensor, heads: int) -> Tensor:
        return qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)


if dispatch.extension_has("snake"):

    @torch.library.register_fake("chatterbox_fast::snake")
    def _snake_fake(
        x: Tensor,
        alpha: Tensor,
        inverse: Tensor,
        residual: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> Tensor:
        return torch.empty_like(x)


if dispatch.extension_has("add_norm"):

    @torch.library.register_fake("chatterbox_fast::add_norm")
    def _add_norm_fake(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None = None,
        offset: Tensor | None = None,
        shift: Tensor | None = None,
        *,
        eps: float,
        mish: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        return x.new_empty(x.shape, dtype=dtype or x.dtype)
