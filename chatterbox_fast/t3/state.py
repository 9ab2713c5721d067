"""Everything a request's decoding reads and writes, allocated before its first step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import SamplingParams
from ..options import Backend
from .weights import T3Weights

CAPACITIES = (256, 512, 1024, 2048, 4096, 8192)
"""KV-cache sizes in positions: few, so that an engine needs few graphs."""


def capacity_for(positions: int) -> int:
    """The smallest capacity that holds `positions` cache slots.

    Raises:
        ValueError: more than the largest capacity.
    """
    for capacity in CAPACITIES:
        if positions <= capacity:
            return capacity
    raise ValueError(
        f"chatterbox_fast: the sequence must fit {CAPACITIES[-1]} positions, got {positions}"
    )


@dataclass
class DecodeState:
    """Buffers of one request. A decode step changes them in place and reads no value on the host.

    Shapes: B rows of the backbone (2 with CFG, else 1), R = 1 drawn sequence, L layers, H heads,
    C cache capacity, D head dimension, V vocabulary, N tokens at most.
    """

    embedding: Tensor  # (B, 1, dim)       input of the next step
    k_cache: Tensor  # (L, B, H, C, D)     rotated keys
    v_cache: Tensor  # (L, B, H, C, D)
    cos: Tensor  # (C, D)                  rotary table
    sin: Tensor  # (C, D)
    position: Tensor  # (1,) int64         cache slot the next step writes
    count: Tensor  # (1,) int64            tokens drawn so far
    tokens: Tensor  # (R, N) int64         tokens drawn so far
    seen: Tensor  # (R, V) bool            ids the repetition penalty applies to
    params: Tensor  # (R, 6)               SamplingParams.pack
    flags: Tensor  # (R,) int32            reference.STOPPED, reference.FAILED
    philox: Tensor | None  # (R, 2) int64  random state, where it lives on the device
    stop_token: int
    backend: Backend

    @classmethod
    def allocate(
        cls,
        weights: T3Weights,
        sampling: SamplingParams,
        *,
        rows: int,
        prefix: int,
        max_new_tokens: int,
        start_token: int,
        stop_token: int,
        backend: Backend = "auto",
    ) -> DecodeState:
        """Buffers for `prefix` prefilled positions and up to `max_new_tokens` tokens."""
        capacity = capacity_for(prefix + 1)
        like = weights.head
        device, dtype = like.device, like.dtype
        cache = (len(weights.layers), rows, weights.heads, capacity, weights.head_dim)
        cos, sin = weights.rotary_table(capacity)
        seen = torch.zeros(1, like.shape[0], dtype=torch.bool, device=device)
        seen[:, start_token] = True
        return cls(
            embedding=torch.zeros(rows, 1, like.shape[1], dtype=dtype, device=device),
            k_cache=torch.zeros(cache, dtype=dtype, device=device),
            v_cache=torch.zeros(cache, dtype=dtype, device=device),
            cos=cos,
            sin=sin,
            position=torch.full((1,), prefix, dtype=torch.long, device=device),
            count=torch.zeros(1, dtype=torch.long, device=device),
            tokens=torch.zeros(1, max_new_tokens, dtype=torch.long, device=device),
            seen=seen,
            params=sampling.pack(dtype, device),
            flags=torch.zeros(1, dtype=torch.int32, device=device),
            philox=None,
            stop_token=stop_token,
            backend=backend,
        )

    @property
    def capacity(self) -> int:
        """Cache slots there are."""
        return self.k_cache.shape[3]

    def grow(self, weights: T3Weights, positions: int) -> None:
        """Makes room for `positions` cache slots, keeping what is cached."""
        capacity = capacity_for(positions)
        if capacity <= self.capacity:
            return
        self.k_cache = _longer(self.k_cache, capacity)
        self.v_cache = _longer(self.v_cache, capacity)
        self.cos, self.sin = weights.rotary_table(capacity)


def _longer(cache: Tensor, capacity: int) -> Tensor:
    layers, rows, heads, old, dim = cache.shape
    grown = cache.new_zeros(layers, rows, heads, capacity, dim)
    grown[:, :, :, :old] = cache
    return grown
