"""One op, one name: in the schema, the kernel, both bindings, Triton, reference, fakes, self-test,
tests and bench."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from chatterbox_fast import dispatch, ops, reference, selftest

ROOT = Path(__file__).resolve().parent.parent
SCHEMAS = re.findall(r'library\.def\(\s*"(\w+)\(', (ROOT / "csrc/registration.cpp").read_text())
PLACES = (
    "csrc/{}.h",
    "csrc/{}.cpp",
    "csrc/kernels/{}.h",
    "csrc/kernels/{}.cuh",
    "csrc/kernels/{}.cu",
    "csrc/cuda/{}.cpp",
    "csrc/cpu/{}.cpp",
    "triton_kernels/{}.py",
    "tests/host_cuda/{}.cpp",
    "tests/test_{}.py",
    "tests/test_{}_kernel.py",
    "tests/test_triton_{}.py",
    "bench/bench_{}.py",
)


def test_there_are_schemas() -> None:
    assert SCHEMAS == [
        "cfg_sample", "skinny_linear", "decode_attention", "resample", "istft", "padded_attention",
        "add_norm", "snake",
    ]  # fmt: skip


@pytest.mark.parametrize("op", SCHEMAS)
def test_every_op_is_everywhere(op: str) -> None:
    missing = [place.format(op) for place in PLACES if not (ROOT / place.format(op)).is_file()]
    assert missing == []
    assert op in dispatch.OPS
    assert op in selftest._CASES
    fakes = (ROOT / "chatterbox_fast/fakes.py").read_text()
    assert f'register_fake("chatterbox_fast::{op}")' in fakes
    for module in (ops, reference):
        assert getattr(module, op).__doc__


@pytest.mark.parametrize("op", SCHEMAS)
def test_every_op_is_registered(op: str) -> None:
    """For the CPU in the extension, for CUDA in its source, which is not built everywhere."""
    if dispatch.extension_has(op):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"chatterbox_fast::{op}", "CPU")
    for key, path in (("CPU", f"csrc/cpu/{op}.cpp"), ("CUDA", f"csrc/cuda/{op}.cpp")):
        _, _, registered = (
            (ROOT / path)
            .read_text()
            .partition(f"TORCH_LIBRARY_IMPL(chatterbox_fast, {key}, library)")
        )
        assert f'library.impl("{op}", &chatterbox_fast::{op});' in registered


@pytest.mark.parametrize("folder", ["csrc/kernels", "csrc/cuda", "csrc/cpu", "triton_kernels"])
def test_no_file_is_of_an_unknown_op(folder: str) -> None:
    shared = {
        "runtime",
        "types",
        "common",
        "torch_random",
        "build_info",
        "checks",
        "vectors",
        "floating",
        "inverse_dft",
        "arithmetic",
        "__init__",
    }
    stems = {path.stem for path in (ROOT / folder).iterdir() if path.is_file()}
    assert stems - shared <= set(SCHEMAS)


def test_kernels_are_torch_free_and_portable() -> None:
    """Launches, PTX and shared memory are runtime.h's; a kernel file opens with its contract."""
    forbidden = re.compile(r"<<<|\basm\b|__shared__|<torch|<ATen|<c10|cooperative_groups")
    for path in (ROOT / "csrc/kernels").iterdir():
        text = path.read_text()
        assert text.startswith("// "), path
        if path.name != "runtime.h":
            assert not forbidden.search(text), path
