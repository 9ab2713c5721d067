"""Perth, stock's watermarker: that it is there, and how to leave it out."""

from __future__ import annotations

import importlib.util
from typing import Any


class NoWatermark:
    """Takes the place of Perth's watermarker and returns the audio as it is."""

    def apply_watermark(self, wav: Any, sample_rate: int | None = None, **_: Any) -> Any:
        """`wav` itself. Same call as `perth.PerthImplicitWatermarker.apply_watermark`."""
        del sample_rate
        return wav


_REMEDY = (
    "Perth, stock Chatterbox's watermarker, needs pkg_resources, which setuptools 81 removed. "
    'Remedy: pip install "setuptools<81"'
)


def why_perth_cannot_load() -> str | None:
    """One line where stock's constructors will fail for want of Perth, without importing it."""
    present = {name: importlib.util.find_spec(name) for name in ("perth", "pkg_resources")}
    return _REMEDY if present["perth"] and not present["pkg_resources"] else None


def require_perth() -> None:
    """Makes sure that stock's constructors can build their watermarker.

    Raises:
        RuntimeError: Perth imported without its watermarker, which stock answers with
            "'NoneType' object is not callable"; the message has the remedy.
    """
    import perth

    if perth.PerthImplicitWatermarker is None:
        raise RuntimeError(
            f"chatterbox_fast: perth.PerthImplicitWatermarker is None, so that stock cannot be "
            f"made. {_REMEDY}"
        )
