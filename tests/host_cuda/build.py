"""Builds a driver of CUDA kernels with g++ and runs it on the CPU, plain or under sanitizers.

A driver is a C++ file that includes a kernel's .cuh and defines

    extern "C" int drive(void** arrays);   // 0 or the error of rt::launch

Results are written into the arrays that `run` was given. What is built is kept until Python ends.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

Variant = Literal["plain", "asan", "tsan"]
Order = Literal["ascending", "descending", "shuffled"]

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ORDERS: dict[Order, int] = {"ascending": 0, "descending": 1, "shuffled": 2}
FLAGS = (
    "-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra", "-Werror", "-fno-strict-aliasing",
    "-Wno-unknown-pragmas",  # of nvcc: unroll
    f"-I{ROOT / 'csrc'}", f"-I{HERE}",
)  # fmt: skip
SANITIZERS: dict[Variant, tuple[str, ...]] = {
    "plain": (),
    "asan": ("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "tsan": ("-g1", "-fsanitize=thread"),
}
RUNTIME = ("block_memory.cpp", "fiber.cpp", "host_runtime.cpp")
LAUNCH_FAILED = 3
TIMEOUT_S = 300

_built = tempfile.TemporaryDirectory(prefix="host_cuda_")


@dataclass(frozen=True)
class Outcome:
    """`error`: why the launch failed. `report`: what the sanitizer said. Empty: nothing."""

    error: str = ""
    report: str = ""


def run(
    driver: Path,
    arrays: list[np.ndarray],
    variant: Variant = "plain",
    order: Order = "ascending",
    seed: int = 0,
) -> Outcome:
    """Calls drive(arrays) of `driver`; the arrays are changed in place."""
    if not all(array.flags.c_contiguous for array in arrays):
        raise ValueError("arrays must be contiguous")
    if variant == "plain":
        return _call(_library(driver), arrays, order, seed)
    return _execute(_executable(driver, variant), arrays, variant, order, seed)


def _call(library: ctypes.CDLL, arrays: list[np.ndarray], order: Order, seed: int) -> Outcome:
    pointers = (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
    library.emu_configure(ORDERS[order], seed)
    failed = library.drive(pointers)
    return Outcome(error=library.emu_error().decode() if failed else "")


def _execute(
    program: Path, arrays: list[np.ndarray], variant: Variant, order: Order, seed: int
) -> Outcome:
    sizes = np.array([len(arrays), *(array.nbytes for array in arrays)], np.int64)
    with tempfile.NamedTemporaryFile(dir=_built.name) as file:
        file.write(sizes.tobytes() + b"".join(array.tobytes() for array in arrays))
        file.flush()
        done = subprocess.run(
            [*_fixed_addresses(variant), program, file.name, str(ORDERS[order]), str(seed)],
            capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
            env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"},
        )  # fmt: skip
        if "unexpected memory mapping" in done.stderr:
            pytest.skip(f"ThreadSanitizer does not run here: {done.stderr.strip()}")
        if done.returncode == LAUNCH_FAILED:
            return Outcome(error=done.stderr.strip())
        if done.returncode != 0:
            return Outcome(report=done.stderr or f"exit status {done.returncode}")
        file.seek(sizes.nbytes)
        for array in arrays:
            array[...] = np.frombuffer(file.read(array.nbytes), array.dtype).reshape(array.shape)
    return Outcome()


@functools.cache
def _fixed_addresses(variant: Variant) -> tuple[str, ...]:
    """TSan's shadow memory has fixed places, which a randomised layout may already use."""
    command = ("setarch", "-R")
    if variant != "tsan" or shutil.which("setarch") is None:
        return ()
    allowed = subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
    return command if allowed else ()


@functools.cache
def _library(driver: Path) -> ctypes.CDLL:
    path = _path(driver.stem, "plain", ".so")
    _compile(path, "-shared", driver, *_runtime("plain"))
    library = ctypes.CDLL(str(path))
    library.emu_error.restype = ctypes.c_char_p
    return library


@functools.cache
def _executable(driver: Path, variant: Variant) -> Path:
    path = _path(driver.stem, variant, "")
    _compile(path, *SANITIZERS[variant], driver, HERE / "driver_main.cpp", *_runtime(variant))
    return path


@functools.cache
def _runtime(variant: Variant) -> list[Path]:
    """The emulator's objects. TSan must not look into them: see host_runtime.cpp."""
    flags = ("-DRT_TSAN",) if variant == "tsan" else SANITIZERS[variant]
    objects = [_path(Path(name).stem, variant, ".o") for name in RUNTIME]
    for name, path in zip(RUNTIME, objects, strict=True):
        _compile(path, *flags, "-c", HERE / name)
    return objects


def _path(stem: str, variant: Variant, suffix: str) -> Path:
    return Path(_built.name) / f"{stem}-{variant}{suffix}"


def _compile(output: Path, *arguments: str | Path) -> None:
    command = ["g++", *FLAGS, *arguments, "-o", output]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")
