"""OptimizedChatterboxTTS: stock's class, patched from birth."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from chatterbox.tts import ChatterboxTTS
from torch import Tensor

from .patch import patch
from .request import current_request
from .watermark import require_perth


class OptimizedChatterboxTTS(ChatterboxTTS):
    """A `ChatterboxTTS` that is patched when it is made.

    The same as ``patch(ChatterboxTTS(...), compile=enable_compilation, precision="auto" if
    use_mixed_precision else "exact", watermark=enable_watermark)``. `chatterbox_fast.report` says
    which of these switches has an engine behind it.
    """

    def __init__(
        self,
        *modules: Any,
        enable_compilation: bool = False,
        use_mixed_precision: bool = True,
        enable_watermark: bool = True,
        **named_modules: Any,
    ) -> None:
        """Takes stock's arguments (t3, s3gen, ve, tokenizer, device, conds) and the switches.

        Raises:
            RuntimeError: Perth did not load (see `require_perth`).
        """
        require_perth()
        super().__init__(*modules, **named_modules)
        patch(
            self,
            compile=enable_compilation,
            precision="auto" if use_mixed_precision else "exact",
            watermark=enable_watermark,
        )

    @classmethod
    def from_pretrained(
        cls,
        device: Any,
        enable_compilation: bool = False,
        use_mixed_precision: bool = True,
        enable_watermark: bool = True,
    ) -> OptimizedChatterboxTTS:
        """Stock's `from_pretrained`: the weights from the hub or its cache; then the switches."""
        require_perth()
        stock = ChatterboxTTS.from_pretrained(device)
        return cls._of(stock, enable_compilation, use_mixed_precision, enable_watermark)

    @classmethod
    def from_local(
        cls,
        ckpt_dir: str | Path,
        device: Any,
        enable_compilation: bool = False,
        use_mixed_precision: bool = True,
        enable_watermark: bool = True,
    ) -> OptimizedChatterboxTTS:
        """Stock's `from_local`: the weights from a folder; then the switches."""
        require_perth()
        stock = ChatterboxTTS.from_local(ckpt_dir, device)
        return cls._of(stock, enable_compilation, use_mixed_precision, enable_watermark)

    @classmethod
    def _of(
        cls, stock: ChatterboxTTS, compilation: bool, mixed_precision: bool, watermark: bool
    ) -> OptimizedChatterboxTTS:
        return cls(
            stock.t3,
            stock.s3gen,
            stock.ve,
            stock.tokenizer,
            stock.device,
            conds=stock.conds,
            enable_compilation=compilation,
            use_mixed_precision=mixed_precision,
            enable_watermark=watermark,
        )

    def generate(
        self,
        text: str,
        repetition_penalty: float = 1.2,
        min_p: float = 0.05,
        top_p: float = 1.0,
        audio_prompt_path: str | Path | None = None,
        exaggeration: float = 0.5,
        cfg_weight: float = 0.5,
        temperature: float = 0.8,
        *,
        verbose: bool = False,
    ) -> Tensor:
        """Stock's generate(), and `seed` (added by patch()), and `verbose`.

        Args:
            verbose: show the progress of sampling, and how long the audio took.

        Returns:
            ``(1, samples)`` float32 at ``self.sr`` Hz.
        """
        if verbose:
            current_request().progress = True
        start = time.perf_counter()
        wav: Tensor = super().generate(
            text,
            repetition_penalty=repetition_penalty,
            min_p=min_p,
            top_p=top_p,
            audio_prompt_path=audio_prompt_path,
            exaggeration=exaggeration,
            cfg_weight=cfg_weight,
            temperature=temperature,
        )
        if verbose:
            spent, audio = time.perf_counter() - start, wav.shape[-1] / self.sr
            print(f"{audio:.2f} s of audio in {spent:.2f} s: real-time factor {spent / audio:.3f}")
        return wav
