"""Captures: what they leave as it was, when they succeed and when they fail; other threads."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from chatterbox_fast.graph import (
    CaptureError,
    Pool,
    capture,
    drawing,
    free_cached,
    settle_all,
    why_no_graph,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class State:
    """Of a generator, as torch 2.6 to 2.11 tie it to a capture."""

    def __init__(self, offset: int = 0) -> None:
        self.offset, self.capturing = offset, False


class Generator:
    """torch.Generator for CUDA: a state that others may share."""

    def __init__(self, state: State) -> None:
        self.state = state

    def graphsafe_get_state(self) -> Generator:
        return Generator(self.state)

    def graphsafe_set_state(self, other: Generator) -> None:
        self.state = other.state

    def clone_state(self) -> Generator:
        return Generator(State(self.state.offset))

    def draw(self) -> int:
        """Also what the replay of a graph does with the state that it was captured with."""
        if self.state.capturing:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        self.state.offset += 4
        return self.state.offset


class Device:
    """What `capture` uses of torch.cuda, on a machine without a GPU."""

    def __init__(self) -> None:
        self.current = self.default = object()
        self.generator = Generator(State())
        self.pools: list[object] = []
        self.recording: list[object] = []
        self.released: list[object] = []
        self.captures = 0
        self.invalid = False

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        """Puts it in torch.cuda's place."""
        device = self

        class Stream:
            def __init__(self, _: object = None) -> None: ...

            def wait_stream(self, other: object) -> None:
                assert other is not self

        class Graph:
            def capture_begin(self, pool: object, *, capture_error_mode: str) -> None:
                assert capture_error_mode == "thread_local"
                assert device.current is not device.default
                device.captures += 1
                self.state = device.generator.state
                self.state.capturing = True
                device.pools.append(pool)
                device.recording.append(pool)

            def capture_end(self) -> None:
                device.captures -= 1
                if device.invalid:
                    raise RuntimeError("operation failed due to a previous error during capture")
                device.recording.remove(device.pools[-1])
                self.state.capturing = False

            def replay(self) -> None:
                Generator(self.state).draw()

        def end(_index: int, pool: object) -> None:
            if pool not in device.recording:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            device.recording.remove(pool)

        patch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
        release = lambda _index, pool: device.released.append(pool)  # noqa: E731
        patch.setattr(torch._C, "_cuda_releasePool", release, raising=False)
        handles = itertools.count()
        self.default = self.current = Stream()
        replaced: dict[str, Any] = {
            "device": lambda _: nullcontext(),
            "Stream": Stream,
            "graph_pool_handle": lambda: (0, next(handles)),
            "CUDAGraph": Graph,
            "current_stream": lambda: device.current,
            "current_device": lambda: 0,
            "stream": self.on,
            "synchronize": lambda _=None: None,
            "empty_cache": lambda: None,
            "default_generators": (self.generator,),
        }
        for name, value in replaced.items():
            patch.setattr(torch.cuda, name, value)

    @contextmanager
    def on(self, stream: object) -> Iterator[None]:
        """torch.cuda.stream."""
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    fake = Device()
    fake.patch(monkeypatch)
    return fake


def nth_run(number: int, act: Callable[[], object]) -> Callable[[], None]:
    """A step that acts in its run of that number; the third one is captured."""
    runs: list[None] = []

    def step() -> None:
        runs.append(None)
        if len(runs) == number:
            act()

    return step


def in_another_thread(act: Callable[[], Any]) -> Any:
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(act())
        except RuntimeError as failure:
            found.append(failure)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


def test_others_draw_and_replay_while_a_capture_lasts(device: Device) -> None:
    earlier = capture(lambda: None, GPU)
    drawn: list[Any] = []

    def elsewhere() -> None:
        drawn.append(in_another_thread(device.generator.draw))
        drawn.append(in_another_thread(earlier))

    pool, streams = Pool(GPU), []
    capture(nth_run(3, elsewhere), GPU, pool)()
    for number in (1, 3):
        capture(nth_run(number, lambda: streams.append(device.current)), GPU, pool)
    assert streams == [pool.stream] * 2, "memory goes from graph to graph on one stream alone"
    assert device.pools[1:] == [pool.handle] * 3
    assert device.pools[0] != pool.handle
    assert device.recording == device.released == []
    assert drawn == [4, None]
    assert device.generator.draw() == 8, "nothing was drawn twice"
    assert device.current is device.default


def test_the_runs_before_a_capture_keep_their_place(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After what the caller has enqueued, and before what it enqueues next."""
    waits: list[tuple[object, object]] = []
    monkeypatch.setattr(
        torch.cuda.Stream, "wait_stream", lambda self, other: waits.append((self, other))
    )
    runs: list[int] = []
    capture(lambda: runs.append(len(waits)), GPU)
    own = waits[0][0]
    assert waits == [(own, device.default), (device.default, own)]
    assert runs == [1, 1, 2]


@pytest.mark.usefixtures("device")
def test_one_capture_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other's wait for the device would break it."""
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _=None: events.append("waits"))
    other = threading.Thread(target=capture, args=(lambda: None, GPU))

    def meanwhile() -> None:
        other.start()
        other.join(0.2)
        events.append("ends")

    capture(nth_run(3, meanwhile), GPU)
    other.join()
    assert events == ["waits", "ends", "waits"]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("act", [free_cached, settle_all])
def test_what_no_capture_survives_waits_for_its_end(act: Callable[[torch.device], None]) -> None:
    act(CPU)  # nothing there to wait for
    other = threading.Thread(target=act, args=(GPU,))
    waits: list[bool] = []

    def meanwhile() -> None:
        other.start()
        other.join(0.2)
        waits.append(other.is_alive())

    capture(nth_run(3, meanwhile), GPU)
    other.join()
    assert waits == [True]


@pytest.mark.usefixtures("device")
def test_a_draw_waits_while_a_capture_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    begins, drawn = threading.Event(), threading.Event()

    def draw() -> None:
        begins.wait()
        with drawing(GPU, None):
            drawn.set()

    whole: Any = torch.cuda.CUDAGraph.capture_begin

    def slowly(*pool: object, **mode: Any) -> None:
        begins.set()
        assert not drawn.wait(0.2)
        whole(*pool, **mode)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", slowly)
    thread = threading.Thread(target=draw)
    thread.start()
    capture(lambda: None, GPU)
    thread.join()
    assert drawn.is_set()


def test_where_there_are_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHATTERBOX_FAST_GRAPHS", raising=False)
    assert why_no_graph(CPU) == "graphs are a GPU's"
    assert why_no_graph(GPU) is None
    monkeypatch.setenv("CHATTERBOX_FAST_GRAPHS", "0")
    assert why_no_graph(GPU) == "CHATTERBOX_FAST_GRAPHS=0"


def test_only_a_gpus_global_generator_is_waited_for() -> None:
    with drawing(GPU, None), drawing(CPU, None), drawing(GPU, torch.Generator()):
        pass


@pytest.mark.parametrize("ends", [True, False])
def test_a_capture_that_fails_leaves_nothing_behind(device: Device, ends: bool) -> None:
    earlier = capture(lambda: None, GPU)

    def look() -> None:
        device.invalid = not ends
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    with pytest.raises(CaptureError, match=r"not permitted when stream is capturing$"):
        capture(nth_run(3, look), GPU)
    assert device.current is device.default
    assert device.captures == 0
    assert device.recording == [], "the allocator would wait for its end, and free nothing"
    assert device.released == ([] if ends else device.pools[-1:]), "else the graph releases it"
    assert device.generator.draw() == 4
    earlier()
    device.invalid = False
    capture(lambda: None, GPU)()


def test_out_of_memory_is_told_apart(device: Device) -> None:
    def ours() -> None:
        device.invalid = True
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        capture(nth_run(3, ours), GPU)

    def drivers() -> None:
        raise RuntimeError("CUDA error: out of memory")

    device.invalid = False
    with pytest.raises(torch.OutOfMemoryError, match="the capture failed: CUDA error"):
        capture(nth_run(3, drivers), GPU)

    def librarys() -> None:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")

    with pytest.raises(torch.OutOfMemoryError, match="the capture failed: .*ALLOC_FAILED"):
        capture(nth_run(1, librarys), GPU)
    assert device.current is device.default


@pytest.mark.gpu
def test_on_a_gpu_too() -> None:
    """Not yet run on a GPU."""
    x = torch.ones(4, device="cuda")
    replay = capture(lambda: x.add_(1), x.device)
    torch.cuda.manual_seed(5)
    expected = torch.empty_like(x).normal_()
    torch.cuda.manual_seed(5)
    stream = torch.cuda.current_stream()
    drawn: list[Any] = []

    def elsewhere() -> Tensor:
        replay()
        return torch.empty_like(x).normal_()

    def look() -> None:
        drawn.append(in_another_thread(elsewhere))
        x.sum().item()

    with pytest.raises(CaptureError, match="the capture failed: "):
        capture(nth_run(3, look), x.device)
    assert torch.cuda.current_stream() == stream
    assert not torch.cuda.is_current_stream_capturing()
    torch.testing.assert_close(drawn[0], expected, rtol=0, atol=0)
    torch.cuda.manual_seed(5)
    torch.testing.assert_close(torch.empty_like(x).normal_(), expected, rtol=0, atol=0)
    replay()
    capture(lambda: x.add_(1), x.device)()
    torch.cuda.synchronize()
