"""What the patched model keeps between requests for one T3: weights, buffers, graphs, voices."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .. import dispatch
from ..options import Options
from ..precision import choose_precision
from . import weights as packing
from .backbone import EAGER, compiled
from .decode_step import decode_step
from .graph import capture, why_no_graph
from .pool import Slot, SlotPool
from .prefill import VoicePrefix, VoicePrefixes, check_conditioning, voice_prefix
from .state import CAPACITIES, DecodeState


class Engine:
    """One T3, ready to speak. Immutable but for its caches; threads share it.

    Attributes:
        precise: the precision that was chosen, and why.
        weights: packed for prefill and for decoding.
        layers: the layer functions, eager or compiled.
        slots: buffers of requests.
        eager_because: why steps are not captured in a CUDA graph; None where they are.
    """

    def __init__(self, t3: Any, options: Options) -> None:
        own = t3.speech_head.weight.dtype
        self.device: torch.device = t3.device
        self.options = options
        self.precise = choose_precision(options, self.device, own)
        self.weights = packing.pack(t3, self.precise)
        self.layers = compiled() if options.compile else EAGER
        self.sampler = dispatch.choose("cfg_sample", self.device, options.backend, own).backend
        self.eager_because = why_no_graph(self.device, self.sampler)
        self.stop_token: int = t3.hp.stop_speech_token
        self.slots = SlotPool(self._new_slot)
        self._voices = VoicePrefixes()
        self._rotary = t3.tfmr.rotary_emb

    @property
    def replaces_originals(self) -> bool:
        """Whether the packed copy takes the place of the model's own matrices."""
        return self.device.type == "cuda"

    @property
    def draws_on_device(self) -> bool:
        """Whether the random state lives in device memory, where a kernel advances it."""
        return self.device.type == "cuda" and self.sampler != "reference"

    def voice(self, t3: Any, t3_cond: Any) -> VoicePrefix:
        """What the voice leaves in the KV cache; computed once.

        Raises:
            ValueError: see `check_conditioning`.
        """
        key = check_conditioning(t3, t3_cond)
        weights = self.weights.prefill
        return self._voices.get(
            key, lambda: voice_prefix(t3, t3_cond, weights, self.rotary, self.layers)
        )

    def rotary(self, positions: int) -> tuple[Tensor, Tensor]:
        """cos and sin ``(positions, D)``, computed by stock's own rotary module."""
        cos, sin = self._rotary_table
        return cos[:positions], sin[:positions]

    @functools.cached_property
    def _rotary_table(self) -> tuple[Tensor, Tensor]:
        index = torch.arange(CAPACITIES[-1], device=self.device)[None]
        cos, sin = self._rotary(self.weights.decode.speech_emb, index)
        return cos[0], sin[0]

    def clear(self) -> None:
        """Lets buffers, graphs and voices go; what requests use now stays theirs."""
        self.slots.clear()
        self._voices.clear()

    def _new_slot(self, rows: int, capacity: int) -> Slot:
        weights = self.weights.decode
        state = DecodeState.allocate(
            weights,
            self.rotary(capacity),
            rows=rows,
            stop_token=self.stop_token,
            backend=self.options.backend,
            philox=self.draws_on_device,
        )

        def eager(slots: int, generator: torch.Generator | None) -> None:
            decode_step(weights, state, slots, generator, self.layers)

        if self.eager_because is not None:
            return Slot(state, eager)
        replay = capture(lambda: eager(capacity, None), self.device)
        return Slot(state, lambda _slots, _generator: replay())


class Engines:
    """The engines of one patch: one for each module that runs the patched method.

    That is the T3 that was patched, and any deep copy of it.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._lock = Lock()
        self._of: WeakKeyDictionary[Any, tuple[Any, Engine]] = WeakKeyDictionary()

    def of(self, t3: Any) -> Engine:
        """The engine of `t3`; a new one where its weights have changed since the last request."""
        with self._lock:
            asked = dispatch.requested_backend(self._options.backend)
            known = self._of.get(t3)
            if known is not None and known[0] == (asked, packing.signature(t3)):
                return known[1]
            self._of.pop(t3, None)
            engine = Engine(t3, self._options)
            if engine.replaces_originals:
                packing.send_to_host(t3.tfmr)
            self._of[t3] = ((asked, packing.signature(t3)), engine)
            return engine

    def release(self, t3: Any) -> None:
        """Gives `t3` its own weights back, as they were before `of`."""
        with self._lock:
            self._of.pop(t3, None)
            packing.bring_home(t3.tfmr)


@contextmanager
def out_of_memory_is_clear(engine: Engine) -> Iterator[None]:
    """Where memory runs out in here: the engine's caches are freed, and the message says so."""
    try:
        yield
    except torch.OutOfMemoryError as failure:
        engine.clear()
        if engine.device.type == "cuda":
            torch.cuda.empty_cache()
        raise torch.OutOfMemoryError(
            f"chatterbox_fast: T3 ran out of memory on {engine.device}. Its cached buffers, graphs "
            "and voices are freed now, and the model is usable. Fewer requests at once, a shorter "
            f"text or precision='bf16' need less. ({failure})"
        ) from failure
