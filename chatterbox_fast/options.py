"""Every switch of `patch`, its default, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

Precision = Literal["auto", "exact", "bf16", "fp16", "int8"]
Backend = Literal["auto", "cuda", "triton", "reference"]


@dataclass(frozen=True)
class Options:
    """Switches of `chatterbox_fast.patch`; all have a safe default.

    Attributes:
        precision: ``"exact"`` is the model's own dtype and gives stock's tokens for the same seed.
            ``"bf16"``, ``"fp16"`` and ``"int8"`` store T3's matrices in that, and its KV cache in
            half precision: faster, less memory, other tokens. S3Gen's matrices are in half
            precision with all three on a GPU, and in bfloat16 with bf16 and int8 on a CPU that
            multiplies it. ``"auto"`` is exact on a CPU, bf16 on a GPU that has it, else fp16. Where
            a device gains nothing from one, exact runs, and report() says why.
        backend: which implementation of each op to prefer; ``"auto"``, as ``"cuda"``, takes the
            extension (C++ on a CPU), else Triton, else plain torch, in which int8, and on a CPU
            bf16, are not to be had. `CHATTERBOX_FAST_BACKEND` overrides it.
        compile: True runs T3's layers, the flow's blocks and the vocoder under torch.compile: the
            first request takes minutes longer.
        watermark: False leaves out Perth's watermark (stock always applies it).
        progress: True shows stock's progress bar.
        strict: True raises where a site would otherwise be left to stock with a reason.
    """

    precision: Precision = "auto"
    backend: Backend = "auto"
    compile: bool = False
    watermark: bool = True
    progress: bool = False
    strict: bool = False

    @classmethod
    def of(cls, **switches: Any) -> Options:
        """Builds options from keywords as a user writes them.

        Raises:
            TypeError: an unknown switch, or a switch that must be a bool and is not.
            ValueError: a precision or backend that does not exist.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(switches) - set(known)):
            raise TypeError(
                f"chatterbox_fast.patch: unknown option {', '.join(map(repr, unknown))}; "
                f"the options are {', '.join(known)}"
            )
        options = cls(**switches)
        options._check()
        return options

    def _check(self) -> None:
        for name, choices in (("precision", get_args(Precision)), ("backend", get_args(Backend))):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(
                    f"chatterbox_fast.patch: {name} must be one of {', '.join(choices)}, "
                    f"got {value!r}"
                )
        for name in ("compile", "watermark", "progress", "strict"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(
                    f"chatterbox_fast.patch: {name} must be True or False, got {value!r}"
                )
