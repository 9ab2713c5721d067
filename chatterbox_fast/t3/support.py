"""Whether a T3 is one that the engine computes as stock does, and if not, why."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from ..modules import Methods, is_exactly, why_not_called

INFERENCE_PARAMETERS = {
    "self",
    "t3_cond",
    "text_tokens",
    "initial_speech_tokens",
    "prepend_prompt_speech_tokens",
    "num_return_sequences",
    "max_new_tokens",
    "stop_on_eos",
    "do_sample",
    "temperature",
    "top_p",
    "min_p",
    "length_penalty",
    "repetition_penalty",
    "cfg_weight",
}
"""What stock's T3.inference takes, in the wheel 0.1.7 and at HEAD."""

PROJECTIONS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
"""A layer's linear modules: (part, names). Apart from the head they are what a step reads."""
_STATIC_ROPE = ("default", "linear", "llama3")


def why_unsupported(t3: Any) -> str | None:
    """The reason why this T3 must be left to stock, or None where the engine computes the same.

    Checks what the module is, not which release it came from: its class, configuration, layer
    types, shapes, dtype, devices and hooks.
    """
    if not isinstance(t3, nn.Module) or not is_exactly(t3, "T3", "chatterbox."):
        return f"t3 is a {type(t3).__qualname__}, not Chatterbox's T3"
    if t3.training:
        return "the module is in training mode"
    if t3.is_gpt:
        return "no engine yet for the GPT-2 backbone of Turbo and Nano"
    if t3.hp.is_multilingual and _has_alignment_analyzer(t3):
        return "no engine yet for this release's multilingual alignment analysis"
    return (
        _why_not_inference(type(t3))
        or _why_not_config(t3)
        or _why_not_layers(t3)
        or _why_not_methods(t3)
        or why_not_called((t3.tfmr, t3.speech_head, t3.speech_emb, t3.speech_pos_emb))
        or _why_not_conditioning(t3)
        or _why_not_tensors(t3)
        or _why_not_autocast(t3)
    )


def _has_alignment_analyzer(t3: Any) -> bool:
    module = inspect.getmodule(type(t3))
    return hasattr(module, "AlignmentStreamAnalyzer")


def _why_not_inference(stock_class: type) -> str | None:
    # The class's method, not the instance's attribute, which may be our own replacement.
    method = stock_class.inference  # type: ignore[attr-defined]
    parameters = set(inspect.signature(method).parameters)
    if parameters != INFERENCE_PARAMETERS:
        odd = ", ".join(sorted(parameters ^ INFERENCE_PARAMETERS))
        return f"T3.inference has another signature than the releases we know: {odd}"
    while hasattr(method, "__wrapped__"):
        if "torch" not in method.__code__.co_filename:  # stock's own wrapper is inference_mode's
            return "T3.inference is wrapped by someone else"
        method = method.__wrapped__
    if method.__code__.co_filename != inspect.getsourcefile(stock_class):
        return "T3.inference was replaced on the class"
    return None


def _why_not_methods(t3: Any) -> str | None:
    ours = frozenset(("inference",))
    reason = Methods(type(t3), ours).why_replaced(t3)
    return None if reason is None else f"T3 {reason}"


def _why_not_conditioning(t3: Any) -> str | None:
    """It is called, but once a voice, and the length of what it makes is known before."""
    encoder = t3.cond_enc
    if (reason := why_not_called((encoder,))) is not None:
        return f"{reason} for a known voice"
    if not is_exactly(encoder, "T3CondEnc", "chatterbox."):
        return f"cond_enc is a {type(encoder).__qualname__}, not Chatterbox's T3CondEnc"
    resampler = encoder.perceiver
    if t3.hp.use_perceiver_resampler and not is_exactly(resampler, "Perceiver", "chatterbox."):
        return f"the perceiver is a {type(resampler).__qualname__}, not Chatterbox's Perceiver"
    return None


def _why_not_config(t3: Any) -> str | None:
    config, rotary = t3.cfg, getattr(t3.tfmr, "rotary_emb", None)
    if not is_exactly(t3.tfmr, "LlamaModel", "transformers.") or rotary is None:
        return f"the backbone is a {type(t3.tfmr).__qualname__}, not transformers' LlamaModel"
    if config.hidden_act != "silu":
        return f"hidden_act is {config.hidden_act!r}, not 'silu'"
    if config.num_key_value_heads != config.num_attention_heads:
        return "grouped-query attention is not Chatterbox's"
    if rotary.rope_type not in _STATIC_ROPE:
        return f"rotary type {rotary.rope_type!r} depends on the length"
    if t3.speech_pos_emb is None or t3.hp.input_pos_emb != "learned":
        return "the speech positions are not learned embeddings"
    return None


def _why_not_layers(t3: Any) -> str | None:
    linears = {"speech_head": t3.speech_head}
    norms = {"norm": t3.tfmr.norm}
    if len(t3.tfmr.layers) != t3.cfg.num_hidden_layers:
        return f"{len(t3.tfmr.layers)} layers, and num_hidden_layers is {t3.cfg.num_hidden_layers}"
    for number, layer in enumerate(t3.tfmr.layers):
        if (reason := _why_not_layer(layer, head_dim(t3.cfg))) is not None:
            return f"layer {number}'s {reason}"
        for part, names in PROJECTIONS.items():
            for name in names:
                linears[f"layer {number}'s {name}"] = getattr(getattr(layer, part), name)
        for name in ("input_layernorm", "post_attention_layernorm"):
            norms[f"layer {number}'s {name}"] = getattr(layer, name)
    for name, linear in linears.items():
        if type(linear) is not nn.Linear or linear.bias is not None:
            return f"{name} is a {type(linear).__qualname__}, not a Linear without bias"
    for name, norm in norms.items():
        if not is_exactly(norm, "LlamaRMSNorm", "transformers."):
            return f"{name} is a {type(norm).__qualname__}, not transformers' LlamaRMSNorm"
    for name, table in (("speech_emb", t3.speech_emb), ("speech_pos_emb", t3.speech_pos_emb.emb)):
        if type(table) is not nn.Embedding:
            return f"{name} is a {type(table).__qualname__}, not an Embedding"
    return None


def _why_not_layer(layer: Any, width: int) -> str | None:
    parts = {"LlamaDecoderLayer": layer, "LlamaAttention": layer.self_attn, "LlamaMLP": layer.mlp}
    for name, part in parts.items():
        if not is_exactly(part, name, "transformers."):
            return f"{name} is a {type(part).__qualname__}"
    if layer.self_attn.scaling != width**-0.5:
        return f"attention scales by {layer.self_attn.scaling}, not {width**-0.5}"
    if type(layer.mlp.act_fn).__qualname__ not in ("SiLU", "SiLUActivation"):
        return f"act_fn is a {type(layer.mlp.act_fn).__qualname__}, not SiLU"
    return None


def _why_not_autocast(t3: Any) -> str | None:
    return "torch.autocast is on" if torch.is_autocast_enabled(t3.device.type) else None


def head_dim(config: Any) -> int:
    """Width of an attention head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def projection_weights(tfmr: Any) -> list[nn.Parameter]:
    """The weights of all layers' linear modules."""
    return [
        getattr(getattr(layer, part), name).weight
        for layer in tfmr.layers
        for part, names in PROJECTIONS.items()
        for name in names
    ]


def _why_not_tensors(t3: Any) -> str | None:
    parameters = list(t3.parameters())
    dtypes = {str(p.dtype) for p in parameters}
    if dtypes not in ({"torch.float32"}, {"torch.float64"}):
        return f"T3's weights are {', '.join(sorted(dtypes))}; the exact engine takes float32"
    # The engine keeps a layer's own weights on the host where it has packed them for a GPU.
    packed = {id(p) for p in projection_weights(t3.tfmr)} if t3.device.type == "cuda" else set()
    devices = {str(p.device) for p in parameters if not (id(p) in packed and p.is_cpu)}
    if dtypes == {"torch.float64"} and devices != {"cpu"}:
        return "float64 is supported on a CPU alone"
    if len(devices) != 1 or devices == {"meta"}:
        return f"T3's weights are on {', '.join(sorted(devices))}; the engine takes one device"
    width = t3.cfg.num_attention_heads * head_dim(t3.cfg)
    for number, layer in enumerate(t3.tfmr.layers):
        if (shape := tuple(layer.self_attn.q_proj.weight.shape)) != (width, t3.dim):
            return f"layer {number}'s q_proj is {shape}, not {(width, t3.dim)}"
    return None
