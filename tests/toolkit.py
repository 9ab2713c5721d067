"""The CUDA toolkit that the extension is built with, found as setup.py finds it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def cuda_toolkit() -> Path:
    """Its folder; skips the test where there is none."""
    spec = importlib.util.spec_from_file_location("cbf_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    try:
        home: Path = setup.find_toolkit((torch.version.cuda or "none").split(".")[0]).home
    except setup.CudaUnavailable as reason:
        pytest.skip(str(reason))
    return home
