"""padded_attention against diffusers' Attention with stock's mask, eager and compiled, and torch's
attention of the prefix without one, at the flow's shapes: pytest bench --benchmark-only

Two rows of guidance, in a bucket that they fill to nine tenths; without the projections, which are
the same for all. The prefix's length is known on the host there: no CUDA graph serves another one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from chatterbox.models.s3gen.decoder import mask_to_bias
from timing import compare
from torch import Tensor

from chatterbox_fast import ops
from chatterbox_fast.reference import padded_attention as in_torch

ROWS, HEADS, DIM = 2, 8, 64
FILLED = 0.9
CASES = {
    f"{positions} positions, {str(dtype).removeprefix('torch.')}": (positions, dtype)
    for positions in (250, 500, 1000)
    for dtype in (torch.float32, torch.bfloat16)
}


class Bucket:
    """q, k and v side by side of rows that pads fill up, and stock's mask for them."""

    def __init__(self, positions: int, dtype: torch.dtype, device: torch.device) -> None:
        source = torch.Generator().manual_seed(1)
        qkv = torch.randn(ROWS, positions, 3 * HEADS * DIM, generator=source)
        self.qkv, self.valid = qkv.to(device, dtype), int(FILLED * positions)
        self.lengths = torch.full((ROWS,), self.valid, dtype=torch.int32, device=device)
        inside = torch.arange(positions, device=device) < self.valid
        self.mask = mask_to_bias(inside.expand(ROWS, positions, positions), dtype)
        self.bytes = 4 * ROWS * self.valid * HEADS * DIM * dtype.itemsize

    def by_sdpa(self, qkv: Tensor, mask: Tensor | None = None) -> Tensor:
        """As diffusers' AttnProcessor2_0, with as many heads of the mask."""
        q, k, v = (x.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
        if mask is not None:
            mask = mask.repeat_interleave(HEADS, dim=0).view(ROWS, HEADS, -1, mask.shape[-1])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).reshape(ROWS, -1, HEADS * DIM)

    def by_stock(self) -> Tensor:
        return self.by_sdpa(self.qkv, self.mask)

    def by(self, function: Callable[..., Tensor]) -> Tensor:
        return function(self.qkv, self.lengths, HEADS)


def stock(bucket: Bucket) -> Callable[[], Tensor]:
    return bucket.by_stock


def stock_compiled(bucket: Bucket) -> Callable[[], Tensor]:
    return torch.compile(bucket.by_stock, dynamic=False)


def sdpa_of_prefix(bucket: Bucket) -> Callable[[], Tensor]:
    return lambda: bucket.by_sdpa(bucket.qkv[:, : bucket.valid])


def extension(bucket: Bucket) -> Callable[[], Tensor]:
    return lambda: bucket.by(ops.padded_attention_by("extension"))


def triton(bucket: Bucket) -> Callable[[], Tensor]:
    return lambda: bucket.by(ops.padded_attention_by("triton"))


def reference(bucket: Bucket) -> Callable[[], Tensor]:
    return lambda: bucket.by(in_torch)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "make", [stock, stock_compiled, sdpa_of_prefix, extension, triton, reference]
)
def bench_padded_attention(benchmark: Any, device: torch.device, case: str, make: Any) -> None:
    compare(
        benchmark,
        device,
        "padded_attention",
        case,
        make,
        lambda on: Bucket(*CASES[case], on),
        verify,
    )


def verify(bucket: Bucket, call: Callable[[], Tensor]) -> None:
    """What is timed is right where a position is valid, to the precision of its dtype."""
    expected = bucket.by_sdpa(bucket.qkv[:, : bucket.valid].double())
    loose = 8 * torch.finfo(bucket.qkv.dtype).eps
    assert (call()[:, : bucket.valid] - expected).abs().max() < loose * expected.abs().max()
