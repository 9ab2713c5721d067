"""Python on a machine whose CUDA device is emulated: torch's CUDA build, our extension, no GPU.

    python tests/emulated_gpu/build.py -m pytest -m gpu tests/test_graph.py

builds the emulator (half a minute, kept under build/) and runs Python with those arguments. What it
is, and is not: device.h. EMULATED_GPU_TRACE=1 prints what is enqueued and what runs,
EMULATED_GPU_EAGER=1 runs everything at once, EMULATED_GPU_MIB is the device's memory,
EMULATED_GPU_MULTIPROCESSORS how many it has, and EMULATED_GPU_BY_CPU_OP names ops of ours, or all
"large" ones, that run as their CPU op does, since a kernel thread by thread is a thousand times as
slow.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KERNELS, HOST_CUDA = ROOT / "csrc" / "kernels", HERE.parent / "host_cuda"
_torch = importlib.util.find_spec("torch")
TORCH = Path(_torch.origin).parent if _torch and _torch.origin else Path("torch")
TOOLKIT = TORCH.parent / "nvidia" / "cu13"

COMPILE = ("-std=c++17", "-O2", "-g1", "-fPIC", "-fno-strict-aliasing", "-Wno-unknown-pragmas")
AS_KERNELS = (*COMPILE, "-ffp-contract=off", f"-I{ROOT / 'csrc'}", f"-I{HOST_CUDA}")
CUDA = (f"-I{TOOLKIT / 'include'}", f"-I{TOOLKIT / 'include' / 'cccl'}")
RUNTIME = ("device", "memory", "streams", "kernels", "properties", "unused")
EXPORTED = "libcudart.so.13 { global: cuda*; __cuda*; gpu_*; local: *; };\n"


def why_not() -> str | None:
    """The reason why it cannot be built here, or None."""
    if platform.machine() != "x86_64" or shutil.which("g++") is None:
        return "it takes g++ on x86-64"
    if not (TOOLKIT / "include" / "curand_kernel.h").exists():
        return f"CUDA 13's headers are not in {TOOLKIT}"
    if not (TORCH / "lib" / "libtorch_cuda.so").exists():
        return "torch is a build without CUDA"
    return None


def build() -> Path:
    """The folder of the emulator's libraries.

    Raises:
        RuntimeError: the compiler refused; with what it said.
    """
    sources = [*HERE.glob("*.*"), *HOST_CUDA.glob("*.*"), *KERNELS.glob("*.*")]
    digest = hashlib.sha256((TORCH / "version.py").read_bytes())
    for source in sorted(sources):
        digest.update(source.read_bytes())
    folder = ROOT / "build" / f"emulated_gpu-{digest.hexdigest()[:12]}"
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            _build(made)
            with suppress(OSError):  # somebody else was faster
                made.rename(folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """What start.py needs to see the device."""
    library_path = os.environ.get("LD_LIBRARY_PATH", "")
    return {
        **os.environ,
        "LD_PRELOAD": "libcudart.so.13",
        "LD_LIBRARY_PATH": f"{folder}:{library_path}".rstrip(":"),
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # that its operators are replaced is meant
        "EMULATED_GPU": str(folder),
    }


def _build(folder: Path) -> None:
    kernels = sorted(KERNELS.glob("*.cu"))
    runtime = [HOST_CUDA / f"{name}.cpp" for name in ("block_memory", "fiber", "host_runtime")]
    with ThreadPoolExecutor(2) as pool:
        objects = [folder / f"{path.stem}.o" for path in (*kernels, *runtime)]
        jobs = [
            pool.submit(_run, "g++", *AS_KERNELS, "-x", "c++", "-c", path, "-o", made)
            for path, made in zip((*kernels, *runtime), objects, strict=True)
        ]
        for job in jobs:
            job.result()
    (folder / "exported").write_text(EXPORTED)
    (folder / "kernel_table.cpp").write_text(_table(objects[: len(kernels)]))
    _run(
        "g++", *COMPILE, "-Wall", "-Wextra", "-shared", *CUDA, f"-I{HOST_CUDA}", f"-I{HERE}",
        f"-I{ROOT / 'csrc'}",
        *(HERE / f"{name}.cpp" for name in RUNTIME), folder / "kernel_table.cpp", *objects,
        "-Wl,-soname,libcudart.so.13", f"-Wl,--version-script={folder / 'exported'}",
        "-o", folder / "libcudart.so.13",
    )  # fmt: skip
    _run("g++", "-shared", "-fPIC", HERE / "driver.cpp", "-Wl,-soname,libcuda.so.1",
         "-o", folder / "libcuda.so.1")  # fmt: skip
    include = TORCH / "include"
    _run(
        "g++", *COMPILE, "-shared", *CUDA, f"-I{include}",
        f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}", HERE / "operators.cpp",
        HERE / "random.cpp",
        f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-ltorch_cuda", "-lc10", "-lc10_cuda",
        folder / "libcudart.so.13", "-o", folder / "operators.so",
    )  # fmt: skip


def _table(objects: list[Path]) -> str:
    """kernel_table.h's table, of what g++ made of the kernels."""
    symbols = sorted({
        line.split()[-1]
        for each in objects
        for line in _run("nm", "--defined-only", each).splitlines()
        if "_kernelI" in line and line.split()[-2] == "W"
    })  # fmt: skip
    return "\n".join(
        [
            '#include "kernel_table.h"',
            *(f'#include "kernels/{path.name}"' for path in sorted(KERNELS.glob("*.h"))),
            *(f'extern "C" void kernel_{i}() asm("{s}");' for i, s in enumerate(symbols)),
            'extern "C" const Kernel kernel_table[] = {',
            *(f"  {_entry(_readable(s), i)}," for i, s in enumerate(symbols)),
            "  {nullptr, nullptr, 0}};",
        ]
    )


def _entry(name: str, number: int) -> str:
    """Of a kernel that is called `name`: "void space::kernel<...>(Arguments<...>)"."""
    argument = name[name.rindex("(") + 1 : -1]
    return f'{{"{name}", kernel_{number}, sizeof({argument})}}'


def _readable(symbol: str) -> str:
    demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    demangle.restype = ctypes.c_char_p
    status = ctypes.c_int()
    name: bytes = demangle(symbol.encode(), None, None, ctypes.byref(status))
    return name.decode()


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    if reason := why_not():
        raise SystemExit(f"no emulated GPU here: {reason}")
    command = [sys.executable, str(HERE / "start.py"), *sys.argv[1:]]
    os.execve(sys.executable, command, environment(build()))
