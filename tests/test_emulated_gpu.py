"""On a GPU that is emulated (tests/emulated_gpu): where it is as strict as one, and some tests of
the engines and of the kernels' launches that are marked `gpu`.

`make test-emulated-gpu` runs most of those.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from toolkit import EMULATED
from torch import Tensor

from chatterbox_fast import dispatch
from chatterbox_fast.graph import Pool, _begin

ROOT = Path(__file__).resolve().parent.parent

LAUNCHES = (
    "tests/test_emulated_gpu.py",
    "tests/test_cfg_sample.py",
    "tests/test_graph.py",
    "tests/test_resample.py",
    "tests/test_skinny_linear_fused.py",
)
SMALL = tuple(
    f"tests/test_cfg_sample.py::TestOnAGpu::test_draws_are_stocks[{turbo}-65536]"
    for turbo in (False, True)
)
"""Where a thread of torch's launch draws more than four numbers."""
ENGINES = (
    "tests/test_engine.py::test_the_captured_step_equals_the_eager_one[exact]",
    "tests/test_engine.py::test_decoding_on_a_gpu_does_not_wait",
    "tests/test_engine.py::test_originals_wait_on_the_host_and_come_back",
    "tests/test_engine.py::test_a_capture_that_fails_is_tried_again",
    "tests/test_engine.py::test_requests_on_streams_of_their_own",
    "tests/test_pool.py",
    "tests/test_engine.py::test_after_an_allocation_that_failed_the_next_request_is_served",
    "tests/test_s3gen_bucket.py::test_a_graph_is_what_runs_eagerly",
    "tests/test_s3gen_ops.py::test_one_wait_on_a_gpu",
    "tests/parity/test_generate.py::test_seeds_on_a_gpu",
)


@pytest.mark.skipif(EMULATED or torch.cuda.is_available(), reason="there is a GPU already")
@pytest.mark.parametrize(
    ("tests", "device"),
    [
        (LAUNCHES, {}),
        (SMALL, {"EMULATED_GPU_MULTIPROCESSORS": "6"}),
        (ENGINES, {"EMULATED_GPU_BY_CPU_OP": "large"}),
    ],
    ids=["launches", "small", "engines"],
)
def test_on_an_emulated_gpu(tests: tuple[str, ...], device: dict[str, str]) -> None:
    from emulated_gpu import build

    if reason := build.why_not():
        pytest.skip(reason)
    if dispatch.choose("cfg_sample", torch.device("cuda"), "cuda").backend != "extension":
        pytest.skip("the extension has no CUDA kernels")
    done = subprocess.run(
        [sys.executable, build.HERE / "build.py", "-m", "pytest", "-m", "gpu", "-q", *tests],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=1500,
        env={**os.environ, **device},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1]


# ---- the emulated GPU itself


@pytest.fixture
def _emulated() -> None:
    if not EMULATED:
        pytest.skip("of the emulated GPU alone")


on_the_emulated = [pytest.mark.gpu, pytest.mark.usefixtures("_emulated")]


@contextmanager
def capturing() -> Iterator[torch.cuda.CUDAGraph]:
    """Its user ends the capture. What a failed one leaves is cleared, as `graph.capture` does."""
    pool, found = Pool(torch.device("cuda")), torch.cuda.CUDAGraph()
    with torch.cuda.stream(pool.stream):
        torch.cuda.synchronize()
        _begin(found, pool)
        try:
            yield found
        finally:
            pool.give_up()


class TestItIsAsStrict:
    pytestmark = on_the_emulated

    def test_a_host_that_reads_early_reads_what_was_there(self) -> None:
        x, on_host = torch.ones(4, device="cuda"), torch.zeros(4).pin_memory()
        on_host.copy_(x, non_blocking=True)
        assert on_host.tolist() == [0.0] * 4
        torch.cuda.synchronize()
        assert on_host.tolist() == [1.0] * 4

    def test_an_event_is_not_over_at_once(self) -> None:
        torch.ones(4, device="cuda")
        event = torch.cuda.Event()
        event.record()
        assert [event.query(), event.query()] == [False, True]

    def test_a_stream_that_does_not_wait_computes_with_what_it_finds(self) -> None:
        stream = torch.cuda.Stream()
        for waits in (False, True):
            x = torch.zeros(4, device="cuda")
            torch.cuda.synchronize()
            x += 1
            if waits:
                stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                y = x * 10
            stream.synchronize()
            assert y.tolist() == [10.0 * waits] * 4
            torch.cuda.synchronize()

    def test_a_capture_runs_nothing(self) -> None:
        x = torch.ones(4, device="cuda")
        with capturing() as graph:
            x += 1
            graph.capture_end()
        assert x.tolist() == [1.0] * 4
        graph.replay()
        graph.replay()
        assert x.tolist() == [3.0] * 4

    @pytest.mark.parametrize(
        "forbidden",
        [
            lambda x: x.sum().item(),
            lambda x: x[x > 0],
            lambda _: torch.cuda.synchronize(),
            lambda _: torch.cuda.current_stream().query(),
        ],
        ids=["item", "mask", "synchronize", "query"],
    )
    def test_a_capture_does_not_survive_a_look(self, forbidden: Callable[[Tensor], object]) -> None:
        x = torch.ones(4, device="cuda")
        with capturing() as graph:
            with pytest.raises(RuntimeError, match="captur"):
                forbidden(x)
            with pytest.raises(RuntimeError, match="previous error during capture"):
                graph.capture_end()
        assert x.tolist() == [1.0] * 4

    def test_torch_refuses_to_capture_a_copy_of_the_hosts_memory(self) -> None:
        x = torch.ones(4, device="cuda")
        with capturing() as graph:
            for copy in (x.cpu, lambda: x.copy_(torch.zeros(4))):
                with pytest.raises(RuntimeError, match="unless the CPU tensor is pinned"):
                    copy()
            graph.capture_end()

    def test_a_capture_does_not_wait_for_what_is_outside(self) -> None:
        event = torch.cuda.Event()
        event.record()
        with capturing() as graph:
            with pytest.raises(RuntimeError):
                torch.cuda.current_stream().wait_event(event)
            with pytest.raises(RuntimeError, match="previous error during capture"):
                graph.capture_end()

    @pytest.mark.parametrize("joins", [False, True])
    def test_streams_of_a_capture_join(self, joins: bool) -> None:
        x, stream = torch.ones(4, device="cuda"), torch.cuda.Stream()
        with capturing() as graph:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                x += 1
            if joins:
                torch.cuda.current_stream().wait_stream(stream)
                graph.capture_end()
            else:
                with pytest.raises(RuntimeError):
                    graph.capture_end()

    def test_graphs_that_do_not_wait_for_each_other_mix(self) -> None:
        graphs, streams = [], [torch.cuda.Stream() for _ in range(2)]
        x = torch.zeros(1, device="cuda")
        for digit in (1, 2):
            with capturing() as graph:
                for _ in range(3):
                    x.mul_(10).add_(digit)
                graph.capture_end()
            graphs.append(graph)
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        assert x.item() not in (111222, 222111)

    def test_the_device_is_checked(self) -> None:
        x, on_cpu = torch.ones(4, 4, device="cuda"), torch.ones(4, 4)
        with pytest.raises(RuntimeError, match="same device"):
            torch.mm(x, on_cpu)
        torch.cuda.set_sync_debug_mode("error")
        try:
            with pytest.raises(RuntimeError, match="synchroniz"):
                x[torch.tensor([1, 2])]
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_waits_are_counted(self) -> None:
        x = torch.ones(4, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            for wait in (x.cpu, x.nonzero, x.sum().item, torch.cuda.current_stream().synchronize):
                with pytest.raises(RuntimeError, match="synchroniz"):
                    wait()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_an_operator_that_is_not_emulated_says_so(self) -> None:
        with pytest.raises(RuntimeError, match="a kernel that is not emulated"):
            torch.randperm(1000, device="cuda")

    def test_memory_ends(self) -> None:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2**50, device="cuda")

    def test_numbers_are_torchs_own(self) -> None:
        """As others have published them from GPUs: a few depend on no size of the device."""
        torch.manual_seed(0)
        uniform = torch.rand(5, device="cuda").tolist()
        assert uniform == pytest.approx([0.3990, 0.5167, 0.0249, 0.9401, 0.9459], abs=5e-5)
        torch.manual_seed(0)
        normal = torch.randn(5, device="cuda").tolist()
        assert normal == pytest.approx([-0.9247, -0.4253, -2.6438, 0.1452, -0.1209], abs=5e-5)
