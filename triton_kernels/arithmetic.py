"""What several twins compute."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def finite(value, HALF: tl.constexpr):
    """`value`, where HALF within what float16 holds of finite numbers; NaN is kept."""
    if HALF:
        value = tl.where(value > 65504, 65504, tl.where(value < -65504, -65504, value))
    return value
