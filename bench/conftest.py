"""What every benchmark's JSON says beside pytest-benchmark's own: torch, device, clocks."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
import torch

from chatterbox_fast.demo import describe_machine


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device there is."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Adds the device that was measured; its clocks, where nvidia-smi tells them."""
    del config
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    machine_info["measured"] = describe_machine(kind)
    machine_info["clocks"] = _clocks() if kind == "cuda" else None


def _clocks() -> str:
    query = "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,power.limit,driver_version"
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
