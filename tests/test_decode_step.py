"""The decode step is one pure function over preallocated buffers; the runner checks its inputs."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from conftest import engine_of, tokens_of
from toolkit import Dispatched
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from chatterbox_fast import build_info
from chatterbox_fast.reference import FAILED
from chatterbox_fast.sampling import SamplingParams
from chatterbox_fast.t3.decode_step import decode_step, draw_token
from chatterbox_fast.t3.engine import Engine
from chatterbox_fast.t3.prefill import prefill, text_embeds
from chatterbox_fast.t3.state import CAPACITIES, DecodeState, capacity_for
from chatterbox_fast.t3.support import why_unsupported
from chatterbox_fast.testing import random_t3

TEXT = torch.tensor([[255, 40, 41, 42, 0]])


@pytest.fixture(scope="module")
def tiny() -> Any:
    return random_t3("english", "tiny")


def prefilled(
    t3: Any, cond: Any, cfg_weight: float = 0.5, **options: Any
) -> tuple[Engine, DecodeState]:
    engine = engine_of(t3, **options)
    embeds = text_embeds(t3, TEXT, None, cfg_weight)
    state = engine.slots.take(len(embeds), 60).state
    state.reset(SamplingParams(cfg_weight), 6561)
    voice = engine.voice(t3, cond)
    logits = prefill(engine.weights.prefill, state, voice, embeds, engine.rotary)
    draw_token(engine.weights.decode, state, logits)
    return engine, state


def step(engine: Engine, state: DecodeState) -> None:
    decode_step(engine.weights.decode, state, state.capacity)


@pytest.mark.parametrize("precision", ["exact", "bf16", "int8"])
def test_a_step_changes_buffers_in_place_and_keeps_their_storage(
    tiny: Any, t3_cond: Any, precision: str
) -> None:
    with torch.inference_mode():
        engine, state = prefilled(tiny, t3_cond, precision=precision)
        pointers = {k: v.data_ptr() for k, v in vars(state).items() if torch.is_tensor(v)}
        position, count = int(state.position), int(state.count)
        step(engine, state)
    assert {k: v.data_ptr() for k, v in vars(state).items() if torch.is_tensor(v)} == pointers
    assert (int(state.position), int(state.count)) == (position + 1, count + 1)
    drawn = state.tokens[0, : count + 1]
    assert state.seen.sum() == len({6561, *drawn.tolist()})


@pytest.mark.parametrize("precision", ["exact", "bf16", "int8"])
def test_a_step_reads_no_value_on_the_host(
    tiny: Any, t3_cond: Any, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Under fake tensors on a device "cuda", .item() and data-dependent branches raise."""
    monkeypatch.setattr("chatterbox_fast.ops.philox_threads", lambda *_: 8448)
    with torch.inference_mode():
        engine, state = prefilled(tiny, t3_cond, precision=precision)
    state.philox = torch.zeros(1, 2, dtype=torch.long)
    if build_info().get("cuda") is None:
        state.sampler = "reference"
    with FakeTensorMode(allow_non_fake_inputs=False):
        try:
            torch.empty(1, device="cuda")
        except RuntimeError:  # torch 2.6 asks for the driver even here
            pytest.skip("this torch has no fake CUDA tensors on a machine without a driver")

        def fake(x: Any) -> Any:
            if not torch.is_tensor(x):
                return x
            return torch.empty(x.shape, dtype=x.dtype, device="cuda")

        weights = tree_map(fake, engine.weights.decode)
        buffers = DecodeState(**{k: fake(v) for k, v in vars(state).items()})
        decode_step(weights, buffers, buffers.capacity)
        assert buffers.embedding.device.type == "cuda"
        with pytest.raises(Exception, match="_local_scalar_dense"):
            bool(buffers.flags)


@pytest.mark.parametrize(("precision", "linears", "ops"), [("exact", 7, 11), ("bf16", 4, 5)])
def test_what_a_step_dispatches(t3_cond: Any, precision: str, linears: int, ops: int) -> None:
    """Of the 1,404 kernels of stock's step at full size a layer has 46."""
    counts = {}
    for size in ("tiny", "reduced"):
        t3 = random_t3("english", size)
        with torch.inference_mode():
            engine, state = prefilled(t3, t3_cond, precision=precision)
            with Dispatched() as dispatched:
                step(engine, state)
        assert dispatched.ops["chatterbox_fast::cfg_sample"] == 1
        layers = len(t3.tfmr.layers)
        assert dispatched.ops["chatterbox_fast::skinny_linear"] == linears * layers + 1
        assert dispatched.ops["chatterbox_fast::decode_attention"] == layers
        assert dispatched.looks() == 0
        counts[layers] = dispatched.ops.total()
    a_layer = (counts[4] - counts[2]) / 2
    assert a_layer == ops
    assert counts[2] - 2 * a_layer <= 12, "embedding, head and draw"


def test_a_step_looks_at_the_slots_it_is_told_to(tiny: Any, t3_cond: Any) -> None:
    """More than the valid ones change nothing."""
    with torch.inference_mode():
        engine, state = prefilled(tiny, t3_cond)
        other = copy.deepcopy(state)
        used = int(state.position) + 1
        torch.manual_seed(1)
        decode_step(engine.weights.decode, state, used)
        torch.manual_seed(1)
        decode_step(engine.weights.decode, other, other.capacity)
        torch.testing.assert_close(state.embedding, other.embedding)
        torch.testing.assert_close(state.k_cache[..., :used, :], other.k_cache[..., :used, :])
        assert not state.flags & FAILED
        decode_step(engine.weights.decode, state, used)
        assert state.flags & FAILED, "the new position is not among them"


def test_cfg_weight_zero_runs_half_the_batch(tiny: Any, t3_cond: Any) -> None:
    with torch.inference_mode():
        assert prefilled(tiny, t3_cond, 0.5)[1].rows == 2
        assert prefilled(tiny, t3_cond, 0.0)[1].rows == 1


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
        ({"initial_speech_tokens": torch.ones(1, 4101).long()}, "at most 4100 long, got 4101"),
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
        tokens_of(tiny, **arguments)
    assert torch.equal(torch.get_rng_state(), state)


def test_parameters_that_are_no_numbers(tiny: Any, t3_cond: Any) -> None:
    with pytest.raises(TypeError, match="max_new_tokens must be an int, got 2.9"):
        tokens_of(tiny, t3_cond=t3_cond, text_tokens=TEXT, max_new_tokens=2.9)
    with pytest.raises(TypeError, match="temperature must be a number, got None"):
        tokens_of(tiny, t3_cond=t3_cond, text_tokens=TEXT, temperature=None)


def test_nan_logits_raise_and_the_model_stays_usable(t3_cond: Any) -> None:
    t3 = random_t3("english", "tiny")
    settings = {"t3_cond": t3_cond, "text_tokens": TEXT, "max_new_tokens": 4}
    expected = tokens_of(t3, **settings, seed=1)
    with torch.no_grad():
        t3.text_emb.weight[41] = float("nan")
    with pytest.raises(RuntimeError, match="logits for token 1 have a NaN"):
        tokens_of(t3, **settings)
    with torch.no_grad():
        t3.text_emb.weight[41] = 0.0
    assert tokens_of(t3, **settings, seed=1).numel() == expected.numel() == 4


def test_prepended_prompt_tokens_are_refused(tiny: Any, t3_cond: Any) -> None:
    with pytest.raises(NotImplementedError, match="prepend_prompt_speech_tokens must be None"):
        tokens_of(tiny, t3_cond=t3_cond, text_tokens=TEXT, prepend_prompt_speech_tokens=TEXT)


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
    elif change == "fewer layers":
        t3.cfg.num_hidden_layers = 1
    elif change == "attention":
        layer.self_attn.__class__ = type("Other", (type(layer.self_attn),), {})
    elif change == "scaling":
        layer.self_attn.scaling = 1.0
    elif change == "act_fn":
        layer.mlp.act_fn = torch.nn.GELU()
    elif change == "t3 subclass":
        t3.__class__ = type("T3", (type(t3),), {})
    return t3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("lora", "layer 1's q_proj is a Sequential"),
        ("bias", "layer 1's up_proj is a Linear, not a Linear without bias"),
        ("hook", "a LlamaDecoderLayer has a forward hook, which would not be called"),
        ("half", "weights are torch.float16"),
        ("mixed", "weights are torch.float32, torch.float64"),
        ("meta", "weights are on meta"),
        ("activation", "hidden_act is 'gelu'"),
        ("rope", "rotary type 'dynamic'"),
        ("head bias", "speech_head is a Linear, not a Linear without bias"),
        ("head subclass", "speech_head is a Adapter, not a Linear without bias"),
        ("norm subclass", "norm is a Norm, not transformers' LlamaRMSNorm"),
        ("forward", "a LlamaMLP has a forward of its own, which would not be called"),
        ("fewer layers", "2 layers, and num_hidden_layers is 1"),
        ("attention", "layer 1's LlamaAttention is a Other"),
        ("scaling", "layer 1's attention scales by 1.0, not 0.125"),
        ("act_fn", "layer 1's act_fn is a GELU, not SiLU"),
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
