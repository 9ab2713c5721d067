"""The decode step is one pure function over preallocated buffers; the runner checks its inputs."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from chatterbox_fast.ops import SamplingParams
from chatterbox_fast.t3 import runner
from chatterbox_fast.t3.decode_step import decode_step, draw_token
from chatterbox_fast.t3.prefill import prefill, prefix_embeds
from chatterbox_fast.t3.state import CAPACITIES, DecodeState, capacity_for
from chatterbox_fast.t3.weights import T3Weights, why_unsupported
from chatterbox_fast.testing import random_t3

TEXT = torch.tensor([[255, 40, 41, 42, 0]])


@pytest.fixture(scope="module")
def tiny() -> Any:
    return random_t3("english", "tiny")


def prefilled(t3: Any, cond: Any, cfg_weight: float = 0.5) -> tuple[T3Weights, DecodeState]:
    weights = T3Weights.of(t3)
    embeds = prefix_embeds(t3, copy.copy(cond), TEXT, None, cfg_weight)
    state = DecodeState.allocate(
        weights,
        SamplingParams(cfg_weight),
        rows=embeds.shape[0],
        prefix=embeds.shape[1],
        max_new_tokens=8,
        start_token=6561,
        stop_token=6562,
    )
    draw_token(weights, state, prefill(weights, state, embeds))
    return weights, state


def test_a_step_changes_buffers_in_place_and_keeps_their_storage(tiny: Any, t3_cond: Any) -> None:
    with torch.inference_mode():
        weights, state = prefilled(tiny, t3_cond)
        pointers = {k: v.data_ptr() for k, v in vars(state).items() if torch.is_tensor(v)}
        position, count = int(state.position), int(state.count)
        decode_step(weights, state)
    assert {k: v.data_ptr() for k, v in vars(state).items() if torch.is_tensor(v)} == pointers
    assert (int(state.position), int(state.count)) == (position + 1, count + 1)
    drawn = state.tokens[0, : count + 1]
    assert state.seen.sum() == len({6561, *drawn.tolist()})


def test_a_step_reads_no_value_on_the_host(
    tiny: Any, t3_cond: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under fake tensors on a device "cuda", .item() and data-dependent branches raise."""
    monkeypatch.setattr("chatterbox_fast.ops.philox_threads", lambda *_: 8448)
    with torch.inference_mode():
        weights, state = prefilled(tiny, t3_cond)
    state.philox = torch.zeros(1, 2, dtype=torch.long)
    with FakeTensorMode(allow_non_fake_inputs=False):
        try:
            torch.empty(1, device="cuda")
        except RuntimeError:  # torch 2.6 asks for the driver even here
            pytest.skip("this torch has no fake CUDA tensors on a machine without a driver")

        def fake(x: Any) -> Any:
            if not torch.is_tensor(x):
                return x
            return torch.empty(x.shape, dtype=x.dtype, device="cuda")

        layers = tuple(
            type(layer)(**{k: fake(v) for k, v in vars(layer).items()}) for layer in weights.layers
        )
        fields = {k: fake(v) for k, v in vars(weights).items()}
        on_cuda = T3Weights(**{**fields, "layers": layers})
        buffers = DecodeState(**{k: fake(v) for k, v in vars(state).items()})
        decode_step(on_cuda, buffers)
        assert buffers.embedding.device.type == "cuda"
        with pytest.raises(Exception, match="_local_scalar_dense"):
            bool(buffers.flags)


def test_cfg_weight_zero_runs_half_the_batch(tiny: Any, t3_cond: Any) -> None:
    with torch.inference_mode():
        assert prefilled(tiny, t3_cond, 0.5)[1].k_cache.shape[1] == 2
        assert prefilled(tiny, t3_cond, 0.0)[1].k_cache.shape[1] == 1


def test_growing_keeps_what_is_cached(tiny: Any, t3_cond: Any) -> None:
    with torch.inference_mode():
        weights, state = prefilled(tiny, t3_cond)
        before = state.k_cache.clone()
        state.grow(weights, 256)
        assert state.capacity == 256
        state.grow(weights, 257)
    assert state.capacity == 512
    assert torch.equal(state.k_cache[:, :, :, :256], before)
    assert len(state.cos) == 512


def test_capacities() -> None:
    assert [capacity_for(n) for n in (1, 256, 257, 8192)] == [256, 256, 512, 8192]
    with pytest.raises(ValueError, match=f"must fit {CAPACITIES[-1]} positions, got 8193"):
        capacity_for(8193)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_tokens": torch.zeros(3, 4, dtype=torch.long)}, r"must be \(S,\), \(1, S\) or"),
        ({"text_tokens": torch.zeros(0, 4, dtype=torch.long)}, r"must be \(S,\), \(1, S\) or"),
        ({"text_tokens": torch.tensor([[40, 0]])}, "must contain the start_text_token"),
        ({"text_tokens": torch.tensor([[255, 40]])}, "must contain the stop_text_token"),
        ({"text_tokens": torch.tensor([[255, 9999, 0]])}, r"must be in \[0, 704\)"),
        ({"text_tokens": torch.tensor([[255, -1, 0]])}, r"must be in \[0, 704\)"),
        ({"text_tokens": torch.tensor([[255, *[5] * 2049, 0]])}, "at most 2050 tokens long, got"),
        ({"max_new_tokens": 0}, r"max_new_tokens must be in \[1, 4099\], got 0"),
        ({"max_new_tokens": 4100}, r"max_new_tokens must be in \[1, 4099\], got 4100"),
        ({"initial_speech_tokens": torch.tensor([[1, 9999]])}, r"must be in \[0, 8194\)"),
        ({"initial_speech_tokens": torch.tensor([[1], [2]])}, "with equal rows, got shape"),
        ({"temperature": 0.0}, "temperature must be finite and > 0, got 0.0"),
        ({"cfg_weight": -1.0}, "cfg_weight must be finite and >= 0, got -1.0"),
    ],
)
def test_bad_input_is_named_before_any_work(
    tiny: Any, t3_cond: Any, change: dict, message: str
) -> None:
    arguments = {"t3_cond": t3_cond, "text_tokens": TEXT, "max_new_tokens": 4, **change}
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        runner.inference(tiny, **arguments)
    assert torch.equal(torch.get_rng_state(), state)


def test_parameters_that_are_no_numbers(tiny: Any, t3_cond: Any) -> None:
    with pytest.raises(TypeError, match="temperature must be a number, got None"):
        runner.inference(tiny, t3_cond=t3_cond, text_tokens=TEXT, temperature=None)


def test_nan_in_the_conditioning_raises_and_the_model_stays_usable(tiny: Any, t3_cond: Any) -> None:
    poisoned = copy.copy(t3_cond)
    poisoned.speaker_emb = torch.full_like(t3_cond.speaker_emb, float("nan"))
    with pytest.raises(RuntimeError, match="logits for token 1 have a NaN"):
        runner.inference(tiny, t3_cond=poisoned, text_tokens=TEXT, max_new_tokens=4)
    assert runner.inference(tiny, t3_cond=t3_cond, text_tokens=TEXT, max_new_tokens=4).numel() == 4


def test_the_callers_conditioning_is_not_written_to(tiny: Any, t3_cond: Any) -> None:
    cond = copy.copy(t3_cond)
    cond.cond_prompt_speech_emb = None
    runner.inference(tiny, t3_cond=cond, text_tokens=TEXT, max_new_tokens=2)
    assert cond.cond_prompt_speech_emb is None


def test_prepended_prompt_tokens_are_refused(tiny: Any, t3_cond: Any) -> None:
    with pytest.raises(NotImplementedError, match="prepend_prompt_speech_tokens must be None"):
        runner.inference(tiny, t3_cond=t3_cond, text_tokens=TEXT, prepend_prompt_speech_tokens=TEXT)


def _spoil(change: str, t3: Any) -> Any:
    layer = t3.tfmr.layers[1]
    if change == "lora":
        layer.self_attn.q_proj = torch.nn.Sequential(layer.self_attn.q_proj)
    elif change == "bias":
        layer.mlp.up_proj.bias = torch.nn.Parameter(torch.zeros(512))
    elif change == "hook":
        layer.register_forward_hook(lambda *_: None)
    elif change == "half":
        t3.half()
    elif change == "mixed":
        t3.speech_head.double()
    elif change == "meta":
        t3.to("meta")
    elif change == "activation":
        t3.cfg.hidden_act = "gelu"
    elif change == "rope":
        t3.tfmr.rotary_emb.rope_type = "dynamic"
    elif change == "head bias":
        t3.speech_head.bias = torch.nn.Parameter(torch.zeros(8194))
    elif change == "head subclass":
        t3.speech_head.__class__ = type("Adapter", (torch.nn.Linear,), {})
    elif change == "norm subclass":
        t3.tfmr.norm.__class__ = type("Norm", (type(t3.tfmr.norm),), {})
    elif change == "forward":
        layer.mlp.forward = lambda x: x
    elif change == "t3 subclass":
        t3.__class__ = type("T3", (type(t3),), {})
    return t3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("lora", "layer 1's q_proj is a Sequential"),
        ("bias", "layer 1's up_proj is a Linear, not a Linear without bias"),
        ("hook", "a forward hook on a LlamaDecoderLayer"),
        ("half", "weights are torch.float16"),
        ("mixed", "weights are torch.float32, torch.float64"),
        ("meta", "weights are on meta"),
        ("activation", "hidden_act is 'gelu'"),
        ("rope", "rotary type 'dynamic'"),
        ("head bias", "speech_head is a Linear, not a Linear without bias"),
        ("head subclass", "speech_head is a Adapter, not a Linear without bias"),
        ("norm subclass", "norm is a Norm, not transformers' LlamaRMSNorm"),
        ("forward", "the forward of a LlamaMLP is replaced"),
        ("t3 subclass", "t3 is a T3, not Chatterbox's T3"),
    ],
)
def test_a_t3_that_is_not_stocks_is_left_to_stock(change: str, reason: str) -> None:
    t3 = random_t3("english", "tiny")
    assert why_unsupported(t3) is None
    assert reason in (why_unsupported(_spoil(change, t3)) or "")


def test_an_inference_that_was_replaced_on_the_class(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = type(tiny).inference

    @functools.wraps(stock)
    def wrapped(self: Any, **arguments: Any) -> Any:
        return stock(self, **arguments)

    monkeypatch.setattr(type(tiny), "inference", wrapped)
    assert why_unsupported(tiny) == "T3.inference is wrapped by someone else"


def test_gpt_backbones_are_left_to_stock() -> None:
    assert "GPT-2" in (why_unsupported(random_t3("turbo", "tiny")) or "")
    assert "not Chatterbox's T3" in (why_unsupported(torch.nn.Linear(1, 1)) or "")
