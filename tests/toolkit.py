"""setup.py as tests use it, and the CUDA toolkit that it finds."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def load_setup() -> ModuleType:
    """setup.py as a module; nothing is built."""
    spec = importlib.util.spec_from_file_location("cbf_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    return setup


def cuda_toolkit() -> Path:
    """The toolkit's folder; skips the test where there is none."""
    setup = load_setup()
    try:
        home: Path = setup.find_toolkit((torch.version.cuda or "none").split(".")[0]).home
    except setup.CudaUnavailable as reason:
        pytest.skip(str(reason))
    return home
