"""What Python checks, where no compiled op does: cfg_sample by its reference, and parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from chatterbox_fast import ops
from chatterbox_fast.sampling import SamplingParams


def arguments(dtype: torch.dtype, **changed: Any) -> dict[str, Any]:
    """A call of cfg_sample with guidance: two rows of ten ids."""
    return {
        "logits": torch.zeros(4, 10, dtype=dtype),
        "seen": torch.zeros(2, 10, dtype=torch.bool),
        "params": SamplingParams().pack(dtype, torch.device("cpu")).repeat(2, 1),
        "flags": torch.zeros(2, dtype=torch.int32),
        "philox": torch.zeros(2, 2, dtype=torch.long),
        "stop_token": 9,
        **changed,
    }


BAD: list[tuple[dict[str, Any], str]] = [
    ({"logits": torch.zeros(3, 10)}, r"logits must be \(2 or 4, 10\) as seen is, got .3, 10"),
    ({"logits": torch.zeros(4, 11)}, r"logits must be .*, got .4, 11"),
    ({"logits": torch.tensor(0.0)}, r"logits must be \(2 or 4, 10\) as seen is, got ..$"),
    ({"logits": torch.zeros(4, 10).int()}, "logits must be float32, float16 or bfloat16, got"),
    ({"logits": torch.zeros(10, 4).T}, "logits must be contiguous, got strides"),
    ({"seen": torch.zeros(2, 10)}, "seen must be .*, got"),
    ({"seen": torch.tensor(False)}, r"seen must be \(R, V\), R at most 64 and V in"),
    ({"seen": torch.zeros(20, dtype=torch.bool)}, r"seen must be \(R, V\), .* got .20"),
    ({"seen": torch.zeros(65, 10, dtype=torch.bool)}, r"seen must be .*, got .65, 10"),
    ({"params": torch.zeros(1, 6)}, r"params must be \(2, 6\), got .1, 6"),
    ({"params": torch.zeros(2, 6).half()}, "params must be .*, got"),
    ({"flags": torch.zeros(1, dtype=torch.int32)}, r"flags must be \(2,\), got .1"),
    ({"flags": torch.zeros(2)}, "flags must be .*, got"),
    ({"philox": torch.zeros(1, 2, dtype=torch.long)}, r"philox must be \(2, 2\), got .1, 2"),
    ({"stop_action": torch.zeros(2)}, "stop_action must be .*, got"),
    ({"stop_action": torch.zeros(1, dtype=torch.int32)}, r"stop_action must be \(2,\), got .1"),
    ({"stop_token": 10}, r"stop_token must be in \[0, 10\), got 10"),
    ({"stop_token": -1}, r"stop_token must be in \[0, 10\), got -1"),
    ({"forget": 10}, r"forget must be -1 or in \[0, 10\), got 10"),
]


@pytest.mark.parametrize(("changed", "message"), BAD)
@pytest.mark.parametrize("backend", ["cuda", "reference"])
def test_every_backend_names_a_bad_argument(backend: Any, changed: Any, message: str) -> None:
    """In the same words, but for how Python shows a shape or a dtype; and draws nothing."""
    call = arguments(torch.float32, **changed)
    with pytest.raises(RuntimeError, match=f"^chatterbox_fast::cfg_sample: .*{message}"):
        ops.cfg_sample(**call, backend=backend)
    assert not call["philox"].any()


@pytest.mark.parametrize(("changed", "message"), [bad for bad in BAD if "philox" not in bad[0]])
def test_rows_with_generators_of_their_own(changed: Any, message: str) -> None:
    """Each of which the op gets by itself, when nobody sees how many there were."""
    call = arguments(torch.float32, **changed, philox=None)
    with pytest.raises(RuntimeError, match=f"^chatterbox_fast::cfg_sample: {message}"):
        ops.cfg_sample(**call, generator=[torch.Generator() for _ in range(2)])


def test_float64_is_checked_too() -> None:
    assert ops.cfg_sample(**arguments(torch.float64)).shape == (2,)
    for changed, message in (
        ({"logits": torch.zeros(3, 10).double()}, r"logits must be \(2 or 4, 10\)"),
        ({"params": torch.zeros(2, 6)}, "params must be torch.float64, got torch.float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.cfg_sample(**arguments(torch.float64, **changed))


@pytest.mark.parametrize("name", ["cfg_weight", "temperature", "min_p", "top_k"])
@pytest.mark.parametrize(("value", "start"), [(10**400, "1000"), (-(10**400), "-1000")])
def test_numbers_beyond_a_doubles_range_are_named(name: str, value: int, start: str) -> None:
    message = f"chatterbox_fast: {name} must be finite and .*, got {start}"
    with pytest.raises(ValueError, match=f"^{message}"):
        SamplingParams(**{name: value})
