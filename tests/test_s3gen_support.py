"""What the S3Gen that somebody has changed is left to stock for, and that stock's own is not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from s3gen_toolkit import rough_s3gen, utterance
from torch import nn

from chatterbox_fast import patched, report
from chatterbox_fast.s3gen import support
from chatterbox_fast.s3gen.support import why_flow_unsupported, why_vocoder_unsupported
from chatterbox_fast.t3.support import why_unsupported
from chatterbox_fast.testing import random_model, random_t3

Change = Callable[[Any], Any]


@pytest.fixture(scope="module")
def original() -> Any:
    return rough_s3gen()


@pytest.fixture
def s3gen(original: Any) -> Any:
    return copy.deepcopy(original)


def mine(*arguments: Any) -> Any:
    """A function that somebody puts in the place of stock's."""
    return arguments[-1]


def set_to(path: str, value: Any) -> Change:
    """Sets an attribute of the module at a path."""
    owner, _, name = path.rpartition(".")
    return lambda root: setattr(root.get_submodule(owner), name, value)


def in_place_of(path: str, make: Callable[[], nn.Module]) -> Change:
    """Puts another module where there is one; of a sequence too."""
    owner, _, name = path.rpartition(".")
    return lambda root: root.get_submodule(owner)._modules.__setitem__(name, make())


MIDDLE = "decoder.estimator.mid_blocks.0"
FLOW: dict[str, tuple[Change, str]] = {
    "solver": (set_to("decoder.solve_euler", mine), "decoder has a solve_euler of its own"),
    "attention": (
        set_to("encoder.encoders.0.self_attn.rel_shift", mine),
        "encoder.encoders.0.self_attn has a rel_shift of its own",
    ),
    "dropout": (
        lambda flow: flow.encoder.encoders[0].train(),
        "encoder.encoders.0.self_attn.dropout has training True, not False",
    ),
    "causal": (
        set_to(f"{MIDDLE}.0.block1.block.0.padding_mode", "circular"),
        "padding_mode 'circular', not 'zeros'",
    ),
    "shift": (
        set_to(f"{MIDDLE}.0.block1.block.0.causal_padding", (0, 2)),
        "causal_padding (0, 2) for a kernel of 3",
    ),
    "groups": (
        in_place_of(f"{MIDDLE}.0.res_conv", lambda: nn.Conv1d(256, 256, 1, groups=2)),
        "res_conv has groups 2, not 1",
    ),
    "stride": (
        in_place_of(f"{MIDDLE}.0.res_conv", lambda: nn.Conv1d(256, 256, 1, stride=2)),
        "res_conv has stride (2,), not (1,)",
    ),
    "affine": (
        in_place_of(f"{MIDDLE}.1.0.norm1", lambda: nn.LayerNorm(256, elementwise_affine=False)),
        "norm1 has elementwise_affine False, not True",
    ),
    "bias": (
        in_place_of(f"{MIDDLE}.1.0.norm1", lambda: nn.LayerNorm(256, bias=False)),
        "norm1 has no bias",
    ),
    "values": (
        in_place_of(
            "encoder.encoders.0.self_attn.linear_v", lambda: nn.Linear(512, 512, bias=False)
        ),
        "the encoder's queries or values have no bias",
    ),
    "positions": (
        in_place_of("encoder.encoders.0.self_attn.linear_pos", lambda: nn.Linear(512, 512)),
        "the encoder's positions have a bias",
    ),
    "upsampling": (set_to("encoder.up_layer.conv.bias", None), "upsampling has no bias"),
    "first": (set_to("decoder.estimator.down_blocks.0.0.res_conv.bias", None), "has no bias"),
    "activation": (
        in_place_of(f"{MIDDLE}.0.block1.block.4", nn.SiLU),
        "as block, not CausalConv1d Transpose LayerNorm Transpose Mish",
    ),
    "surplus": (
        lambda flow: flow.decoder.estimator.mid_blocks[0][1][0].ff.net.append(nn.Tanh()),
        "as net, not GELU Dropout LoRACompatibleLinear",
    ),
    "lookahead": (
        set_to("encoder.pre_lookahead_layer.pre_lookahead_len", 2),
        "pre_lookahead_len 2, not 3",
    ),
    "scale": (set_to("encoder.encoders.0.ff_scale", 0.5), "ff_scale 0.5, not 1.0"),
    "embedding": (set_to("input_embedding.max_norm", 1.0), "max_norm 1.0, not None"),
    "transpose": (set_to(f"{MIDDLE}.0.block1.block.1.dim0", 0), "dim0 0, not 1"),
    "projections": (
        in_place_of(f"{MIDDLE}.1.0.attn1.to_v", lambda: nn.Linear(256, 512)),
        "attention's projections have biases",
    ),
    "dtypes": (
        lambda flow: flow.encoder_proj.double(),
        "its weights are torch.float32, torch.float64; the exact engine takes float32",
    ),
    "devices": (lambda flow: flow.encoder_proj.to("meta"), "its weights are not on one device"),
    "nowhere": (lambda flow: flow.to("meta"), "its weights are not on one device"),
    "processor": (set_to(f"{MIDDLE}.1.0.attn1.processor", mine), "attention runs by a function"),
}
VOCODER: dict[str, tuple[Change, str]] = {
    "decode": (set_to("decode", mine), "HiFTGenerator has a decode of its own"),
    "istft": (set_to("_istft", mine), "HiFTGenerator has a _istft of its own"),
    "reflection": (
        in_place_of("reflection_pad", lambda: nn.ReflectionPad1d((0, 1))),
        "reflection_pad has padding (0, 1), not (1, 0)",
    ),
    "circular": (
        set_to("resblocks.0.convs1.0.padding_mode", "circular"),
        "resblocks.0.convs1.0 has padding_mode 'circular', not 'zeros'",
    ),
    "same": (
        in_place_of("source_downs.2", lambda: nn.Conv1d(18, 64, 1, padding="same")),
        "source_downs.2 has padding 'same', not numbers",
    ),
    "upsampling": (set_to("ups.0.output_padding", (1,)), "output_padding (1,), not (0,)"),
    "dilation": (set_to("ups.0.dilation", (2,)), "dilation (2,), not (1,)"),
    "elu": (
        in_place_of("f0_predictor.condnet.1", lambda: nn.ELU(0.5)),
        "condnet.1 has alpha 0.5, not 1.0",
    ),
    "no elu": (in_place_of("f0_predictor.condnet.1", nn.Tanh), "as condnet, not Conv1d ELU"),
    "tanh": (in_place_of("m_source.l_tanh", nn.ELU), "has ELU as l_tanh, not Tanh"),
    "linear": (set_to("f0_upsamp.mode", "linear"), "mode 'linear', not 'nearest'"),
    "part": (set_to("f0_upsamp.scale_factor", 480.5), "by 480.5, which is no whole number"),
    "ups": (set_to("num_upsamples", 2), "3 upsamplings, and num_upsamples is 2"),
    "limit": (set_to("audio_limit", 0), "audio_limit is 0, not above 0"),
}


@pytest.mark.parametrize("change", FLOW)
def test_a_flow_that_is_not_stocks(s3gen: Any, change: str) -> None:
    make, expected = FLOW[change]
    assert why_flow_unsupported(s3gen.flow) is None
    make(s3gen.flow)
    assert expected in str(why_flow_unsupported(s3gen.flow))


@pytest.mark.parametrize("change", VOCODER)
def test_a_vocoder_that_is_not_stocks(s3gen: Any, change: str) -> None:
    make, expected = VOCODER[change]
    assert why_vocoder_unsupported(s3gen.mel2wav) is None
    make(s3gen.mel2wav)
    assert expected in str(why_vocoder_unsupported(s3gen.mel2wav))


def test_every_setting_is_one_of_stocks(original: Any) -> None:
    """A name that is misspelt would be one that nobody sets."""
    missing = {
        f"{type(module).__qualname__}.{name}"
        for root in (original.flow, original.mel2wav)
        for module in root.modules()
        for name, _ in support._expected(type(module))[1]
        if not hasattr(module, name)
    }
    assert not missing


def test_a_method_put_into_a_class(s3gen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    snake = type(s3gen.mel2wav.resblocks[0].activations1[0])
    monkeypatch.setattr(snake, "forward", mine)
    reason = "has a forward that was put into its class and would not be called"
    assert str(why_vocoder_unsupported(s3gen.mel2wav)).endswith(reason)
    monkeypatch.undo()
    monkeypatch.setattr(type(s3gen.mel2wav), "_istft", mine)
    assert "_istft that was put into its class" in str(why_vocoder_unsupported(s3gen.mel2wav))
    monkeypatch.setattr(type(s3gen.flow.decoder), "solve_euler", mine)
    assert "solve_euler that was put into" in str(why_flow_unsupported(s3gen.flow))


def test_a_hook_on_all_modules(s3gen: Any) -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        for reason in (
            why_flow_unsupported(s3gen.flow),
            why_vocoder_unsupported(s3gen.mel2wav),
            why_unsupported(random_t3("english", "tiny")),
        ):
            assert reason == "a forward hook on all modules would not be called"
    finally:
        handle.remove()


def test_methods_that_t3s_engine_would_not_call(monkeypatch: pytest.MonkeyPatch) -> None:
    t3 = random_t3("english", "tiny")
    assert why_unsupported(t3) is None
    t3.inference = mine
    assert why_unsupported(t3) is None, "it is ours by then"
    t3.tfmr.save_pretrained = mine
    assert why_unsupported(t3) is None, "it computes nothing"
    t3.prepare_input_embeds = t3.prepare_input_embeds
    reason = "T3 has a prepare_input_embeds of its own, which would not be called"
    assert why_unsupported(t3) == reason
    del t3.prepare_input_embeds
    t3.tfmr.layers[0].mlp.forward = mine
    reason = "a LlamaMLP has a forward of its own, which would not be called"
    assert why_unsupported(t3) == reason
    del t3.tfmr.layers[0].mlp.forward
    monkeypatch.setattr(type(t3.tfmr.norm), "forward", mine)
    reason = "a LlamaRMSNorm has a forward that was put into its class and would not be called"
    assert why_unsupported(t3) == reason


@pytest.mark.parametrize("kind", ["english", "multilingual", "turbo", "vc"])
def test_what_somebody_put_there_is_called(kind: Any) -> None:
    """Before patch and after it; and stock's own has an engine, in every class."""
    model, called = random_model(kind, "tiny"), []
    vocoder = model.s3gen.mel2wav

    def runs() -> str:
        return next(row.runs for row in report(model) if row.site == "s3gen.vocoder")

    def decode(**arguments: torch.Tensor) -> torch.Tensor:
        called.append(1)
        wave: torch.Tensor = type(vocoder).decode(vocoder, **arguments)
        return wave

    with patched(model):
        assert runs() == "engine, exact"
        vocoder.decode = decode
        assert runs() == "stock"
        vocoder.inference(torch.zeros(1, 80, 4))
        assert called == [1]
    with patched(model):
        vocoder.inference(torch.zeros(1, 80, 4))
        assert called == [1, 1]
        del vocoder.decode
        assert runs() == "engine, exact"


def test_what_somebody_puts_into_a_class_after_patch_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, called = random_model("vc", "tiny"), []

    def mine(self: Any, *_: Any, **__: Any) -> None:
        called.append(type(self).__name__)

    s3gen = model.s3gen
    with patched(model):
        for owner, name in (
            (s3gen.mel2wav, "inference"), (s3gen.flow, "inference"), (s3gen, "flow_inference"),
        ):  # fmt: skip
            monkeypatch.setattr(type(owner), name, mine)
        s3gen.mel2wav.inference(torch.zeros(1, 80, 4))
        s3gen.flow.inference(**utterance())
        s3gen.flow_inference(torch.zeros(1, 3, dtype=torch.long), ref_dict={})
    assert called == ["HiFTGenerator", "CausalMaskedDiffWithXvec", type(s3gen).__name__]


def test_what_changes_inside_of_an_attribute_is_noticed() -> None:
    model = random_model("vc", "tiny")
    vocoder, mel = model.s3gen.mel2wav, torch.randn(1, 80, 6)

    def sound() -> torch.Tensor:
        torch.manual_seed(1)
        wave: torch.Tensor = vocoder.inference(mel)[0]
        return wave

    with patched(model):
        before = sound()
        vocoder.stft_window.copy_(torch.hamming_window(16))
        after = sound()
        vocoder.istft_params["hop_len"] = 8
        assert "has istft_params {'n_fft': 16, 'hop_len': 8}" in str(report(model))
        vocoder.istft_params["hop_len"] = 4
    assert (after - sound()).abs().max() < 1e-4
    assert (after - before).abs().max() > 1e-3
