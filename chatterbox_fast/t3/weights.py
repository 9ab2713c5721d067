"""T3's parameters as a decode step reads them: fused, and in the precision that was chosen.

- ``exact``: the model's own values. q, k and v (gate and up) become views of one fused matrix, so
  that nothing is stored twice and whatever is written into a parameter is seen by the engine.
- ``bf16``, ``fp16``, ``int8`` (with a scale a row): a rounded copy of the layers' matrices and the
  head. Norms, embeddings, sums and all that lies between the matrices stay in float32, which is
  why the error is smaller than that of a model converted as a whole. On a GPU the copy takes the
  place of the layers' own matrices, which wait on the host, bit for bit, until `bring_home`.
"""

from __future__ import annotations

from collections.abc import Sequence
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


class LayerWeights(NamedTuple):
    """One Llama layer; norms are ``(dim,)``."""

    input_norm: Tensor
    qkv: Projection
    o: Projection
    post_norm: Tensor
    gate_up: Projection
    down: Projection
    heads: int
    eps: float


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

    On a CPU prefill always reads the model's own matrices: there they stay where they are, and many
    rows at once are bound by arithmetic, which float32 does best.
    """
    with torch.inference_mode(False), torch.no_grad():
        if precise.precision == "exact":
            own = _gather(t3, _Share(t3, precise))
            return Packed(own, own)
        narrow = _gather(t3, _Narrow(t3, precise))
        if t3.device.type == "cuda":
            return Packed(narrow, narrow)
        return Packed(_gather(t3, _Share(t3, precise)), narrow)


class _Share:
    """Makes a projection of the parameters themselves, fused where there are several."""

    def __init__(self, t3: Any, precise: Precise) -> None:
        self.kernel = precise.kernel
        self.cache_dtype = t3.speech_head.weight.dtype

    def __call__(self, *parameters: nn.Parameter) -> Projection:
        return Projection(fuse(parameters), None, self.kernel)


class _Narrow:
    """Makes a projection of a copy in fewer bits, on the model's device."""

    def __init__(self, t3: Any, precise: Precise) -> None:
        self.kernel, self.dtype, self.device = precise.kernel, precise.dtype, t3.device
        # A CPU's attention is fastest in float32; a GPU reads half the bytes.
        on_gpu = self.device.type == "cuda"
        floating = self.dtype if self.dtype.is_floating_point else torch.bfloat16
        self.cache_dtype = floating if on_gpu else torch.float32

    def __call__(self, *parameters: nn.Parameter) -> Projection:
        parts = [_narrow(parameter.detach(), self.dtype) for parameter in parameters]
        weight = torch.cat([weight.to(self.device) for weight, _ in parts])
        scales = [scale.to(self.device) for _, scale in parts if scale is not None]
        return Projection(weight, torch.cat(scales) if scales else None, self.kernel)


def _narrow(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """`weight` in `dtype`; int8 symmetric, with a scale ``(N,)`` for each row."""
    if dtype != torch.int8:
        return weight.to(dtype), None
    scale = weight.abs().amax(dim=1).float() / 127
    scale = torch.where(scale > 0, scale, 1.0)
    return (weight / scale[:, None]).round().to(torch.int8), scale


def _gather(t3: Any, projection: _Share | _Narrow) -> T3Weights:
    tfmr, heads = t3.tfmr, t3.cfg.num_attention_heads
    return T3Weights(
        layers=tuple(_layer(layer, heads, projection) for layer in tfmr.layers),
        norm=tfmr.norm.weight.detach(),
        eps=tfmr.norm.variance_epsilon,
        head=projection(t3.speech_head.weight),
        speech_emb=t3.speech_emb.weight.detach(),
        speech_pos=t3.speech_pos_emb.emb.weight.detach(),
        heads=heads,
        head_dim=head_dim(t3.cfg),
        cache_dtype=projection.cache_dtype,
    )


def _layer(layer: Any, heads: int, projection: _Share | _Narrow) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    norm = layer.input_layernorm
    return LayerWeights(
        input_norm=norm.weight.detach(),
        qkv=projection(attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight),
        o=projection(attention.o_proj.weight),
        post_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=projection(mlp.gate_proj.weight, mlp.up_proj.weight),
        down=projection(mlp.down_proj.weight),
        heads=heads,
        eps=norm.variance_epsilon,
    )


def fuse(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The matrices ``(N_i, K)`` on top of each other; the parameters become views of the result.

    Parameters that already are such views are left alone.
    """
    first = parameters[0]
    if len(parameters) == 1:
        return first.detach()
    rows, inputs = sum(len(p) for p in parameters), first.shape[1]
    if not _are_fused(parameters):
        fused = torch.cat([p.detach() for p in parameters])
        start = 0
        for parameter in parameters:
            parameter.data = fused[start : start + len(parameter)]
            start += len(parameter)
    return first.detach().as_strided((rows, inputs), (inputs, 1))


def _are_fused(parameters: Sequence[nn.Parameter]) -> bool:
    expected = parameters[0].data_ptr()
    storage = parameters[0].untyped_storage().data_ptr()
    for parameter in parameters:
        if not parameter.is_contiguous() or parameter.data_ptr() != expected:
            return False
        if parameter.untyped_storage().data_ptr() != storage:
            return False
        expected += parameter.nbytes
    return True


def separate(tfmr: Any) -> None:
    """Undoes `fuse`: every matrix of the layers has its own memory again, with the same values."""
    with torch.inference_mode(False), torch.no_grad():
        for parameter in projection_weights(tfmr):
            if parameter.untyped_storage().nbytes() != parameter.nbytes:
                parameter.data = parameter.detach().clone()


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

    Writing through ``parameter.data`` alone goes unnoticed, as it does for autograd.
    """
    return tuple(
        (p.data_ptr(), p.device, p.dtype, 0 if p.is_inference() else p._version)
        for p in t3.parameters()
    )


def bytes_of(weights: T3Weights) -> int:
    """Memory of the layers' matrices and the head."""
    projections = [weights.head]
    for layer in weights.layers:
        projections += [layer.qkv, layer.o, layer.gate_up, layer.down]
    return sum(p.weight.nbytes + (0 if p.scale is None else p.scale.nbytes) for p in projections)
