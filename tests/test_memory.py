"""Memory that weights are cut from."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest
import torch

from chatterbox_fast import memory
from chatterbox_fast.memory import HUGE, Arena, ask_for_huge_pages

CPU = torch.device("cpu")
SMAPS = Path("/proc/self/smaps")
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_tensors_are_cut_one_after_the_other_and_do_not_overlap() -> None:
    arena = Arena([5 * 4, 3, 2 * 7 * 2, 0], CPU)
    floats = arena.cut((5,), torch.float32).fill_(1.5)
    bytes_ = arena.cut((3, 1), torch.int8).fill_(-3)
    halves = arena.cut((2, 7), torch.bfloat16).fill_(0.25)
    nothing = arena.cut((0, 4), torch.float32)
    assert floats.tolist() == [1.5] * 5
    assert bytes_.tolist() == [[-3]] * 3
    assert halves.tolist() == [[0.25] * 7] * 2
    assert nothing.shape == (0, 4)
    starts = [tensor.data_ptr() for tensor in (floats, bytes_, halves)]
    assert starts == sorted(starts)
    assert all((start - starts[0]) % 64 == 0 for start in starts)
    assert all(tensor.is_contiguous() for tensor in (floats, bytes_, halves))
    assert floats.untyped_storage().data_ptr() == halves.untyped_storage().data_ptr()


def test_what_was_cut_outlives_the_arena() -> None:
    kept = Arena([4096], CPU).cut((1024,), torch.float32).fill_(2.0)
    other = Arena([4096], CPU).cut((1024,), torch.float32).fill_(3.0)
    assert kept.eq(2.0).all()
    assert other.eq(3.0).all()


def test_more_than_was_announced_is_not_cut() -> None:
    arena = Arena([64], CPU)
    arena.cut((16,), torch.float32)
    with pytest.raises(RuntimeError):
        arena.cut((16,), torch.float32)


@pytest.mark.parametrize("size", [0, 1, HUGE - 1, HUGE, 3 * HUGE + 5])
def test_a_block_of_any_size_keeps_what_it_holds(size: int) -> None:
    block = torch.full((size,), 7, dtype=torch.uint8)
    ask_for_huge_pages(block)
    assert block.eq(7).all()


def test_linux_is_asked_for_whole_pages_within_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Library:
        def __init__(self, name: object) -> None:
            assert name is None

        def madvise(self, start, length, advice) -> int:  # type: ignore[no-untyped-def]
            asked.append((start.value, length.value, advice))
            return -1  # refused: no error

    monkeypatch.setattr(memory.ctypes, "CDLL", Library)
    monkeypatch.setattr(memory.mmap, "MADV_HUGEPAGE", 14, raising=False)
    block = torch.empty(4 * HUGE, dtype=torch.uint8)
    ask_for_huge_pages(block)
    ((start, length, advice),) = asked
    assert advice == 14
    assert start % HUGE == length % HUGE == 0
    assert block.data_ptr() <= start
    assert start + length <= block.data_ptr() + block.nbytes
    assert length >= 3 * HUGE
    ask_for_huge_pages(torch.empty(100, dtype=torch.uint8))
    ask_for_huge_pages(torch.empty(4 * HUGE, dtype=torch.uint8, device="meta"))
    monkeypatch.delattr(memory.mmap, "MADV_HUGEPAGE")
    ask_for_huge_pages(block)
    assert len(asked) == 1


@pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE")
    or not THP.exists()
    or "[never]" in THP.read_text()
    or not SMAPS.exists(),
    reason="this kernel has no huge pages to give",
)
def test_the_kernel_heard_it() -> None:
    arena = Arena([16 * HUGE], CPU)
    inner = arena.cut((16 * HUGE,), torch.uint8).data_ptr() + 8 * HUGE
    for found in re.finditer(r"(?m)^([0-9a-f]+)-([0-9a-f]+) .*\n(?:[A-Z].*\n)*", SMAPS.read_text()):
        if int(found[1], 16) <= inner < int(found[2], 16):
            flags = re.search(r"VmFlags:(.*)", found[0])
            assert flags is not None
            assert " hg" in flags[1]
            return
    pytest.fail("the block is not mapped")
