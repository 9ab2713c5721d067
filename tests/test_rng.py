"""Generators that belong to a request: what torch's global ones would draw, without them."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions.uniform import Uniform

from chatterbox_fast.request import Request, current_request, serving
from chatterbox_fast.rng import DrawFrom, Generators, check_seed


def draws() -> list[Tensor]:
    """Every way of drawing that stock uses, and some more."""
    x = torch.zeros(3, 5)
    return [
        torch.randn_like(x),
        torch.rand_like(x),
        Uniform(low=-3.0, high=3.0).sample(sample_shape=(1, 9, 1)),
        torch.randn(1, 80, 7, dtype=torch.float32, device="cpu"),
        torch.rand(4),
        torch.multinomial(torch.ones(2, 6), 1),
        torch.empty(4).exponential_(1),
        torch.empty(4).normal_(),
        torch.randint(0, 100, (5,)),
        torch.randperm(6),
        torch.bernoulli(torch.full((8,), 0.5)),
        torch.normal(torch.zeros(3), torch.ones(3)),
    ]


def test_the_same_numbers_as_the_global_generator() -> None:
    torch.manual_seed(17)
    expected = draws()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with DrawFrom(Generators(17, "cpu")):
        got = draws()
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_a_generator_named_by_the_caller_is_kept() -> None:
    named = torch.Generator().manual_seed(4)
    expected = torch.rand(3, generator=torch.Generator().manual_seed(4))
    with DrawFrom(Generators(17, "cpu")):
        assert torch.equal(torch.rand(3, generator=named), expected)


def test_other_threads_are_not_touched() -> None:
    seen: dict[str, Any] = {}

    def elsewhere() -> None:
        seen["request"] = current_request()
        torch.manual_seed(2)
        seen["drawn"] = torch.rand(3)

    with serving(Request(Generators(17, "cpu"))), current_request().drawing():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert seen["request"].generators is None
    assert torch.equal(seen["drawn"], torch.rand(3, generator=torch.Generator().manual_seed(2)))


def test_a_device_the_request_does_not_draw_on() -> None:
    with pytest.raises(RuntimeError, match="draws on cpu, but stock asked .* on meta"):
        Generators(1, "cpu").on("meta")


def test_the_request_ends_with_its_context() -> None:
    request = Request(progress=True)
    with pytest.raises(ZeroDivisionError), serving(request):
        assert current_request() is request
        _ = 1 / 0
    assert current_request() is not request


@pytest.mark.parametrize("seed", [0, 1, -1, 2**64 - 1, -(2**63)])
def test_seeds_are_those_of_manual_seed(seed: int) -> None:
    assert check_seed(seed) == seed
    torch.manual_seed(seed)
    expected = torch.rand(2)
    assert torch.equal(torch.rand(2, generator=Generators(seed, "cpu").on("cpu")), expected)


@pytest.mark.parametrize(
    ("seed", "error"), [(2**64, ValueError), (1.5, TypeError), ("1", TypeError), (True, TypeError)]
)
def test_other_seeds_are_refused(seed: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="seed must be"):
        check_seed(seed)


def test_no_seed_is_none() -> None:
    assert check_seed(None) is None
