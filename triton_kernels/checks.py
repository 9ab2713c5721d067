"""Checks of the twins' arguments, with the messages of the compiled ops."""

from __future__ import annotations


def must(op: str, condition: bool, argument: str, must: str, got: object) -> None:
    """Raises RuntimeError, ``OP: ARGUMENT must be WHAT, got WHAT IT WAS``, unless `condition`."""
    if not condition:
        raise RuntimeError(f"chatterbox_fast::{op}: {argument} must be {must}, got {got}")
