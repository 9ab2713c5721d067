"""Memory that weights are cut from."""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from unittest import mock

import pytest
import torch

from chatterbox_fast.memory import Arena

CPU = torch.device("cpu")
HUGE = 2 << 20
SMAPS = Path("/proc/self/smaps")
on_linux = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="Linux has the arena")
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_tensors_are_cut_one_after_the_other_and_do_not_overlap() -> None:
    arena = Arena([50 * 4, 3, 2 * 70 * 2, 0], CPU)
    floats = arena.cut((50,), torch.float32).fill_(1.5)
    bytes_ = arena.cut((3, 1), torch.int8).fill_(-3)
    halves = arena.cut((2, 70), torch.bfloat16).fill_(0.25)
    nothing = arena.cut((0, 4), torch.float32)
    assert floats.tolist() == [1.5] * 50
    assert bytes_.tolist() == [[-3]] * 3
    assert halves.tolist() == [[0.25] * 70] * 2
    assert nothing.shape == (0, 4)
    starts = [tensor.data_ptr() for tensor in (floats, bytes_, halves)]
    assert starts == sorted(starts)
    assert all((start - starts[0]) % 64 == 0 for start in starts)
    assert all(tensor.is_contiguous() for tensor in (floats, bytes_, halves))
    # Views of one tensor would be so for torch.compile, too.
    assert len({each.untyped_storage().data_ptr() for each in (floats, bytes_, halves)}) == 3


def test_what_was_cut_outlives_the_arena() -> None:
    kept = Arena([4096], CPU).cut((1024,), torch.float32).fill_(2.0)
    other = Arena([4096], CPU).cut((1024,), torch.float32).fill_(3.0)
    assert kept.eq(2.0).all()
    assert other.eq(3.0).all()


@on_linux
def test_more_than_was_announced_is_not_cut() -> None:
    arena = Arena([64], CPU)
    arena.cut((16,), torch.float32)
    with pytest.raises(ValueError, match="no greater than buffer length"):
        arena.cut((16,), torch.float32)


@on_linux
def test_no_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = mock.Mock(side_effect=OSError(12, "Cannot allocate memory"))
    monkeypatch.setattr(mmap, "mmap", refused)
    with pytest.raises(torch.OutOfMemoryError, match="no memory for 128 bytes of weights"):
        Arena([100], CPU)


@on_linux
def test_a_kernel_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(mmap.mmap):
        madvise = mock.Mock(side_effect=OSError(22, "Invalid argument"))

    monkeypatch.setattr(mmap, "mmap", Plain)
    assert Arena([64], CPU).cut((16,), torch.float32).fill_(1.0).sum() == 16
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")  # as where there is no Linux
    arena = Arena([64], CPU)
    assert arena._block is None
    assert arena.cut((16,), torch.float32).shape == (16,)


def test_another_device_has_its_own_memory() -> None:
    tensor = Arena([64], torch.device("meta")).cut((16,), torch.float32)
    assert tensor.device.type == "meta"
    assert tensor.shape == (16,)


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
