"""chatterbox_fast: makes a stock Chatterbox TTS model fast, in place.

chatterbox_fast.patch(model)      # swap the engines in; returns model
chatterbox_fast.report(model)     # what runs where, and why
chatterbox_fast.unpatch(model)    # exactly what was there before
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from ._ext import build_info
from .options import Options
from .patch import Report, patch, patched, report, unpatch
from .watermark import why_perth_cannot_load

if (_perth := why_perth_cannot_load()) is not None:
    warnings.warn(f"chatterbox_fast: {_perth}", RuntimeWarning, stacklevel=2)

if TYPE_CHECKING:
    from .optimized import OptimizedChatterboxTTS

__version__ = "0.1.0"

__all__ = [
    "OptimizedChatterboxTTS",
    "Options",
    "Report",
    "build_info",
    "patch",
    "patched",
    "report",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    """`OptimizedChatterboxTTS` on first use: its base class needs chatterbox-tts installed."""
    if name == "OptimizedChatterboxTTS":
        from .optimized import OptimizedChatterboxTTS

        return OptimizedChatterboxTTS
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
