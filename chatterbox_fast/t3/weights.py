"""T3's parameters as a decode step reads them, in the precision that was chosen.

- On a CPU in ``exact`` precision they are the model's own tensors: its kernel reads them as they
  lie, at the speed of memory.
- Else they are a copy, with q, k and v (gate and up) fused: ``bf16``, ``fp16``, or ``int8`` with a
  scale a row; the KV cache is as narrow, with ``int8`` in bfloat16. Norms, embeddings, sums and,
  in a decode step, all that lies between the matrices stay in float32, which is why the error is
  smaller than that of a model converted as a whole.
- On a GPU the copy takes the place of the layers' own matrices. Those wait on the host, bit for
  bit, until `bring_home`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..precision import Precise
from .support import head_dim, projection_weights


class Projection(NamedTuple):
    """A linear layer without bias.

    `kernel` names what runs it for a few rows: a backend of `skinny_linear`, or ``"torch"``.
    """

    weight: Tensor  # (N, K), float or int8
    scale: Tensor | None  # (N,) float32 of an int8 weight
    kernel: str

    def __call__(self, x: Tensor) -> Tensor:
        """``x @ weight.T`` over the last dimension of x, in x's dtype."""
        if self.kernel != "torch" and x.numel() <= ops.MAX_SKINNY_ROWS * x.shape[-1]:
            kernel, rows = ops.skinny_linear_by(self.kernel), x.reshape(-1, x.shape[-1])
            return kernel(rows, self.weight, self.scale).view(*x.shape[:-1], -1)
        if self.scale is None:
            return F.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)
        half = torch.bfloat16
        weight = self.weight.to(half) * self.scale.to(half)[:, None]
        return F.linear(x.to(half), weight).to(x.dtype)


Projections = tuple[Projection, ...]
"""Layers that read the same input: fused into one, or one by one."""


def project(projections: Projections, x: Tensor) -> Tensor:
    """The outputs of all `projections`, side by side in the last dimension."""
    if len(projections) == 1:
        return projections[0](x)
    return torch.cat([projection(x) for projection in projections], dim=-1)


class LayerWeights(NamedTuple):
    """One Llama layer; norms are ``(dim,)``."""

    input_norm: Tensor
    qkv: Projections
    o: Projection
    post_norm: Tensor
    gate_up: Projections
    down: Projection
    heads: int
    eps: float
    attention: str  # the backend of decode_attention


class T3Weights(NamedTuple):
    """What prefill or a decode step reads."""

    layers: tuple[LayerWeights, ...]
    norm: Tensor
    eps: float
    head: Projection  # (V, dim)
    speech_emb: Tensor  # (V, dim)
    speech_pos: Tensor  # (positions, dim)
    heads: int
    head_dim: int
    cache_dtype: torch.dtype  # of keys and values

    @property
    def vocabulary(self) -> int:
        """Ids there are."""
        return self.head.weight.shape[0]


class Packed(NamedTuple):
    """The weights of one T3. The two are the same where one copy serves both."""

    prefill: T3Weights
    decode: T3Weights


def pack(t3: Any, precise: Precise) -> Packed:
    """Packs the weights of a T3 that `why_unsupported` has nothing against.

    On a CPU prefill reads the model's own matrices in any precision: they stay where they are, and
    many rows at once are bound by arithmetic, which float32 does best.
    """
    with torch.inference_mode(False), torch.no_grad():
        if t3.device.type == "cuda":
            copied = _gather(t3, _Copied(t3, precise))
            return Packed(copied, copied)
        own = _gather(t3, _Own(t3, precise))
        if precise.precision == "exact":
            return Packed(own, own)
        return Packed(own, _gather(t3, _Copied(t3, precise)))


class _Own:
    """Makes projections of the parameters themselves."""

    def __init__(self, t3: Any, precise: Precise) -> None:
        self.kernel, self.attention = precise.kernel, _attention(t3, precise)
        self.cache_dtype = t3.speech_head.weight.dtype

    def __call__(self, *parameters: nn.Parameter) -> Projections:
        return tuple(Projection(p.detach(), None, self.kernel) for p in parameters)


class _Copied:
    """Makes one projection of a copy of the parameters, on the model's device."""

    def __init__(self, t3: Any, precise: Precise) -> None:
        self.kernel, self.attention = precise.kernel, _attention(t3, precise)
        self.dtype, self.device = precise.dtype, t3.device
        self.cache_dtype = self.dtype if self.dtype.is_floating_point else torch.bfloat16

    def __call__(self, *parameters: nn.Parameter) -> Projections:
        parts = [_narrow(parameter.detach(), self.dtype) for parameter in parameters]
        weight = torch.cat([weight.to(self.device) for weight, _ in parts])
        scales = [scale.to(self.device) for _, scale in parts if scale is not None]
        return (Projection(weight, torch.cat(scales) if scales else None, self.kernel),)


def _attention(t3: Any, precise: Precise) -> str:
    """The backend of decode_attention for this T3's heads."""
    return precise.attention if head_dim(t3.cfg) == ops.HEAD_DIM else "reference"


def _narrow(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """`weight` in `dtype`; int8 symmetric, with a scale ``(N,)`` for each row."""
    if dtype != torch.int8:
        return weight.to(dtype), None
    scale = weight.abs().amax(dim=1).float() / 127
    scale = torch.where(scale > 0, scale, 1.0)
    return (weight / scale[:, None]).round().to(torch.int8), scale


def _gather(t3: Any, make: _Own | _Copied) -> T3Weights:
    tfmr, heads = t3.tfmr, t3.cfg.num_attention_heads
    return T3Weights(
        layers=tuple(_layer(layer, heads, make) for layer in tfmr.layers),
        norm=tfmr.norm.weight.detach(),
        eps=tfmr.norm.variance_epsilon,
        head=make(t3.speech_head.weight)[0],
        speech_emb=t3.speech_emb.weight.detach(),
        speech_pos=t3.speech_pos_emb.emb.weight.detach(),
        heads=heads,
        head_dim=head_dim(t3.cfg),
        cache_dtype=make.cache_dtype,
    )


def _layer(layer: Any, heads: int, make: _Own | _Copied) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    norm = layer.input_layernorm
    return LayerWeights(
        input_norm=norm.weight.detach(),
        qkv=make(attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight),
        o=make(attention.o_proj.weight)[0],
        post_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=make(mlp.gate_proj.weight, mlp.up_proj.weight),
        down=make(mlp.down_proj.weight)[0],
        heads=heads,
        eps=norm.variance_epsilon,
        attention=make.attention,
    )


def send_to_host(tfmr: Any) -> None:
    """Keeps the layers' own matrices on the host; norms stay where they are."""
    _move_projections(tfmr, torch.device("cpu"))


def bring_home(tfmr: Any) -> None:
    """Undoes `send_to_host`: the layers' own matrices are where their norms are."""
    _move_projections(tfmr, tfmr.norm.weight.device)


def _move_projections(tfmr: Any, device: torch.device) -> None:
    with torch.inference_mode(False), torch.no_grad():
        for parameter in projection_weights(tfmr):
            if parameter.device != device:
                parameter.data = parameter.detach().to(device)


def signature(t3: Any) -> tuple[Any, ...]:
    """Changes when a parameter is replaced, moved, converted or written to.

    Writing through ``parameter.data`` goes unnoticed, as it does for autograd, and so does writing
    into a parameter that was made in inference mode.
    """
    return signature_of(t3.parameters())


def signature_of(parameters: Iterable[Tensor]) -> tuple[Any, ...]:
    """`signature` of the `parameters` alone."""
    return tuple(
        (p.data_ptr(), p.device, p.dtype, 0 if p.is_inference() else p._version) for p in parameters
    )


def bytes_of(weights: T3Weights) -> int:
    """Memory of the layers' matrices and the head."""
    projections = [weights.head]
    for layer in weights.layers:
        projections += [*layer.qkv, layer.o, *layer.gate_up, layer.down]
    return sum(p.weight.nbytes + (0 if p.scale is None else p.scale.nbytes) for p in projections)
