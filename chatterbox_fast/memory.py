"""Memory for weights that are read from first to last at every step."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE = 2 << 20  # bytes of a huge page where there are any
_ALIGNED = 64  # bytes: a cache line


class Arena:
    """One block that tensors are cut from, in huge pages where Linux gives them to a CPU.

    A page of 4 KiB ends the CPU's prefetching and costs a look into the page table, in a virtual
    machine several.
    """

    def __init__(self, parts: Sequence[int], device: torch.device) -> None:
        """
        Args:
            parts: bytes of each tensor that will be cut.

        Raises:
            torch.OutOfMemoryError, RuntimeError: as torch does where there is no memory.
        """
        total = sum(_rounded_up(part) for part in parts)
        self._block = torch.empty(total, dtype=torch.uint8, device=device)
        self._used = 0
        ask_for_huge_pages(self._block)

    def cut(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The next tensor, not initialised."""
        size = math.prod(shape) * dtype.itemsize
        start, self._used = self._used, self._used + _rounded_up(size)
        return self._block[start : start + size].view(dtype).view(*shape)


def _rounded_up(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def ask_for_huge_pages(block: Tensor) -> None:
    """Asks Linux to back what `block` will hold by huge pages. Nothing happens where it cannot."""
    if block.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    start = -(-block.data_ptr() // HUGE) * HUGE
    end = (block.data_ptr() + block.nbytes) // HUGE * HUGE
    if start < end:
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE)
