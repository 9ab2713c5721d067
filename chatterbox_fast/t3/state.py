"""Everything a request's decoding reads and writes, allocated before its first step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..sampling import SamplingParams
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


@dataclass(eq=False)
class DecodeState:
    """Buffers of one request. A decode step changes them in place and reads no value on the host.

    Shapes: B rows of the backbone (2 with CFG, else 1), R = 1 drawn sequence, L layers, H heads,
    C cache capacity, D head dimension, V vocabulary, N the model's speech positions.
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
    arrivals: Tensor  # (B H,) int32       0 between steps: see ops.decode_attention
    philox: Tensor | None  # (R, 2) int64  random state, where it lives on the device
    stop_token: int
    sampler: str  # the backend of cfg_sample

    @classmethod
    def allocate(
        cls,
        weights: T3Weights,
        rotary: tuple[Tensor, Tensor],
        *,
        rows: int,
        stop_token: int,
        sampler: str,
        philox: bool = False,
    ) -> DecodeState:
        """Buffers for any request; `reset` makes them a certain one's.

        Args:
            rotary: cos and sin ``(C, D)``; the capacity is theirs.
            rows: B.
            sampler: the backend of cfg_sample.
            philox: whether the random state lives on the device.
        """
        cos, sin = rotary
        table = weights.speech_emb
        device, dtype = table.device, table.dtype
        cache = (len(weights.layers), rows, weights.heads, len(cos), weights.head_dim)

        def zeros(*shape: int, of: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=of, device=device)

        return cls(
            embedding=zeros(rows, 1, table.shape[1], of=dtype),
            k_cache=zeros(*cache, of=weights.cache_dtype),
            v_cache=zeros(*cache, of=weights.cache_dtype),
            cos=cos,
            sin=sin,
            position=zeros(1),
            count=zeros(1),
            tokens=zeros(1, len(weights.speech_pos)),
            seen=zeros(1, weights.vocabulary, of=torch.bool),
            params=SamplingParams().pack(dtype, device),
            flags=zeros(1, of=torch.int32),
            arrivals=zeros(rows * weights.heads, of=torch.int32),
            philox=zeros(1, 2) if philox else None,
            stop_token=stop_token,
            sampler=sampler,
        )

    def reset(self, sampling: SamplingParams, start_token: int) -> None:
        """Forgets the request before; what it cached lies behind the position, which is 0."""
        for tensor in (self.position, self.count, self.tokens, self.seen, self.flags,
                       self.arrivals):  # fmt: skip
            tensor.zero_()
        self.seen[:, start_token] = True
        self.params.copy_(sampling.pack(self.params.dtype, self.params.device))

    @property
    def rows(self) -> int:
        """B."""
        return self.k_cache.shape[1]

    @property
    def capacity(self) -> int:
        """C."""
        return self.k_cache.shape[3]

    @property
    def bytes(self) -> int:
        """Memory of the cache, which is nearly all."""
        return self.k_cache.nbytes + self.v_cache.nbytes

    def continue_from(self, other: DecodeState, positions: int) -> None:
        """Takes over the request of `other`, which has `positions` cache slots in use."""
        for mine, theirs in ((self.k_cache, other.k_cache), (self.v_cache, other.v_cache)):
            mine[:, :, :, :positions].copy_(theirs[:, :, :, :positions])
        names = ["embedding", "position", "count", "tokens", "seen", "params", "flags"]
        for name in names if self.philox is None else [*names, "philox"]:
            getattr(self, name).copy_(getattr(other, name))
