"""Perth, stock's watermarker: that it is there, and how to leave it out."""

from __future__ import annotations

from typing import Any


class NoWatermark:
    """Takes the place of Perth's watermarker and returns the audio as it is."""

    def apply_watermark(self, wav: Any, sample_rate: int | None = None, **_: Any) -> Any:
        """`wav` itself. Same call as `perth.PerthImplicitWatermarker.apply_watermark`."""
        del sample_rate
        return wav


def require_perth() -> None:
    """Makes sure that stock's constructors can build their watermarker.

    Raises:
        RuntimeError: Perth imported without its watermarker, which stock answers with
            "'NoneType' object is not callable"; the message has the remedy.
    """
    import perth

    if perth.PerthImplicitWatermarker is None:
        raise RuntimeError(
            "chatterbox_fast: Perth, stock Chatterbox's watermarker, did not load "
            "(perth.PerthImplicitWatermarker is None). It needs pkg_resources, which setuptools "
            '81 removed. Remedy: pip install "setuptools<81"'
        )
