"""What the patched model keeps between requests for one T3: weights, buffers, graphs, voices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod

import torch
from torch import Tensor

from .. import dispatch, selftest
from ..graph import (
    CAPTURES,
    CaptureError,
    capture,
    free_cached,
    graph_settings,
    is_out_of_memory,
    settle,
    settle_all,
    why_no_graph,
)
from ..modules import Fingerprint, signature
from ..options import Options
from ..overrides import is_ours
from ..precision import choose_precision
from ..recent import Recent
from . import weights as packing
from .backbone import EAGER, compiled_layers
from .decode_step import decode_step
from .pool import Slot, SlotPool, kept_bytes
from .prefill import MOST_VOICES, VoicePrefix, check_conditioning, voice_prefix
from .state import CAPACITIES, DecodeState
from .support import head_dim


class Engine:
    """One T3, ready to speak. Immutable but for its caches; threads share it.

    Attributes:
        precise: the precision that was chosen, and why.
        choices: what runs each op, and why.
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
        self.choices = {
            "cfg_sample": selftest.choose("cfg_sample", self.device, options.backend, own),
            "skinny_linear": self.precise.linear,
            "decode_attention": selftest.choose_attention(
                "decode_attention", head_dim(t3.cfg), self.device, options.backend, own
            ),
        }
        attention = self.choices["decode_attention"].backend
        self.weights = packing.pack(t3, self.precise, attention)
        settle(self.device)
        self.layers = compiled_layers() if options.compile else EAGER
        self.eager_because = why_no_graph(self.device)
        if self.eager_because is None and self.sampler == "reference":
            # Its generator's state would be frozen into the graph.
            self.eager_because = "the reference draws from a generator"
        self.stop_token: int = t3.hp.stop_speech_token
        new_slot = WeakMethod(self._new_slot)  # no cycle: an engine's memory is freed with it

        def make(rows: int, capacity: int) -> Slot:
            return new_slot()(rows, capacity)  # type: ignore[misc]

        self.slots = SlotPool(make, kept_bytes(self.device))
        self._voices: Recent[tuple[Fingerprint, bytes], VoicePrefix] = Recent(MOST_VOICES)
        self._conditioning = Fingerprint(t3.cond_enc)
        self._rotary = t3.tfmr.rotary_emb

    @property
    def sampler(self) -> str:
        """The backend of cfg_sample."""
        return self.choices["cfg_sample"].backend

    @property
    def replaces_originals(self) -> bool:
        """Whether the packed copy takes the place of the model's own matrices."""
        return self.device.type == "cuda"

    @property
    def draws_on_device(self) -> bool:
        """Whether the random state lives in device memory, where a kernel advances it."""
        return self.device.type == "cuda" and self.sampler != "reference"

    def voice(self, t3: Any, t3_cond: Any, key: bytes | None = None) -> VoicePrefix:
        """What the voice leaves in the KV cache; computed once, and again where what makes it has
        changed.

        Args:
            key: what `check_conditioning` returned for it, where it was asked before.

        Raises:
            ValueError: see `check_conditioning`.
        """

        def make() -> VoicePrefix:
            weights = self.weights.prefill
            prefix = voice_prefix(t3, t3_cond, weights, self.rotary, self.layers)
            settle(self.device)
            return prefix

        key = key or check_conditioning(t3, t3_cond)
        made_by = self._conditioning
        if not made_by.is_still(t3.cond_enc):
            made_by = self._conditioning = Fingerprint(t3.cond_enc)
        return self._voices.get((made_by, key), make)

    def rotary(self, positions: int) -> tuple[Tensor, Tensor]:
        """cos and sin ``(positions, D)``, computed by stock's own rotary module."""
        cos, sin = self._rotary_table
        return cos[:positions], sin[:positions]

    @functools.cached_property
    def _rotary_table(self) -> tuple[Tensor, Tensor]:
        index = torch.arange(CAPACITIES[-1], device=self.device)[None]
        cos, sin = self._rotary(self.weights.decode.speech_emb, index)
        settle(self.device)
        return cos[0], sin[0]

    def clear(self) -> None:
        """Lets buffers, graphs and voices go; what requests use now stays theirs."""
        self.slots.clear()
        self._voices.clear()
        free_cached(self.device)

    def _new_slot(self, rows: int, capacity: int) -> Slot:
        weights, layers = self.weights.decode, self.layers
        state = DecodeState.allocate(
            weights,
            self.rotary(capacity),
            rows=rows,
            stop_token=self.stop_token,
            sampler=self.sampler,
            philox=self.draws_on_device,
        )

        def eager(slots: int, generator: torch.Generator | None) -> None:
            decode_step(weights, state, slots, generator, layers)

        if self.eager_because is not None:
            return Slot(state, eager)
        replay = self._capture(lambda: eager(capacity, None))
        return Slot(state, eager if replay is None else lambda _slots, _generator: replay())

    def _capture(self, step: Callable[[], None]) -> Callable[[], None] | None:
        """`step` as a graph; None where that fails time and again, and then nothing is captured."""
        said = ""
        for _ in range(CAPTURES):
            try:
                return capture(step, self.device)
            except CaptureError as failure:
                said = str(failure)
        self.eager_because = said
        return None


class Engines:
    """The engine of one patch's T3, made anew where that T3 changes. It does not keep it alive."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._lock = Lock()
        self._of: WeakKeyDictionary[Any, tuple[Any, Engine]] = WeakKeyDictionary()
        self._sent: packing.Originals | None = None
        self._at_home = False

    def of(self, t3: Any) -> Engine:
        """The engine of `t3`; a new one where its weights have changed since the last request.

        Raises:
            torch.OutOfMemoryError: the weights could not be packed.
        """
        with self._lock:
            asked = dispatch.requested_backend(self._options.backend), graph_settings()
            known, engine = self._of.get(t3, (None, None))
            if engine is not None and known == (asked, signature(t3)):
                return engine
            if engine is not None:
                settle_all(engine.device)
            del engine, known  # their memory is the new one's
            self._of.pop(t3, None)
            try:
                engine = self._new(t3)
            except RuntimeError as failure:
                if not is_out_of_memory(failure):
                    raise
                said = str(failure)
            else:
                self._of[t3] = ((asked, signature(t3)), engine)
                return engine
            raise out_of_memory(t3.device, said)

    def _new(self, t3: Any) -> Engine:
        engine = Engine(t3, self._options)
        if engine.replaces_originals and self._may_send(t3.tfmr):
            self._sent = packing.Originals.of(t3.tfmr)
            self._sent.send_to_host()
        return engine

    def _may_send(self, tfmr: Any) -> bool:
        """Whether a backbone's weights may wait on the host: somebody brings them home for others.

        Once they were needed they stay, so that they never move under somebody's forward.
        """
        return not self._at_home and is_ours(vars(tfmr).get("forward"))

    def bring_home(self) -> None:
        """Brings the weights that wait on the host to where they belong, for good."""
        with self._lock:
            self._bring_home()

    def release(self, t3: Any) -> None:
        """Gives `t3` its own weights back, as they were before `of`, for good."""
        with self._lock:
            _, engine = self._of.pop(t3, (None, None))
            if engine is not None:
                settle_all(engine.device)
                engine.clear()
                del engine
            self._bring_home()

    def _bring_home(self) -> None:
        self._at_home = True
        if self._sent is not None:
            self._sent.bring_home()
            self._sent = None


def out_of_memory(device: torch.device, said: str) -> torch.OutOfMemoryError:
    """The error to raise, once the request is gone and what was kept for others is cleared.

    Args:
        said: torch's own message. Not its exception, which keeps the request's buffers alive.
    """
    free_cached(device)
    return torch.OutOfMemoryError(
        f"chatterbox_fast: T3 ran out of memory on {device}. Its cached buffers, graphs and "
        "voices are freed now, and the model is usable. Fewer requests at once, a shorter text or "
        f"precision='bf16' need less. ({said})"
    )
