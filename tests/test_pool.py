"""Buffers that requests borrow: how many there are, how many are kept, what a failure does."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from conftest import engine_of

from chatterbox_fast.graph import settle
from chatterbox_fast.t3 import pool
from chatterbox_fast.t3.pool import AT_ONCE, KEPT_BYTES, Slot, SlotPool, kept_bytes
from chatterbox_fast.t3.state import DecodeState
from chatterbox_fast.testing import random_t3


def slots(made: list[tuple[int, int]], device: str = "cpu") -> SlotPool:
    """A pool whose slots have small buffers, and a list of what it made."""
    t3 = random_t3("english", "tiny").to(device)
    weights = engine_of(t3).weights.decode

    def make(rows: int, capacity: int) -> Slot:
        made.append((rows, capacity))
        cos, sin = torch.zeros(2, capacity, 64, device=device)
        state = DecodeState.allocate(
            weights, (cos, sin), rows=rows, stop_token=0, sampler="reference"
        )
        return Slot(state, lambda *_: None)

    return SlotPool(make, KEPT_BYTES)


def test_idle_buffers_are_used_again_and_few_are_kept() -> None:
    made: list[tuple[int, int]] = []
    kept = slots(made)
    slot = kept.take(2, 256)
    kept.most_kept = 2 * slot.state.bytes
    made.clear()
    with kept.lease(2, 40) as first, kept.lease(2, 40) as second, kept.lease(1, 300) as third:
        assert made == [(2, 256), (2, 256), (1, 512)]
        assert len({id(lease.slot) for lease in (first, second, third)}) == 3
    assert len(kept) == 2, "one of the two (2, 256), and (1, 512), which is as large"
    with kept.lease(2, 256):
        assert len(made) == 3
    with kept.lease(1, 256):
        assert made[3:] == [(1, 256)]
    kept.most_kept = 2 * slot.state.bytes - 1
    with kept.lease(1, 512):
        before = len(kept)
        assert before > 0
    assert len(kept) == before, "larger than all that is kept: gone, and nobody else for it"
    kept.clear()
    assert len(kept) == 0


def test_growing_keeps_the_request_and_gives_the_small_buffer_back() -> None:
    made: list[tuple[int, int]] = []
    kept = slots(made)
    with kept.lease(2, 40) as lease:
        small = lease.slot.state
        for tensor in (small.k_cache, small.v_cache, small.embedding):
            tensor.normal_()
        small.tokens[0, :3] = torch.tensor([5, 6, 7])
        small.position.fill_(256)
        lease.grow(255)
        assert lease.slot.state is small
        poll = lease.slot.poll
        lease.grow(256)
        large = lease.slot.state
        assert large.capacity == 512
        assert lease.slot.poll is poll, "copies of its flags are on their way there"
        for name in ("embedding", "position", "count", "tokens", "seen", "params", "flags"):
            assert torch.equal(getattr(large, name), getattr(small, name)), name
        assert torch.equal(large.k_cache[:, :, :, :256], small.k_cache)
        assert torch.equal(large.v_cache[:, :, :, :256], small.v_cache)
    assert made == [(2, 256), (2, 512)]
    assert len(kept) == 2


def test_a_failed_request_takes_its_buffers_with_it() -> None:
    kept = slots([])
    with pytest.raises(ZeroDivisionError), kept.lease(2, 40):
        _ = 1 / 0
    assert len(kept) == 0
    for _ in range(AT_ONCE + 1):  # nor does it keep its place
        with pytest.raises(ZeroDivisionError), kept.lease(2, 40):
            _ = 1 / 0


def test_requests_beyond_the_bound_wait() -> None:
    kept = slots([])
    inside, most = 0, 0
    lock, enough = threading.Lock(), threading.Event()

    def request() -> None:
        nonlocal inside, most
        with kept.lease(1, 40) as lease:
            with lock:
                inside += 1
                most = max(most, inside)
                if inside == AT_ONCE:
                    enough.set()
            enough.wait(10)
            lease.grow(256)
            with lock:
                inside -= 1

    with ThreadPoolExecutor(AT_ONCE + 4) as threads:
        started = [threads.submit(request) for _ in range(AT_ONCE + 4)]
    for future in started:
        future.result(30)  # growing needs no second permit
    assert (inside, most) == (0, AT_ONCE)


def test_a_failed_request_waits_for_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its buffers are let go: the next owner of their memory may use another stream."""
    settled: list[torch.device] = []
    monkeypatch.setattr(pool, "settle", settled.append)
    kept = slots([])
    with kept.lease(2, 40):
        pass
    assert settled == [], "a request that ended has waited for its tokens"
    with pytest.raises(ZeroDivisionError), kept.lease(2, 40):
        _ = 1 / 0
    assert settled == [torch.device("cpu")]

    def lost(_: torch.device) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(pool, "settle", lost)
    with pytest.raises(ZeroDivisionError), kept.lease(2, 40):
        _ = 1 / 0


def test_a_large_gpu_keeps_more(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept_bytes(torch.device("cpu")) == KEPT_BYTES
    for total, kept in ((4 * 2**30, KEPT_BYTES), (128 * 2**30, 8 * 2**30)):
        properties = SimpleNamespace(total_memory=total)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, own=properties: own)
        assert kept_bytes(torch.device("cuda", 0)) == kept


@pytest.mark.gpu
def test_nothing_is_on_the_way_to_buffers_that_are_let_go() -> None:
    kept, stream = slots([], "cuda"), torch.cuda.Stream()
    x = torch.zeros(2**20, device="cuda")
    settle(x.device)
    with pytest.raises(ZeroDivisionError), torch.cuda.stream(stream), kept.lease(2, 40):
        for _ in range(200):
            x += 1
        _ = 1 / 0
    assert stream.query(), "all is done"
