"""Loads the compiled extension, or keeps the one-line reason why it is not there."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch


def _build_record() -> dict[str, Any]:
    """What setup.py wrote at build time; empty for a source tree that was never built."""
    path = Path(__file__).with_name("_build.json")
    if not path.exists():
        return {}
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def _why_not_loaded(record: dict[str, Any], failure: ImportError) -> str:
    """One line: why there is no extension, and what mends it."""
    built_for = record.get("torch")
    if built_for and built_for != torch.__version__:
        return (
            f"extension not loaded: built for torch {built_for}, running {torch.__version__}; "
            "reinstall chatterbox-fast"
        )
    if record.get("missing"):
        return f"{record['missing']}; reinstall chatterbox-fast to build it"
    return f"extension not loaded: {failure}"


def _load() -> tuple[Any, str | None]:
    try:
        module = importlib.import_module("chatterbox_fast._C")
    except ImportError as failure:
        return None, _why_not_loaded(_build_record(), failure)
    return module, module.build_info().get("missing")


module, missing = _load()
"""`module`: the extension, or None. `missing`: one line on what is not there, or None."""

if missing is not None:
    warnings.warn(f"chatterbox_fast: {missing}", RuntimeWarning, stacklevel=2)


def build_info() -> dict[str, Any]:
    """What the extension was built with (torch, compiler, CUDA, archs) and what it lacks."""
    return {"missing": missing} if module is None else dict(module.build_info())
