"""The build: what setup.py decides, what a wheel holds, what the first import says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from toolkit import cuda_toolkit, load_setup

import chatterbox_fast
from chatterbox_fast import _ext

ROOT = Path(__file__).resolve().parent.parent
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
FOLDERS = ("csrc", "chatterbox_fast", "triton_kernels", "assets")
PACKED = (
    "_build.json",
    "py.typed",
    "triton_kernels/__init__.py",
    "assets/voice_prompt.flac",
    "t3/decode_step.py",
    "audio/bank.py",
)


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    return load_setup()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources without anything built."""
    copied = tmp_path / "tree"
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copied / name, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, copied / name)
    return copied


def fake_toolkit(home: Path, release: str, lib: str = "lib64/libcudart.so") -> Path:
    for name in ("bin/nvcc", "include/cuda_runtime.h", lib):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch()
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho release {release}, V{release}.1\necho '#$ TOP={home}' >&2\n")
    nvcc.chmod(0o755)
    return home


def without_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setup: ModuleType) -> None:
    """No toolkit in the environment, in site-packages or on PATH."""
    for name in ("CUDA_HOME", "CUDA_PATH", "CHATTERBOX_FAST_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin") + ":/usr/bin:/bin")
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda _: str(tmp_path / "site"))


def test_a_toolkit_is_found_by_name_in_site_packages_and_behind_a_wrapper(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_cuda(monkeypatch, tmp_path, setup)
    monkeypatch.setattr(setup.shutil, "which", lambda _: None)
    with pytest.raises(setup.CudaUnavailable, match="no nvcc with its headers found"):
        setup.find_toolkit("13")

    real = fake_toolkit(tmp_path / "opt" / "cuda", "13.0")
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {real}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setattr(setup.shutil, "which", lambda _: str(wrapper))
    assert setup.find_toolkit("13") == (real, "13.0")

    packages = fake_toolkit(tmp_path / "site" / "nvidia" / "cu13", "13.1")
    assert setup.find_toolkit("13") == (packages, "13.1")
    with pytest.raises(setup.CudaUnavailable, match=r"torch was built for CUDA 12, nvcc is 13\.0"):
        setup.find_toolkit("12")

    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(setup.CudaUnavailable, match="looked in CUDA_HOME=.*nowhere"):
        setup.find_toolkit("13")


def test_the_pip_packages_get_the_link_that_the_linker_asks_for(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    home = fake_toolkit(tmp_path / "cu13", "13.0", lib="lib/libcudart.so.13")
    links = setup.cudart_dir(setup.Toolkit(home, "13.0"))
    assert (links / "libcudart.so").resolve() == home / "lib" / "libcudart.so.13"
    (home / "lib" / "libcudart.so.13").unlink()
    with pytest.raises(setup.CudaUnavailable, match=r"no libcudart\.so under"):
        setup.cudart_dir(setup.Toolkit(home, "13.0"))


def test_architectures(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [(9, 0), (8, 9), (9, 0)]
    cuda = SimpleNamespace(
        is_available=lambda: bool(gpus),
        device_count=lambda: len(gpus),
        get_device_capability=lambda i: gpus[i],
    )
    fake_torch = SimpleNamespace(cuda=cuda)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert setup.choose_archs(fake_torch) == "8.9;9.0"
    gpus.clear()
    assert setup.choose_archs(fake_torch) == "8.9+PTX"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;12.0")
    assert setup.choose_archs(fake_torch) == "7.5;12.0"


def test_a_torch_without_cuda_gets_cpu_ops(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CHATTERBOX_FAST_CUDA", raising=False)
    cpu_torch = SimpleNamespace(version=SimpleNamespace(cuda=None), __version__="2.13.0+cpu")
    with pytest.raises(setup.CudaUnavailable, match=r"torch 2\.13\.0\+cpu is a build without CUDA"):
        setup.prepare_cuda(cpu_torch)
    monkeypatch.setenv("CHATTERBOX_FAST_CUDA", "1")
    with pytest.raises(SystemExit, match="CHATTERBOX_FAST_CUDA=1, but torch 2.13.0"):
        setup.extension(cpu_torch, {})


def test_every_source_is_built(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CUDA all but its own."""
    from torch.utils import cpp_extension

    for name in ("CppExtension", "CUDAExtension"):
        monkeypatch.setattr(cpp_extension, name, lambda sources, **_: sources)
    monkeypatch.setattr(setup, "write_reason", lambda _: "")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    prepare_cuda = setup.prepare_cuda
    paths = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".cu")]
    every = sorted(str(path.relative_to(ROOT)) for path in paths)
    monkeypatch.setattr(setup, "prepare_cuda", lambda _: (setup.Toolkit(ROOT, "13.0"), ROOT))
    assert setup.extension(torch, {}) == every
    monkeypatch.setenv("CHATTERBOX_FAST_CUDA", "0")
    monkeypatch.setattr(setup, "prepare_cuda", prepare_cuda)
    without = [path for path in every if path.endswith(".cpp") and "/cuda/" not in path]
    assert setup.extension(torch, {}) == without


def run_setup(tree: Path, *arguments: str, hide_torch: bool = False, **env: str) -> str:
    hide = "sys.modules['torch'] = None;" if hide_torch else ""
    code = f"import runpy, sys; {hide} runpy.run_path('setup.py', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tree, env={**os.environ, **env}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stderr if done.returncode else f"ok {done.stderr}"


def wheel_names(tree: Path) -> set[str]:
    (wheel,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_without_torch_the_python_part_installs_and_says_so(tree: Path) -> None:
    said = run_setup(tree, "bdist_wheel", hide_torch=True)
    assert said.startswith("ok")
    assert "chatterbox_fast: extension not built: torch was not installed at build time" in said
    names = wheel_names(tree)
    assert "chatterbox_fast/t3/runner.py" in names
    assert not any(name.endswith(".so") for name in names)
    record = json.loads((tree / "chatterbox_fast" / "_build.json").read_text())
    assert "torch was not installed" in record["missing"]
    said = run_setup(tree, "bdist_wheel", hide_torch=True, CHATTERBOX_FAST_CUDA="1")
    assert "CHATTERBOX_FAST_CUDA=1, but torch is not installed" in said


def test_a_wheel_holds_everything_and_its_import_says_what_is_missing(tree: Path) -> None:
    """Of the ops their schemas alone: that they compile, this environment's extension shows."""
    for source in (tree / "csrc").rglob("*.cpp"):
        if source.name not in ("module.cpp", "registration.cpp"):
            source.unlink()
    assert run_setup(tree, "bdist_wheel", CHATTERBOX_FAST_CUDA="0").startswith("ok")
    names = wheel_names(tree)
    assert {f"chatterbox_fast/{name}" for name in PACKED} <= names
    assert any(name.startswith("chatterbox_fast/_C.") for name in names)
    (wheel,) = (tree / "dist").glob("*.whl")
    site = tree / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import chatterbox_fast as c, chatterbox_fast.triton_kernels;"
        f"assert c.__file__.startswith({str(site)!r}); print(c.build_info())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=site, env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr.count("CUDA kernels not built: CHATTERBOX_FAST_CUDA=0") == 1
    assert "'cuda': None" in done.stdout


def test_an_sdist_holds_every_source(tree: Path) -> None:
    assert run_setup(tree, "sdist", hide_torch=True).startswith("ok")
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.split("/", 1)[-1] for name in packed.getnames()}
    expected = {str(p.relative_to(tree)) for p in (tree / "csrc").rglob("*.*")}
    assert expected <= names


def test_the_extension_of_this_environment_loads() -> None:
    info = chatterbox_fast.build_info()
    assert _ext.module is not None, info["missing"]
    assert torch.__version__.startswith(info["torch"])
    if info["missing"] is None:
        assert info["cuda"].split(".")[0] == torch.version.cuda.split(".")[0]
        assert info["archs"]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"torch": "1.0"}, "built for torch 1.0, running .*; reinstall chatterbox-fast"),
        ({"torch": torch.__version__}, "extension not loaded: no module"),
        ({"missing": "extension not built: why"}, "extension not built: why; reinstall"),
        ({}, "extension not loaded: no module"),
    ],
)
def test_an_extension_that_does_not_load_says_why(record: dict, said: str) -> None:
    assert re.search(said, _ext._why_not_loaded(record, ImportError("no module")))


def test_cuda_bindings_compile_without_a_warning() -> None:
    """All in one, so that torch's headers are read once. Kernels have tests of their own."""
    from torch.utils.cpp_extension import include_paths

    bindings = sorted((ROOT / "csrc" / "cuda").glob("*.cpp"))
    assert bindings
    system = [*include_paths(), str(cuda_toolkit() / "include")]
    done = subprocess.run(
        ["g++", "-std=c++17", "-DCBF_WITH_CUDA=1", "-fsyntax-only", "-Wall", "-Wextra", "-Werror",
         f"-I{ROOT / 'csrc'}", *(f"-isystem{path}" for path in system), "-x", "c++", "-"],
        input="".join(f'#include "{path}"\n' for path in bindings),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_cmake_builds_and_tests_the_kernels(tmp_path: Path) -> None:
    cmake = Path(sys.executable).with_name("cmake")
    command = str(cmake) if cmake.exists() else shutil.which("cmake")
    if command is None:
        pytest.skip("no cmake")
    for arguments in (
        ["-S", str(ROOT), "-B", str(tmp_path)],
        ["--build", str(tmp_path)],
    ):
        subprocess.run([command, *arguments], check=True, capture_output=True)
    ctest = Path(command).with_name("ctest")
    done = subprocess.run(
        [str(ctest), "--test-dir", str(tmp_path)], check=True, capture_output=True, text=True
    )
    assert "100% tests passed" in done.stdout
