"""T3's parameters as a decode step reads them, in the precision that was chosen.

- On a CPU in ``exact`` precision they are the model's own tensors: its kernel reads them as they
  lie, at the speed of memory.
- Else they are a copy, with q, k and v (gate and up) fused: ``bf16``, ``fp16``, or ``int8`` with a
  scale a row; the KV cache is as narrow, with ``int8`` in bfloat16. Norms, embeddings, sums and,
  in a decode step, all that lies between the matrices stay in float32, which is why the error is
  smaller than that of a model converted as a whole.
- On a GPU the copy takes the place of the layers' own matrices. Those wait on the host, bit for
  bit, until `Originals.bring_home`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..memory import Arena
from ..precision import Precise, cpu_multiplies_bf16
from .projection import Norm, Projection, Projections
from .support import head_dim, projection_weights


class LayerWeights(NamedTuple):
    """One Llama layer."""

    input_norm: Norm
    qkv: Projections
    o: Projection
    post_norm: Norm
    gate_up: Projections
    down: Projection
    heads: int
    attention: str  # the backend of decode_attention


class T3Weights(NamedTuple):
    """What prefill or a decode step reads."""

    layers: tuple[LayerWeights, ...]
    norm: Norm
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


def pack(t3: Any, precise: Precise, attend_by: str) -> Packed:
    """Packs the weights of a T3 that `why_unsupported` has nothing against.

    On a CPU the model's own matrices stay where they are. Prefill's many rows, which arithmetic
    bounds, are multiplied in bfloat16 where the CPU does that, else in float32; int8's by the own
    matrices, which costs no more time than by those of int8, and is nearer to stock.

    Args:
        attend_by: the backend of decode_attention.
    """
    with torch.inference_mode(False), torch.no_grad():
        if t3.device.type == "cuda":
            copied = _gather(t3, _Copied(t3, precise), attend_by)
            return Packed(copied, copied)
        own = _gather(t3, _Own(t3, precise), attend_by)
        if precise.precision == "exact":
            return Packed(own, own)
        copied = _gather(t3, _Copied(t3, precise), attend_by)
        as_narrow = precise.dtype == own.head.many  # bf16, where prefill may compute in it
        return Packed(copied if as_narrow else own, copied)


class _Own:
    """Makes projections of the parameters themselves."""

    def __init__(self, t3: Any, precise: Precise) -> None:
        self.kernel = precise.linear.backend
        self.cache_dtype = self.many = t3.speech_head.weight.dtype
        on_cpu = t3.device.type == "cpu"
        if precise.precision != "exact" and on_cpu and cpu_multiplies_bf16():
            self.many = torch.bfloat16

    def __call__(self, *parameters: nn.Parameter) -> Projections:
        return tuple(Projection(p.detach(), None, self.kernel, self.many) for p in parameters)


class _Copied:
    """Makes one projection of a copy of the parameters, on the model's device."""

    def __init__(self, t3: Any, precise: Precise) -> None:
        self.kernel = precise.linear.backend
        self.dtype, self.device = precise.dtype, t3.device
        copied = [*projection_weights(t3.tfmr), t3.speech_head.weight]
        sizes = [parameter.numel() * self.dtype.itemsize for parameter in copied]
        self.arena = Arena(sizes, self.device)
        self.cache_dtype = self.dtype if self.dtype.is_floating_point else torch.bfloat16

    def __call__(self, *parameters: nn.Parameter) -> Projections:
        parts = [_narrow(parameter.detach(), self.dtype) for parameter in parameters]
        shape = sum(p.shape[0] for p in parameters), parameters[0].shape[1]
        weight = self.arena.cut(shape, self.dtype)
        torch.cat([weight.to(self.device) for weight, _ in parts], out=weight)
        scales = [scale.to(self.device) for _, scale in parts if scale is not None]
        scale = torch.cat(scales) if scales else None
        return (Projection(weight, scale, self.kernel, self.cache_dtype),)


def _narrow(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """`weight` in `dtype`; int8 symmetric, with a scale ``(N,)`` for each row.

    The scale of a row with a NaN or an infinity is no number either, so that its outputs are not.
    """
    if dtype != torch.int8:
        return weight.to(dtype), None
    scale = weight.abs().amax(dim=1).float() / 127
    scale = torch.where(scale == 0, 1.0, scale)
    steps = (weight / scale[:, None]).round().clamp(-127, 127)  # a tiny scale is rounded much
    return steps.nan_to_num(0).to(torch.int8), scale


def _gather(t3: Any, make: _Own | _Copied, attend_by: str) -> T3Weights:
    tfmr, heads = t3.tfmr, t3.cfg.num_attention_heads
    return T3Weights(
        layers=tuple(_layer(layer, heads, make, attend_by) for layer in tfmr.layers),
        norm=_norm(tfmr.norm),
        head=make(t3.speech_head.weight)[0],
        speech_emb=t3.speech_emb.weight.detach(),
        speech_pos=t3.speech_pos_emb.emb.weight.detach(),
        heads=heads,
        head_dim=head_dim(t3.cfg),
        cache_dtype=make.cache_dtype,
    )


def _layer(layer: Any, heads: int, make: _Own | _Copied, attend_by: str) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    return LayerWeights(
        input_norm=_norm(layer.input_layernorm),
        qkv=make(attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight),
        o=make(attention.o_proj.weight)[0],
        post_norm=_norm(layer.post_attention_layernorm),
        gate_up=make(mlp.gate_proj.weight, mlp.up_proj.weight),
        down=make(mlp.down_proj.weight)[0],
        heads=heads,
        attention=attend_by,
    )


def _norm(norm: Any) -> Norm:
    return Norm(norm.weight.detach(), norm.variance_epsilon)


class Originals(NamedTuple):
    """The layers' own matrices of a backbone, found once: a module may look otherwise later."""

    matrices: list[nn.Parameter]
    at_home: nn.Parameter  # it never leaves, and moves where the user moves the model

    @classmethod
    def of(cls, tfmr: Any) -> Originals:
        """Those of a backbone that `why_unsupported` has nothing against."""
        return cls(projection_weights(tfmr), tfmr.norm.weight)

    def send_to_host(self) -> None:
        """Keeps them on the host; norms and embeddings stay where they are."""
        self._move(torch.device("cpu"))

    def bring_home(self) -> None:
        """Undoes `send_to_host`, whatever has become of the model since."""
        self._move(self.at_home.device)

    def _move(self, device: torch.device) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for parameter in self.matrices:
                if parameter.device != device:
                    parameter.data = parameter.detach().to(device)


def bytes_of(weights: T3Weights) -> int:
    """Memory of the layers' matrices and the head."""
    projections = [weights.head]
    for layer in weights.layers:
        projections += [*layer.qkv, layer.o, *layer.gate_up, layer.down]
    return sum(p.weight.nbytes + (0 if p.scale is None else p.scale.nbytes) for p in projections)
