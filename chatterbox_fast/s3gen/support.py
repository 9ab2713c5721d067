"""Whether an S3Gen's flow or vocoder is one that the engine computes as stock does; if not, why.

What a module is made of is checked, not which release it came from: the classes of all its parts,
what they are set to, dtype, device, hooks.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn

from ..modules import is_exactly, parameters_of
from ..overrides import is_ours

_TORCH = (
    "Conv1d ELU Dropout Embedding LayerNorm Linear Mish ModuleDict ModuleList ParametrizationList "
    "ParametrizedConv1d ParametrizedConvTranspose1d ConvTranspose1d ReflectionPad1d Sequential "
    "SiLU Tanh Upsample _WeightNorm"
)
_CHATTERBOX = (
    "BasicTransformerBlock CausalBlock1D CausalConditionalCFM CausalConv1d "
    "CausalMaskedDiffWithXvec CausalResnetBlock1D ConditionalDecoder ConformerEncoderLayer "
    "ConvRNNF0Predictor EspnetRelPositionalEncoding FeedForward HiFTGenerator LinearNoSubsampling "
    "PositionwiseFeedForward PreLookaheadLayer RelPositionMultiHeadedAttention ResBlock SineGen "
    "SinusoidalPosEmb Snake SourceModuleHnNSF TimestepEmbedding Transpose Upsample1D "
    "UpsampleConformerEncoder"
)
_KNOWN = {
    "torch.nn.": frozenset(_TORCH.split()),
    "chatterbox.": frozenset(_CHATTERBOX.split()),
    "diffusers.": frozenset(("Attention", "GELU", "LoRACompatibleLinear")),
}
"""Package -> the classes that stock's flow and vocoder are made of."""

FLOW_PARAMETERS = {
    "self",
    "token",
    "token_len",
    "prompt_token",
    "prompt_token_len",
    "prompt_feat",
    "prompt_feat_len",
    "embedding",
    "finalize",
    "n_timesteps",
    "noised_mels",
    "meanflow",
}
"""What stock's CausalMaskedDiffWithXvec.inference takes, in the wheel 0.1.7 and at HEAD."""

_SETTINGS: dict[str, dict[str, Any]] = {
    "Attention": {
        "group_norm": None,
        "spatial_norm": None,
        "norm_q": None,
        "norm_k": None,
        "residual_connection": False,
        "rescale_output_factor": 1.0,
        "scale_qk": True,
        "fused_projections": False,
    },
    "BasicTransformerBlock": {
        "attn2": None,
        "only_cross_attention": False,
        "use_ada_layer_norm": False,
        "use_ada_layer_norm_zero": False,
        "_chunk_size": None,
    },
    "ConditionalDecoder": {"causal": True, "static_chunk_size": 0},
    "ConformerEncoderLayer": {
        "conv_module": None,
        "feed_forward_macaron": None,
        "normalize_before": True,
    },
    "GELU": {"approximate": "none"},
    "HiFTGenerator": {"istft_params": {"n_fft": 16, "hop_len": 4}},
    "LoRACompatibleLinear": {"lora_layer": None},
    "Snake": {"alpha_logscale": False},
    "Upsample1D": {"stride": 2},
    "UpsampleConformerEncoder": {
        "global_cmvn": None,
        "normalize_before": True,
        "static_chunk_size": 0,
        "use_dynamic_chunk": False,
    },
}
"""Class -> what its attributes are where stock computes what the engine computes."""


def why_flow_unsupported(flow: Any) -> str | None:
    """The reason why this flow (tokens to mel) must be left to stock, or None."""
    return (
        _why_not(flow, "CausalMaskedDiffWithXvec", FLOW_PARAMETERS)
        or _why_not_encoder(flow.encoder)
        or _why_not_estimator(flow.decoder.estimator)
    )


def why_vocoder_unsupported(mel2wav: Any) -> str | None:
    """The reason why this vocoder (mel to audio) must be left to stock, or None."""
    return _why_not(mel2wav, "HiFTGenerator", {"self", "speech_feat", "cache_source"})


def _why_not(module: Any, name: str, parameters: set[str]) -> str | None:
    if not is_exactly(module, name, "chatterbox."):
        return f"a {type(module).__qualname__}, not Chatterbox's {name}"
    if module.training:
        return "the module is in training mode"
    return (
        _why_not_inference(type(module), parameters)
        or _why_not_parts(module)
        or _why_not_tensors(module)
    )


def _why_not_inference(stock_class: Any, known: set[str]) -> str | None:
    # The class's method, not the instance's attribute, which may be our own replacement.
    method = stock_class.inference
    if (parameters := set(inspect.signature(method).parameters)) != known:
        odd = ", ".join(sorted(parameters ^ known))
        return f"inference has another signature than the releases we know: {odd}"
    if inspect.unwrap(method).__code__.co_filename != inspect.getsourcefile(stock_class):
        return "inference was replaced on the class"
    return None


def _why_not_parts(root: nn.Module) -> str | None:
    """What is odd about the first part of `root` that is odd, or None."""
    for module in root.modules():
        if (reason := _why_odd(module)) is not None:
            path = next(path for path, each in root.named_modules() if each is module)
            return f"{path or type(module).__qualname__} {reason}"
    return None


def _why_odd(module: nn.Module) -> str | None:
    known, settings = _expected(type(module))  # type: ignore[arg-type]
    own = vars(module)
    if not known:
        return f"is a {type(module).__qualname__}"
    for name, expected in settings:
        if (found := getattr(module, name, expected)) != expected:
            return f"has {name} {found!r}, not {expected!r}"
    if "forward" in own and not is_ours(own["forward"]):
        return "has a forward of its own, which would not be called"
    if own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return "has a forward hook, which would not be called"
    return None


@functools.lru_cache(256)
def _expected(kind: type) -> tuple[bool, tuple[tuple[str, Any], ...]]:
    """Whether stock's flow or vocoder has such modules, and what theirs are set to."""
    name = kind.__qualname__
    known = any(
        kind.__module__.startswith(package) and name in names for package, names in _KNOWN.items()
    )
    return known, tuple(_SETTINGS.get(name, {}).items())


def _why_not_tensors(root: nn.Module) -> str | None:
    parameters = parameters_of(root)
    if {p.dtype for p in parameters} not in ({torch.float32}, {torch.float64}):
        dtypes = ", ".join(sorted({str(p.dtype) for p in parameters}))
        return f"its weights are {dtypes}; the exact engine takes float32"
    devices = {p.device for p in parameters}
    if len(devices) != 1 or devices.pop().type == "meta":
        return "its weights are not on one device"
    return None


def _why_not_encoder(encoder: Any) -> str | None:
    for layer in (*encoder.encoders, *encoder.up_encoders):
        if type(layer.feed_forward.activation) is not nn.SiLU:
            return f"the encoder's activation is {layer.feed_forward.activation}, not SiLU"
        if layer.self_attn.linear_k.bias is None:
            return "the encoder's keys have no bias"
    return None


def _why_not_estimator(estimator: Any) -> str | None:
    blocks = len(estimator.down_blocks), len(estimator.up_blocks)
    if blocks != (1, 1):
        return f"the estimator has {blocks[0]} down and {blocks[1]} up blocks, not one of each"
    for stage in (*estimator.down_blocks, *estimator.mid_blocks, *estimator.up_blocks):
        for block in stage[1]:
            attention = block.attn1
            if not type(attention.processor).__qualname__.startswith("AttnProcessor"):
                return f"attention runs by a {type(attention.processor).__qualname__}"
            projections = attention.to_q, attention.to_k, attention.to_v
            if any(each.bias is not None for each in projections):
                return "attention's projections have biases"
            width = attention.inner_dim // attention.heads
            if attention.scale != width**-0.5:
                return f"attention scales by {attention.scale}, not {width**-0.5}"
    return None
