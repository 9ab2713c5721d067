"""What several test modules use: setup.py and the CUDA toolkit it finds, compiled kernels, Triton's
interpreter, a count of dispatched ops, units in the last place."""

from __future__ import annotations

import importlib.util
import math
import multiprocessing
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc" / "kernels"
EMULATED = "EMULATED_GPU" in os.environ
"""Whether the GPU there is is tests/emulated_gpu."""
ARCHS = ("75", "80", "89", "90", "120")
"""What kernels are compiled for in tests."""


class Entry(NamedTuple):
    """A compiled kernel as ptxas reports it."""

    name: str
    registers: int
    spilled: int
    shared: int


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


class Compiled(NamedTuple):
    """What nvcc made of a file."""

    entries: list[Entry]
    ptx: str


def compile_kernels(source: Path, arch: str, folder: Path) -> Compiled:
    """Compiles a .cu file into `folder` as setup.py would; any warning fails the test."""
    done = subprocess.run(
        [cuda_toolkit() / "bin" / "nvcc", "-std=c++17", f"-arch=sm_{arch}", "-cubin", "-O3",
         "--fmad=false", "-Werror", "all-warnings", "-Xptxas", "-v", f"-I{KERNELS}",
         "--keep", "--keep-dir", str(folder), str(source), "-o", str(folder / "kernels.cubin")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    reports = done.stderr.split("Compiling entry function '")[1:]
    return Compiled([_entry(report) for report in reports], next(folder.glob("*.ptx")).read_text())


def _entry(report: str) -> Entry:
    def number(pattern: str) -> int:
        found = re.search(pattern, report)
        return int(found.group(1)) if found else 0

    name = report.partition("'")[0]
    registers, spilled = number(r"Used (\d+) registers"), number(r"(\d+) bytes spill stores")
    return Entry(name, registers, spilled, number(r"(\d+) bytes smem"))


@contextmanager
def interpreting_triton() -> Iterator[ProcessPoolExecutor]:
    """A process where triton interprets, which it decides when it is imported."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(int).result()
        yield pool


class _Copies(TorchFunctionMode):
    """Counts the methods that read values on the host and dispatch nothing where they are there."""

    reading = (Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.__array__)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        self.count += func in self.reading
        return func(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    """Counts the ops that reach a device; views do not."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self._copies = _Copies()

    def __enter__(self) -> Dispatched:
        self._copies.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._copies.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if not func.is_view:
            self.ops[func.name()] += 1
        return func(*args, **(kwargs or {}))

    def looks(self) -> int:
        """How often a value was read on the host, by an op or by a copy.

        What is moved to "the model's device" is not seen where that is the host.
        """
        reading = ("aten::_local_scalar", "aten::item", "aten::nonzero")
        by_ops = sum(count for op, count in self.ops.items() if op.startswith(reading))
        return by_ops + self._copies.count


def ulp(value: Tensor, dtype: torch.dtype) -> float:
    """Of the largest value there is, in `dtype`."""
    largest = float(value.abs().max())
    return torch.finfo(dtype).eps * 2.0 ** (math.frexp(largest)[1] - 1)
