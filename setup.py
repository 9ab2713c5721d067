"""Builds ``chatterbox_fast._C`` against the torch of the environment it is installed into.

Environment variables:
    CHATTERBOX_FAST_CUDA   unset: CUDA kernels where they can be built; 1: an error where they
                           cannot; 0: CPU ops only.
    TORCH_CUDA_ARCH_LIST   architectures; default: those of the visible GPUs, else 8.9+PTX.
    CUDA_HOME              the toolkit; default: the one in site-packages, else that of PATH.
    MAX_JOBS               as torch reads it.

The first import says in one line what could not be built: from ``chatterbox_fast/_build.json``,
or, where there are no CUDA kernels, from the extension itself.
"""

from __future__ import annotations

import glob
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent


class CudaUnavailable(Exception):
    """CUDA kernels cannot be built here; the message is the one-line reason."""


class Toolkit(NamedTuple):
    home: Path
    version: str  # "13.0"


def import_torch() -> ModuleType | None:
    """The target environment's torch, also under pip's build isolation; None where there is none.

    An isolated build cannot import torch, but sysconfig still names the target's site-packages.
    """
    for extra in (None, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        if extra is not None and extra not in sys.path:
            sys.path.append(extra)
        try:
            return importlib.import_module("torch")
        except ImportError:
            continue
    return None


def toolkit_at(home: Path) -> Toolkit | None:
    """The CUDA toolkit at `home`, or None where compiler or headers are missing."""
    nvcc = home / "bin" / "nvcc"
    if not nvcc.exists() or not (home / "include" / "cuda_runtime.h").exists():
        return None
    out = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"release (\d+\.\d+)", out.stdout)
    return Toolkit(home, match.group(1)) if match else None


def toolkit_on_path() -> Toolkit | None:
    """The toolkit behind `nvcc` on PATH, which may be a wrapper script elsewhere."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    dry = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    )
    match = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)
    home = Path(match.group(1).strip()) if match else Path(nvcc).resolve().parent.parent
    return toolkit_at(home.resolve())


def find_toolkit(cuda_major: str) -> Toolkit:
    """CUDA_HOME, else the pip packages of this environment, else PATH; of torch's CUDA major.

    Raises:
        CudaUnavailable: no toolkit, or none of that major.
    """
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        candidates = [toolkit_at(Path(named))]
    else:
        site = Path(sysconfig.get_path("purelib"))
        candidates = [toolkit_at(site / "nvidia" / f"cu{cuda_major}"), toolkit_on_path()]
    found = [toolkit for toolkit in candidates if toolkit is not None]
    if not found:
        where = f"CUDA_HOME={named}" if named else "CUDA_HOME, site-packages/nvidia and PATH"
        raise CudaUnavailable(f"no nvcc with its headers found (looked in {where})")
    for toolkit in found:
        if toolkit.version.split(".")[0] == cuda_major:
            return toolkit
    raise CudaUnavailable(f"torch was built for CUDA {cuda_major}, nvcc is {found[0].version}")


def cudart_dir(toolkit: Toolkit) -> Path:
    """A folder holding `libcudart.so`; the pip packages ship only `libcudart.so.MAJOR`."""
    for lib in (toolkit.home / "lib64", toolkit.home / "lib"):
        if (lib / "libcudart.so").exists():
            return lib
    major = toolkit.version.split(".")[0]
    versioned = toolkit.home / "lib" / f"libcudart.so.{major}"
    if not versioned.exists():
        raise CudaUnavailable(f"no libcudart.so under {toolkit.home}")
    links = ROOT / "build" / "cuda_lib"
    links.mkdir(parents=True, exist_ok=True)
    link = links / "libcudart.so"
    link.unlink(missing_ok=True)
    link.symlink_to(versioned)
    return links


def choose_archs(torch: ModuleType) -> str:
    """TORCH_CUDA_ARCH_LIST, else the visible GPUs' architectures, else 8.9+PTX."""
    if named := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return named
    if not torch.cuda.is_available():
        return "8.9+PTX"
    seen = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(seen))


def prepare_cuda(torch: ModuleType) -> tuple[Toolkit, Path]:
    """Finds the toolkit and points torch's build helpers at it, before they are imported.

    Raises:
        CudaUnavailable: with the reason, where CUDA kernels cannot be built.
    """
    if os.environ.get("CHATTERBOX_FAST_CUDA") == "0":
        raise CudaUnavailable("CHATTERBOX_FAST_CUDA=0")
    if torch.version.cuda is None:
        raise CudaUnavailable(f"torch {torch.__version__} is a build without CUDA")
    toolkit = find_toolkit(torch.version.cuda.split(".")[0])
    lib = cudart_dir(toolkit)
    os.environ["CUDA_HOME"] = str(toolkit.home)
    os.environ["TORCH_CUDA_ARCH_LIST"] = choose_archs(torch)
    return toolkit, lib


def sources(*patterns: str) -> list[str]:
    found = (glob.glob(pattern, root_dir=ROOT, recursive=True) for pattern in patterns)
    return sorted(path for paths in found for path in paths)


def write_reason(missing: str) -> str:
    """A folder with the header that tells module.cpp why there is no CUDA."""
    folder = ROOT / "build" / "include"
    folder.mkdir(parents=True, exist_ok=True)
    quoted = json.dumps(missing)
    (folder / "cbf_missing.h").write_text(f"#pragma once\n#define CBF_MISSING {quoted}\n")
    return str(folder)


def extension(torch: ModuleType, info: dict[str, str | None]) -> object:
    """The extension module, with CUDA where it can be; `info` learns what was left out, and why."""
    common = {
        "name": "chatterbox_fast._C",
        "include_dirs": [str(ROOT / "csrc")],
        "depends": sources("csrc/**/*.h", "csrc/**/*.cuh"),
    }
    # Contracted to fused multiply-adds, scores would round differently from stock's.
    cxx = ["-O3", "-Wall", "-ffp-contract=off"]
    if sys.platform == "linux":
        # at::parallel_for is serial without it. Not linked: the threads are torch's own.
        cxx.append("-fopenmp")
    try:
        toolkit, lib = prepare_cuda(torch)
    except CudaUnavailable as reason:
        if os.environ.get("CHATTERBOX_FAST_CUDA") == "1":
            raise SystemExit(f"chatterbox_fast: CHATTERBOX_FAST_CUDA=1, but {reason}") from None
        info["missing"] = f"CUDA kernels not built: {reason}"
        common["include_dirs"].append(write_reason(info["missing"]))
        from torch.utils.cpp_extension import CppExtension

        return CppExtension(
            sources=sources("csrc/*.cpp", "csrc/cpu/*.cpp"), extra_compile_args=cxx, **common
        )
    info["cuda"], info["archs"] = toolkit.version, os.environ["TORCH_CUDA_ARCH_LIST"]
    from torch.utils.cpp_extension import CUDAExtension

    return CUDAExtension(
        sources=sources("csrc/*.cpp", "csrc/cpu/*.cpp", "csrc/cuda/*.cpp", "csrc/**/*.cu"),
        library_dirs=[str(lib)],
        define_macros=[("CBF_WITH_CUDA", "1")],
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3", "-lineinfo", "--fmad=false"]},
        **common,
    )


def main() -> None:
    from setuptools import setup

    info: dict[str, str | None] = {"torch": None, "cuda": None, "archs": None, "missing": None}
    options: dict[str, object] = {}
    torch = import_torch()
    if torch is None:
        info["missing"] = "extension not built: torch was not installed at build time"
        if os.environ.get("CHATTERBOX_FAST_CUDA") == "1":
            raise SystemExit("chatterbox_fast: CHATTERBOX_FAST_CUDA=1, but torch is not installed")
    else:
        info["torch"] = str(torch.__version__)
        options["ext_modules"] = [extension(torch, info)]
        from torch.utils.cpp_extension import BuildExtension

        options["cmdclass"] = {"build_ext": BuildExtension}
    if info["missing"]:
        print(f"chatterbox_fast: {info['missing']}", file=sys.stderr)
    (ROOT / "chatterbox_fast" / "_build.json").write_text(json.dumps(info) + "\n")
    setup(**options)


if __name__ == "__main__":
    main()
