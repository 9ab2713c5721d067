"""What a fingerprint notices and what it keeps alive; methods and hooks that are not stock's."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from chatterbox_fast.modules import Fingerprint, Methods, why_not_called
from chatterbox_fast.overrides import bound


class Layer(nn.Module):
    """A layer with an attribute of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Sequential(nn.Linear(2, 1), nn.SiLU())
        self.register_buffer("mean", torch.zeros(3))
        self.window, self.sizes, self.slope = torch.ones(4), {"hop": 4}, 0.1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shifted(self.linear(x))

    def shifted(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


class Root(nn.Module):
    """What an engine takes the place of."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.window, self.sizes, self.extra = torch.ones(4), {"hop": 4}, None

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x)


@pytest.fixture
def root() -> Root:
    return Root().eval()


def write(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.add_(1)


def add_method(module: nn.Module, name: str = "shifted") -> None:
    setattr(module, name, bound_to_nothing)


def bound_to_nothing(x: torch.Tensor) -> torch.Tensor:
    return x


def identity(_: Any, x: torch.Tensor) -> torch.Tensor:
    return x


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a parameter is written to": lambda r: write(r.layers[1].linear[0].weight),
    "a parameter is set": lambda r: setattr(
        r.layers[1].linear[0], "bias", nn.Parameter(torch.rand(1))
    ),
    "a parameter has other data": lambda r: setattr(
        r.layers[1].linear[0].weight, "data", torch.zeros(1, 2)
    ),
    "a parameter is removed": lambda r: setattr(r.layers[1].linear[0], "bias", None),
    "another dtype": lambda r: r.double(),
    "there and back": lambda r: r.half().float(),
    "a buffer is written to": lambda r: write(r.layers[0].mean),
    "a buffer is set": lambda r: setattr(r.layers[0], "mean", torch.zeros(3)),
    "a submodule is exchanged": lambda r: r.layers[1].linear.__setitem__(1, nn.Mish()),
    "a submodule is appended": lambda r: r.layers.append(Layer()),
    "a submodule is removed": lambda r: r.layers.__delitem__(1),
    "an attribute is set": lambda r: setattr(r.layers[0], "slope", 0.2),
    "an attribute is new": lambda r: setattr(r.layers[0].linear, "alpha", 1),
    "an attribute is gone": lambda r: delattr(r.layers[0], "slope"),
    "an attribute has another name": lambda r: (
        delattr(r.layers[0], "slope"), setattr(r.layers[0], "slop", 0.1)
    ),
    "an attribute of the root is set": lambda r: setattr(r, "extra", 1),
    "a tensor is written to": lambda r: write(r.layers[0].window),
    "a tensor is another": lambda r: setattr(r.layers[0], "window", torch.ones(4)),
    "a tensor of the root is written to": lambda r: write(r.window),
    "a dictionary is written to": lambda r: r.layers[1].sizes.update(hop=8),
    "a dictionary of the root is written to": lambda r: r.sizes.update(hop=8),
    "training mode": lambda r: r.layers[0].linear[1].train(),
    "a hook": lambda r: r.layers[0].linear[1].register_forward_hook(print),
    "a hook before": lambda r: r.register_forward_pre_hook(print),
    "a method of a layer": lambda r: add_method(r.layers[0]),
    "a method of the root": lambda r: add_method(r, "decode"),
    "a bound method of the root": lambda r: setattr(r, "decode", bound_to_nothing.__get__(r)),
    "a hook in another table": lambda r: (
        setattr(r.layers[0], "_forward_hooks", OrderedDict()),
        r.layers[0].register_forward_hook(print)
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(root: Root, change: str) -> None:
    before = Fingerprint(root)
    assert before.is_still(root)
    CHANGES[change](root)
    assert not before.is_still(root)
    assert Fingerprint(root).is_still(root)


def test_a_change_of_a_class_is_noticed(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Fingerprint(root)
    monkeypatch.setattr(Layer, "shifted", bound_to_nothing)
    changed = Fingerprint(root)
    assert not before.is_still(root)
    monkeypatch.setattr(nn.SiLU, "__call__", bound_to_nothing, raising=False)
    assert not changed.is_still(root)


def test_a_hook_on_all_modules_is_noticed(root: Root) -> None:
    before = Fingerprint(root)
    for register in (
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ):
        handle = register(lambda *_: None)
        try:
            assert not before.is_still(root)
            assert why_not_called([root]) == "a forward hook on all modules would not be called"
        finally:
            handle.remove()
        assert why_not_called([root]) is None


def test_what_is_ours_is_no_change(root: Root) -> None:
    before = Fingerprint(root)
    root.decode = bound(identity, root)  # type: ignore[method-assign]
    assert before.is_still(root)
    assert why_not_called([root]) is None


def test_a_module_that_contains_itself(root: Root) -> None:
    root.layers[0].again = root.layers[0]
    assert Fingerprint(root).is_still(root)


def test_in_inference_mode_what_can_be_seen_is_seen() -> None:
    """torch counts no writes there; the rest is noticed, and nothing raises."""
    with torch.inference_mode():
        root = Root()
        before = Fingerprint(root)
        write(root.layers[0].linear[0].weight)
        assert before.is_still(root)
        root.layers[0].linear[0].weight.data = torch.zeros(1, 2)
        assert not before.is_still(root)


def test_nothing_is_kept_alive_by_looking() -> None:
    root = Root()
    part, gone = weakref.ref(root.layers[1]), weakref.ref(root)
    root.decode = bound_to_nothing.__get__(root)
    seen = Fingerprint(root)
    del root
    gc.collect()
    assert gone() is None
    assert part() is not None, "a fingerprint keeps what the module is made of"
    del seen
    gc.collect()
    assert part() is None, "and nobody else does"


def test_nothing_comes_to_lie_where_data_was(root: Root) -> None:
    """Else what was exchanged twice would look as if it never was."""
    weight = root.layers[1].linear[0].weight
    weight.data = torch.rand(1000)
    seen, address = Fingerprint(root), weight.data_ptr()
    weight.data = torch.empty(0)
    others = [torch.rand(1000) for _ in range(2000)]
    assert address not in {each.data_ptr() for each in others}
    assert not seen.is_still(root)


def test_threads_may_look_at_once(root: Root) -> None:
    found: list[Any] = []
    seen = Fingerprint(root)
    threads = [
        threading.Thread(target=lambda: found.extend(seen.is_still(root) for _ in range(50)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == 200 * [True]


# ---- Methods that would not be called


@pytest.fixture
def stock() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 2, 1), nn.ELU())


def test_hooks_put_on_a_module(stock: nn.Module) -> None:
    for register in (stock[0].register_forward_hook, stock[0].register_forward_pre_hook):  # type: ignore[index]
        handle = register(print)
        reason = "a Conv1d has a forward hook, which would not be called"
        assert why_not_called([stock]) == reason
        handle.remove()
    assert why_not_called([stock]) is None


def test_methods_put_into_a_module(stock: nn.Module) -> None:
    assert why_not_called([stock]) is None
    stock[0].train = bound_to_nothing  # type: ignore[index]
    assert why_not_called([stock]) is None, "it computes nothing"
    stock[0]._conv_forward = bound_to_nothing  # type: ignore[index]
    reason = "a Conv1d has a _conv_forward of its own, which would not be called"
    assert why_not_called([stock]) == reason


def test_methods_put_into_a_class(stock: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "has a forward that was put into its class and would not be called"
    own = nn.ELU.forward
    monkeypatch.setattr(nn.ELU, "forward", identity)
    assert why_not_called([stock]) == f"a ELU {expected}"

    def around(self: Any, x: Any) -> Any:
        return own(self, x)

    around.__wrapped__, around.__module__ = own, own.__module__  # type: ignore[attr-defined]
    monkeypatch.setattr(nn.ELU, "forward", around)
    assert why_not_called([stock]) == f"a ELU {expected}", "functools.wraps hides nothing"
    monkeypatch.setattr(nn.ELU, "forward", torch.no_grad()(own))
    assert why_not_called([stock]) is None, "torch's decorators compute the same"
    monkeypatch.setattr(nn.ELU, "forward", contextlib.suppress.__exit__)
    assert why_not_called([stock]) == f"a ELU {expected}", "nor do their own functions"


@pytest.mark.parametrize("name", ["__call__", "_call_impl", "_wrapped_call_impl"])
def test_methods_that_every_call_goes_through(
    stock: nn.Module, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Fingerprint(stock)
    monkeypatch.setattr(nn.Module, name, identity)
    assert f"has a {name} that was put into its class" in str(why_not_called([stock]))
    assert not before.is_still(stock)


def test_methods_that_are_called(stock: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.ELU, "forward", identity)
    assert Methods(nn.ELU, frozenset(("forward",))).why_replaced(stock[1]) is None  # type: ignore[index]
