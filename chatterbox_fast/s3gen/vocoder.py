"""HiFT, the vocoder: mel -> F0 -> harmonic source -> waveform.

The same numbers as stock's `HiFTGenerator` up to rounding, and where F0 is equal the very same
source: weight norm is folded, sequences are ``(B, T, C)``, the STFT is one matrix product and the
inverse one op, and what is drawn comes in from outside. Pure functions of tensors: no value is read
on the host.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .layers import (
    Linear,
    SequenceConv,
    SequenceConvTranspose,
    in_dtype,
    linear,
    saturated,
    sequence_conv,
    sequence_conv_transpose,
)

N_FFT, HOP = 16, 4
BINS = N_FFT // 2 + 1


class Snake(NamedTuple):
    """x + sin(alpha x)^2 / alpha, and what comes before it in the same op.

    Attributes:
        alpha, inverse: ``(C,)``.
        offset: ``(C,)``, the bias of the convolution before, added here as cuDNN would in a pass of
            its own; None is none.
        by: the backend of `snake`.
    """

    alpha: Tensor
    inverse: Tensor
    offset: Tensor | None
    by: str

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``(B, T, C)``, as x, which is added to the residual first, in place."""
        # A convolution without cuDNN or oneDNN leaves it in another order.
        x = x.contiguous()
        return ops.snake_by(self.by)(x, self.alpha, self.inverse, residual, self.offset)


class ResBlock(NamedTuple):
    """Snake, dilated convolution, Snake, convolution, around which x goes; several of them.

    Of the convolutions the last alone has its bias: the Snake after it has a convolution's.
    """

    layers: tuple[tuple[Snake, SequenceConv, Snake, SequenceConv], ...]

    def __call__(self, x: Tensor) -> Tensor:
        """``(B, T, C)``, as x, which may be changed."""
        x = x.contiguous()
        (snake1, conv1, snake2, conv2), *others = self.layers
        part = conv2.unbounded(snake2(conv1.unbounded(snake1(x))))
        for snake1, conv1, snake2, conv2 in others:
            part = conv2.unbounded(snake2(conv1.unbounded(snake1(part, x))))
        return saturated(x.add_(part))


class Upsampling(NamedTuple):
    """A transposed convolution, the source's share, and the mean of residual blocks."""

    up: SequenceConvTranspose
    source_down: SequenceConv
    source_block: ResBlock
    blocks: tuple[ResBlock, ...]


class VocoderWeights(NamedTuple):
    """The layers, and stock's constants.

    Attributes:
        f0_convs, f0_head: mel to F0.
        merge: harmonics to one excitation.
        harmonics: ``(H,)``, 1 for the fundamental, 2 for its first overtone, ...
        analysis: ``(16, 18)``, window and Fourier transform, real parts and then imaginary ones.
        window: ``(16,)``, of both transforms.
        upsample: samples a mel frame.
        slope: of the leaky ReLUs but the last.
        istft: the backend of the op of that name.
        limit: the loudest sample.
    """

    f0_convs: tuple[SequenceConv, ...]
    f0_head: Linear
    merge: Linear
    harmonics: Tensor
    conv_pre: SequenceConv
    stages: tuple[Upsampling, ...]
    conv_post: SequenceConv
    analysis: Tensor
    window: Tensor
    istft: str
    upsample: int
    slope: float
    limit: float
    sine: SineConstants


class SineConstants(NamedTuple):
    """What stock's `SineGen` is set to: Hz, amplitudes, Hz."""

    rate: int
    amplitude: float
    noise: float
    threshold: float


class Draws(NamedTuple):
    """What is random in a source.

    Attributes:
        phase: ``(B, H, 1)``, each harmonic's phase at the start, the fundamental's 0.
        noise: ``(B, H, L)``, normal.
    """

    phase: Tensor
    noise: Tensor


def pack_vocoder(
    mel2wav: Any,
    dtype: torch.dtype | None = None,
    *,
    snake: str = "reference",
    istft: str = "reference",
) -> VocoderWeights:
    """The weights of a `HiFTGenerator` that `why_vocoder_unsupported` has nothing against.

    Args:
        dtype: of the matrices between mel and spectrum; None is the model's own. F0, source,
            spectra and what makes the last one stay in that.
        snake, istft: the backends of the ops of those names.
    """
    generator, weight = mel2wav.m_source.l_sin_gen, mel2wav.conv_pre.weight
    kernels = mel2wav.num_kernels
    stages = [
        Upsampling(
            up=sequence_conv_transpose(up),
            source_down=sequence_conv(mel2wav.source_downs[i]),
            source_block=_res_block(mel2wav.source_resblocks[i], snake),
            blocks=tuple(
                _res_block(block, snake)
                for block in mel2wav.resblocks[i * kernels : (i + 1) * kernels]
            ),
        )
        for i, up in enumerate(mel2wav.ups)
    ]
    window = mel2wav.stft_window.double()
    weights = VocoderWeights(
        f0_convs=tuple(sequence_conv(each) for each in mel2wav.f0_predictor.condnet[::2]),
        f0_head=linear(mel2wav.f0_predictor.classifier)._replace(onednn=False),  # as stock rounds
        merge=linear(mel2wav.m_source.l_linear)._replace(onednn=False),
        harmonics=torch.arange(1, generator.harmonic_num + 2, device=weight.device),
        conv_pre=sequence_conv(mel2wav.conv_pre),
        stages=tuple(stages),
        conv_post=sequence_conv(mel2wav.conv_post),
        analysis=_analysis(window).to(weight),
        window=window.to(weight),
        istft=istft,
        upsample=int(mel2wav.f0_upsamp.scale_factor),
        slope=mel2wav.lrelu_slope,
        limit=mel2wav.audio_limit,
        sine=SineConstants(
            generator.sampling_rate,
            generator.sine_amp,
            generator.noise_std,
            generator.voiced_threshold,
        ),
    )
    if dtype is None:
        return weights
    return weights._replace(
        conv_pre=in_dtype(weights.conv_pre, dtype), stages=in_dtype(weights.stages, dtype)
    )


def _res_block(module: Any, by: str) -> ResBlock:
    parts = (module.activations1, module.convs1, module.activations2, module.convs2)
    layers, offset = [], None
    for snake1, module1, snake2, module2 in zip(*parts, strict=True):
        conv1, conv2 = sequence_conv(module1), sequence_conv(module2)
        layers.append(
            (
                _snake(snake1, offset, by),
                conv1._replace(bias=None),
                _snake(snake2, conv1.bias, by),
                conv2._replace(bias=None),
            )
        )
        offset = conv2.bias
    layers[-1] = (*layers[-1][:3], layers[-1][3]._replace(bias=offset))
    return ResBlock(tuple(layers))


def _snake(module: Any, offset: Tensor | None, by: str) -> Snake:
    alpha = module.alpha.detach()
    return Snake(alpha, 1.0 / (alpha + module.no_div_by_zero), offset, by)


def _analysis(window: Tensor) -> Tensor:
    # Sample times frequency, in radians.
    samples, bins = (torch.arange(count, device=window.device) for count in (N_FFT, BINS))
    angles = 2 * math.pi / N_FFT * (torch.outer(samples, bins) % N_FFT).to(window)
    return window[:, None] * torch.cat([angles.cos(), -angles.sin()], dim=1)


def f0(weights: VocoderWeights, mel: Tensor) -> Tensor:
    """F0 in Hz, ``(B, T)``, of mel ``(B, T, 80)``; in float32 on a GPU too.

    Its errors add up in the phase, for seconds. Those of the other convolutions do not: as stock's,
    they follow torch's own flags.
    """
    for conv in weights.f0_convs:
        mel = F.elu(conv.as_product(mel) if mel.is_cuda else conv(mel), inplace=True)
    return weights.f0_head(mel).squeeze(-1).abs()


def source(weights: VocoderWeights, pitch: Tensor, draws: Draws) -> Tensor:
    """The excitation ``(B, 1, L)`` of F0 ``(B, T)``: harmonics where it is voiced, noise elsewhere.

    Until the sum over time all is computed a frame, not a sample, at a time: it is constant there.
    """
    sine = weights.sine
    # Stock's order of operations: the phase is the sum of 24,000 of these a second.
    step = pitch[:, None] * weights.harmonics[:, None] / sine.rate
    phase = step.repeat_interleave(weights.upsample, dim=-1).cumsum(-1)
    phase = phase.remainder_(1).mul_(2 * math.pi).add_(draws.phase)
    waves = phase.sin_().mul_(sine.amplitude)
    voiced = (pitch > sine.threshold).to(pitch.dtype)[:, None]
    loudness = voiced * sine.noise + (1 - voiced) * sine.amplitude / 3
    frames = (-1, weights.upsample)
    waves = waves.unflatten(-1, frames).mul_(voiced[..., None])
    waves = waves.add_(draws.noise.unflatten(-1, frames) * loudness[..., None]).flatten(-2)
    return weights.merge(waves.transpose(1, 2)).tanh_().transpose(1, 2)


def decode(weights: VocoderWeights, mel: Tensor, excitation: Tensor) -> Tensor:
    """The waveform ``(B, L)`` of mel ``(B, T, 80)`` and its excitation ``(B, 1, L)``."""
    spectrum = stft(weights, excitation.squeeze(1))
    x = weights.conv_pre(mel)
    for stage in weights.stages:
        x = stage.up(F.leaky_relu(x, weights.slope))
        if stage is weights.stages[-1]:
            x = torch.cat([x[:, 1:2], x], dim=1)  # one reflected sample: as long as the spectrum
        x = saturated(x.add_(stage.source_block(stage.source_down(spectrum))))
        *others, last = stage.blocks
        total = None
        for block in others:
            own = block(x.clone())
            total = own if total is None else saturated(total.add_(own))
        x = saturated(total.add_(last(x))) if total is not None else last(x)
        x = x.div_(len(stage.blocks))
    spectrum = weights.conv_post(F.leaky_relu(x)).contiguous()
    return ops.istft_by(weights.istft)(spectrum, weights.window, weights.limit)


def stft(weights: VocoderWeights, wave: Tensor) -> Tensor:
    """``torch.stft`` of ``(B, L)``: ``(B, L / 4 + 1, 18)``, real parts and then imaginary ones."""
    padded = F.pad(wave[:, None], (N_FFT // 2, N_FFT // 2), mode="reflect").squeeze(1)
    return padded.unfold(1, N_FFT, HOP) @ weights.analysis
