"""Memory for weights that are read from first to last at every step."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNED = 64  # bytes: a cache line


class Arena:
    """What tensors are cut from: on a CPU one block, in huge pages where Linux gives them.

    A page of 4 KiB ends the CPU's prefetching and costs a look into the page table, in a virtual
    machine several.
    """

    def __init__(self, parts: Sequence[int], device: torch.device) -> None:
        """
        Args:
            parts: bytes of each tensor that will be cut.

        Raises:
            torch.OutOfMemoryError: there is not so much.
        """
        self._device, self._used = device, 0
        self._block: mmap.mmap | None = None
        total = sum(_rounded_up(part) for part in parts)
        if device.type == "cpu" and total > 0 and hasattr(mmap, "MADV_HUGEPAGE"):
            self._block = _in_huge_pages(total)

    def cut(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The next tensor, not initialised, with a storage of its own.

        Raises:
            ValueError: it is more than was announced, where there is a block.
        """
        count = math.prod(shape)
        if self._block is None or count == 0:
            return torch.empty(shape, dtype=dtype, device=self._device)
        start, self._used = self._used, self._used + _rounded_up(count * dtype.itemsize)
        return torch.frombuffer(self._block, dtype=dtype, count=count, offset=start).view(*shape)


def _rounded_up(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _in_huge_pages(size: int) -> mmap.mmap:
    try:
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as failure:
        raise torch.OutOfMemoryError(f"no memory for {size} bytes of weights: {failure}") from None
    with contextlib.suppress(OSError):  # of a kernel without them
        block.madvise(mmap.MADV_HUGEPAGE)
    return block
