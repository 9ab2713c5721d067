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

from ..modules import Methods, is_exactly, parameters_of, why_altered, why_hooked_globally

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

_ATTENTION = ("AttnProcessor", "AttnProcessor2_0")
"""diffusers' classes that compute plain attention."""

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

_CONV = {"groups": 1, "padding_mode": "zeros"}
_PLAIN_CONV = _CONV | {"stride": (1,), "padding": (0,), "dilation": (1,)}
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
    "CausalConv1d": _PLAIN_CONV,
    "CausalMaskedDiffWithXvec": {"token_mel_ratio": 2},
    "ConditionalDecoder": {"causal": True, "static_chunk_size": 0},
    "ConformerEncoderLayer": {
        "conv_module": None,
        "feed_forward_macaron": None,
        "ff_scale": 1.0,
        "normalize_before": True,
    },
    "Conv1d": _CONV,
    "ConvTranspose1d": _CONV | {"output_padding": (0,), "dilation": (1,)},
    "Dropout": {"training": False},
    "ELU": {"alpha": 1.0},
    "Embedding": {"max_norm": None},
    "GELU": {"approximate": "none"},
    "HiFTGenerator": {"istft_params": {"n_fft": 16, "hop_len": 4}},
    "LayerNorm": {"elementwise_affine": True},
    "LoRACompatibleLinear": {"lora_layer": None},
    "PreLookaheadLayer": {"pre_lookahead_len": 3},
    "ReflectionPad1d": {"padding": (1, 0)},
    "Snake": {"alpha_logscale": False},
    "Transpose": {"dim0": 1, "dim1": 2},
    "Upsample": {"mode": "nearest", "size": None},
    "Upsample1D": {"stride": 2},
    "UpsampleConformerEncoder": {
        "global_cmvn": None,
        "normalize_before": True,
        "static_chunk_size": 0,
        "use_dynamic_chunk": False,
    },
}
"""Class -> what its attributes are where stock computes what the engine computes."""

_PARTS: dict[str, dict[str, str]] = {
    "Attention": {"to_out": "Linear Dropout"},
    "CausalBlock1D": {"block": "CausalConv1d Transpose LayerNorm Transpose Mish"},
    "ConvRNNF0Predictor": {"condnet": " ".join(["Conv1d ELU"] * 5)},
    "FeedForward": {"net": "GELU Dropout LoRACompatibleLinear"},
    "LinearNoSubsampling": {"out": "Linear LayerNorm Dropout"},
    "SourceModuleHnNSF": {"l_tanh": "Tanh"},
}
"""Class -> what its parts are, in order, where another known one would go unnoticed."""


def why_flow_unsupported(flow: Any) -> str | None:
    """The reason why this flow (tokens to mel) must be left to stock, or None."""
    return (
        _why_not(flow, "CausalMaskedDiffWithXvec", FLOW_PARAMETERS)
        or _why_not_plain(flow)
        or _why_not_encoder(flow.encoder)
        or _why_not_estimator(flow.decoder.estimator)
    )


def why_vocoder_unsupported(mel2wav: Any) -> str | None:
    """The reason why this vocoder (mel to audio) must be left to stock, or None."""
    return _why_not(
        mel2wav, "HiFTGenerator", {"self", "speech_feat", "cache_source"}
    ) or _why_not_sizes(mel2wav)


def _why_not(module: Any, name: str, parameters: set[str]) -> str | None:
    if not is_exactly(module, name, "chatterbox."):
        return f"a {type(module).__qualname__}, not Chatterbox's {name}"
    if module.training:
        return "the module is in training mode"
    return (
        _why_not_inference(type(module), parameters)
        or why_hooked_globally()
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
    known: dict[type, Methods] = {}
    for module in root.modules():
        if (reason := _why_odd(module) or why_altered(module, known)) is not None:
            path = next(path for path, each in root.named_modules() if each is module)
            return f"{path or type(module).__qualname__} {reason}"
    return None


def _why_odd(module: Any) -> str | None:
    known, settings, parts = _expected(type(module))  # type: ignore[arg-type]
    if not known:
        return f"is a {type(module).__qualname__}"
    for name, expected in settings:
        if (found := getattr(module, name, expected)) != expected:
            return f"has {name} {found!r}, not {expected!r}"
    for name, kinds in parts:
        if (found := _kinds(getattr(module, name))) != kinds:
            return f"has {found} as {name}, not {kinds}"
    if isinstance(module, nn.LayerNorm) and module.bias is None:
        return "has no bias"
    if isinstance(module, nn.Conv1d) and isinstance(module.padding, str):
        return f"has padding {module.padding!r}, not numbers"
    return None


@functools.lru_cache(256)
def _expected(
    kind: type,
) -> tuple[bool, tuple[tuple[str, Any], ...], tuple[tuple[str, str], ...]]:
    """Whether stock's flow or vocoder has such modules, what theirs are set to, and their parts."""
    name, package = kind.__qualname__, kind.__module__
    known = any(package.startswith(each) and name in names for each, names in _KNOWN.items())
    name = name.removeprefix("Parametrized")
    return known, tuple(_SETTINGS.get(name, {}).items()), tuple(_PARTS.get(name, {}).items())


def _kinds(part: nn.Module) -> str:
    """The class of a part, or of each of a sequence's; whether it is parametrized or not."""
    parts = part if isinstance(part, (nn.Sequential, nn.ModuleList)) else [part]
    return " ".join(type(each).__qualname__.removeprefix("Parametrized") for each in parts)


def _why_not_tensors(root: nn.Module) -> str | None:
    parameters = parameters_of(root)
    if {p.dtype for p in parameters} not in ({torch.float32}, {torch.float64}):
        dtypes = ", ".join(sorted({str(p.dtype) for p in parameters}))
        return f"its weights are {dtypes}; the exact engine takes float32"
    devices = {p.device for p in parameters}
    if len(devices) != 1 or devices.pop().type == "meta":
        return "its weights are not on one device"
    return None


def _why_not_plain(flow: nn.Module) -> str | None:
    """The flow's convolutions step by one and get their zeros from outside; a vocoder's do not."""
    for path, module in flow.named_modules():
        if type(module) is nn.Conv1d:
            for name in ("stride", "padding", "dilation"):
                if (found := getattr(module, name)) != _PLAIN_CONV[name]:
                    return f"{path} has {name} {found!r}, not {_PLAIN_CONV[name]!r}"
        width = getattr(module, "causal_padding", None)
        if width is not None and width != (module.kernel_size[0] - 1, 0):
            return f"{path} has causal_padding {width!r} for a kernel of {module.kernel_size[0]}"
    return None


def _why_not_sizes(mel2wav: Any) -> str | None:
    if len(mel2wav.ups) != mel2wav.num_upsamples:
        return f"{len(mel2wav.ups)} upsamplings, and num_upsamples is {mel2wav.num_upsamples}"
    if int(mel2wav.f0_upsamp.scale_factor) != mel2wav.f0_upsamp.scale_factor:
        return f"F0 is upsampled by {mel2wav.f0_upsamp.scale_factor}, which is no whole number"
    if not mel2wav.audio_limit > 0:
        return f"audio_limit is {mel2wav.audio_limit}, not above 0"
    return None


def _why_not_encoder(encoder: Any) -> str | None:
    for layer in (*encoder.encoders, *encoder.up_encoders):
        attention = layer.self_attn
        if type(layer.feed_forward.activation) is not nn.SiLU:
            return f"the encoder's activation is {layer.feed_forward.activation}, not SiLU"
        if any(each.bias is None for each in (attention.linear_q, attention.linear_v)):
            return "the encoder's queries or values have no bias"
        if attention.linear_k.bias is None:
            return "the encoder's keys have no bias"
        if attention.linear_pos.bias is not None:
            return "the encoder's positions have a bias"
    return "the encoder's upsampling has no bias" if encoder.up_layer.conv.bias is None else None


def _why_not_estimator(estimator: Any) -> str | None:
    blocks = len(estimator.down_blocks), len(estimator.up_blocks)
    if blocks != (1, 1):
        return f"the estimator has {blocks[0]} down and {blocks[1]} up blocks, not one of each"
    if not estimator.mid_blocks or not estimator.mid_blocks[0][1]:
        return "the estimator has no transformer in the middle"
    if estimator.down_blocks[0][0].res_conv.bias is None:
        return "the estimator's first res_conv has no bias"
    for stage in (*estimator.down_blocks, *estimator.mid_blocks, *estimator.up_blocks):
        for block in stage[1]:
            attention = block.attn1
            if not any(is_exactly(attention.processor, name, "diffusers.") for name in _ATTENTION):
                return f"attention runs by a {type(attention.processor).__qualname__}"
            projections = attention.to_q, attention.to_k, attention.to_v
            if any(each.bias is not None for each in projections):
                return "attention's projections have biases"
            width = attention.inner_dim // attention.heads
            if attention.scale != width**-0.5:
                return f"attention scales by {attention.scale}, not {width**-0.5}"
    return None
