"""What the patched model keeps between requests for one S3Gen: packed weights, tables, graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from threading import Lock
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import LayerNorm

from .. import selftest
from ..compiling import Compiled
from ..dispatch import Choice, requested_backend
from ..graph import (
    CAPTURES,
    CaptureError,
    Pool,
    capture,
    free_cached,
    graph_settings,
    settle,
    settle_all,
    why_no_graph,
)
from ..modules import Fingerprint
from ..options import Options
from ..precision import choose_float
from ..recent import Recent
from .bucket import Bucket, Flow, bucket_for
from .encoder import encode, pack_encoder
from .flow import (
    EAGER,
    Kernels,
    TimeTable,
    compiled_blocks,
    condition,
    for_compiler,
    pack_flow,
    solve,
    time_table,
)
from .vocoder import decode, pack_vocoder

TABLES = 4
"""Numbers of Euler steps whose tables are kept."""
BUCKETS = 24
"""Captured sizes that are kept, as many as there are for one number of steps: 2 to 20 s of audio
after a prompt of 10 s are eight already. What they compute on the way they share."""


class FlowEngine:
    """The flow of one S3Gen, tokens to mel. Immutable but for its caches; threads share it.

    Attributes:
        precision, why: what the matrices are stored in, and why.
        padded, add_norm: what runs `padded_attention` and `add_norm`, and why.
        encoder, solver: the weights.
        blocks: what runs the estimator's blocks, eager or compiled.
        eager_because: why nothing is captured in a CUDA graph; None where it is.
    """

    def __init__(self, flow: Any, options: Options) -> None:
        weight = flow.encoder_proj.weight
        self.device: torch.device = weight.device
        self.precision, dtype, self.why = choose_float(options, self.device, weight.dtype)
        narrow = None if dtype == weight.dtype else dtype
        attention = flow.decoder.estimator.mid_blocks[0][1][0].attn1
        width = attention.to_q.out_features // attention.heads
        self.padded = selftest.choose_attention(
            "padded_attention", width, self.device, options.backend, dtype
        )
        self.add_norm = selftest.choose_add_norm(
            _widest_norm(flow), self.device, options.backend, weight.dtype
        )
        self.encoder = pack_encoder(flow, narrow, self.add_norm.backend)
        kernels = Kernels(self.padded.backend, self.add_norm.backend)
        self.solver = pack_flow(flow.decoder, narrow, kernels)
        if options.compile:
            self.solver = for_compiler(self.solver)
            why = f"{self.add_norm.reason}; torch's own in the blocks that torch.compile is given"
            self.add_norm = self.add_norm._replace(reason=why)
        self.blocks = compiled_blocks() if options.compile else EAGER
        self.eager_because = why_no_graph(self.device)
        self._pool = self._new_pool()
        self._decoder = flow.decoder
        self._tables: Recent[int, TimeTable] = Recent(TABLES)
        self._buckets: Recent[tuple[int, int], Bucket] = Recent(BUCKETS)
        self._too_large: set[tuple[int, int]] = set()
        self._failed_captures: Counter[tuple[int, int]] = Counter()
        self._turn = Lock()
        self._done: torch.cuda.Event | None = None
        settle(self.device)

    @property
    def without_room(self) -> str | None:
        """Which utterances run eagerly, as there is no memory for their graph; None: all have."""
        if not (keys := sorted(self._too_large.copy())):
            return None
        sizes = ", ".join(f"{tokens} tokens in {steps} steps" for tokens, steps in keys)
        return f"no memory for a graph of {sizes}"

    def table(self, n_timesteps: int) -> TimeTable:
        """The time table of `n_timesteps` Euler steps."""

        def make() -> TimeTable:
            with torch.inference_mode(False), torch.no_grad():
                table = time_table(self._decoder, n_timesteps)
            settle(self.device)
            return table

        return self._tables.get(n_timesteps, make)

    def mel(
        self, tokens: Tensor, speaker: Tensor, prompt: Tensor, noise: Tensor, n_timesteps: int
    ) -> Tensor:
        """Mel ``(B, T, 80)``, where T is at most two frames a token.

        Args:
            tokens: ``(B, N)`` int64.
            speaker: ``(B, 80)``, projected.
            prompt: ``(B, P, 80)``, the voice's mel, P <= T.
            noise: ``(B, T, 80)``.
            n_timesteps: Euler steps.
        """
        size = bucket_for(tokens.shape[1]) if len(tokens) == 1 else None
        if self.eager_because is None and size is not None:
            mel = self._captured((size, n_timesteps), tokens, speaker, prompt, noise)
            if mel is not None:
                return mel
        frames = noise.shape[1]
        mu = encode(self.encoder, tokens)[:, :frames]
        prompt = F.pad(prompt, (0, 0, 0, frames - prompt.shape[1]))
        return self.solve(mu, speaker, prompt, noise, n_timesteps)

    def solve(
        self, mu: Tensor, speaker: Tensor, prompt: Tensor, noise: Tensor, n_timesteps: int
    ) -> Tensor:
        """The solver alone; mu, speaker and prompt as `condition` takes them."""
        given = condition(self.solver, mu, speaker, prompt)
        lengths = self._lengths(len(given.conv), noise.shape[1])
        return solve(self.solver, self.table(n_timesteps), given, noise, lengths, self.blocks)

    def _lengths(self, rows: int, frames: int) -> Tensor | None:
        """What asks for `padded_attention` though nothing is padded: on a CPU it is the fastest."""
        if self.device.type != "cpu" or self.padded.backend != "extension":
            return None
        return torch.full((rows,), frames, dtype=torch.int32, device=self.device)

    def _captured(self, key: tuple[int, int], *inputs: Tensor) -> Tensor | None:
        """The mel by a graph; None where there is none of that size and steps.

        One at a time: they share the memory of what they compute.
        """
        with self._turn:
            if key in self._too_large or self.eager_because is not None:
                return None
            if self._done is not None:
                torch.cuda.current_stream(self.device).wait_event(self._done)
            if (bucket := self._bucket(key)) is None:
                return None
            try:
                return bucket.mel(*inputs)
            finally:
                if self.device.type == "cuda":
                    self._done = torch.cuda.current_stream(self.device).record_event()

    def _capture_failed(self, key: tuple[int, int], why: str) -> None:
        """Lets all graphs go, whose pool takes no other then; after some in a row for good."""
        self._failed_captures[key] += 1
        if self._failed_captures[key] == CAPTURES:
            self.eager_because = why
        settle_all(self.device)
        self._forget()

    def _forget(self) -> None:
        self._buckets.clear()
        self._pool = self._new_pool()  # torch takes none again whose graphs are all gone
        free_cached(self.device)

    def _bucket(self, key: tuple[int, int]) -> Bucket | None:
        """A bucket, if need be in place of all others; None where even that is not enough, or where
        its capture failed.
        """

        def make() -> Bucket:
            settle(self.device)  # what is forgotten in its favour may still run
            size, n_timesteps = key
            flow = Flow(self.encoder, self.solver, self.table(n_timesteps), self.blocks)
            return Bucket(flow, size, lambda step: capture(step, self.device, self._pool))

        while True:
            said = None
            try:
                bucket = self._buckets.get(key, make)
                self._failed_captures[key] = 0
                return bucket
            except torch.OutOfMemoryError:
                alone = len(self._buckets) == 0
            except CaptureError as failure:
                said = str(failure)
            # Not before the exception is gone, which keeps the half-made bucket alive.
            if said is not None:
                self._capture_failed(key, said)
                return None
            self._forget()
            if alone:
                self._too_large.add(key)
                return None

    def _new_pool(self) -> Pool | None:
        return Pool(self.device) if self.device.type == "cuda" else None


def _widest_norm(flow: Any) -> int:
    """The channels of the widest layer norm."""
    return max(each.weight.numel() for each in flow.modules() if isinstance(each, LayerNorm))


class VocoderEngine:
    """The vocoder of one S3Gen, mel to audio. Immutable; threads share it.

    Attributes:
        device: of its weights.
        precision, why: what the matrices are stored in, and why.
        snake, istft: what runs the ops of those names, and why.
        weights: the weights.
        decode: from mel and source to audio, eager or compiled: one graph for any length, as its
            residual blocks are of twelve kinds.
    """

    def __init__(self, mel2wav: Any, options: Options) -> None:
        weight = mel2wav.conv_pre.weight
        self.device: torch.device = weight.device
        self.precision, dtype, self.why = choose_float(options, self.device, weight.dtype)
        narrow = None if dtype == weight.dtype else dtype
        self.snake = selftest.choose("snake", self.device, options.backend, dtype)
        if options.compile:
            self.snake = Choice("reference", "torch.compile fuses it with what is around it")
        # The spectrum is float32 whatever the precision.
        self.istft = selftest.choose("istft", self.device, options.backend, weight.dtype)
        self.weights = pack_vocoder(
            mel2wav, narrow, snake=self.snake.backend, istft=self.istft.backend
        )
        self.decode = Compiled(decode) if options.compile else decode
        settle(self.device)


Engine = TypeVar("Engine")


class Engines(Generic[Engine]):
    """The engine of one patch's module, made anew where that module changes.

    It does not keep the module alive.
    """

    def __init__(
        self,
        make: Callable[[Any, Options], Engine],
        why_unsupported: Callable[[Any], str | None],
        options: Options,
    ) -> None:
        self._make, self._why_unsupported = make, why_unsupported
        self._options = options
        self._lock = Lock()
        self._of: WeakKeyDictionary[Any, tuple[Any, Fingerprint, Engine | str]]
        self._of = WeakKeyDictionary()

    def of(self, module: Any) -> Engine | str:
        """The engine of `module`, or why stock must run.

        Looked into anew where anything about the module has changed since the last call.
        """
        if torch.is_autocast_enabled(next(module.parameters()).device.type):
            return "torch.autocast is on"
        asked = requested_backend(self._options.backend), graph_settings()
        if (known := self._known(module, asked)) is not None:
            return known  # after milliseconds, which nobody else waited for
        with self._lock:
            if (known := self._known(module, asked)) is not None:
                return known  # somebody else's, of meanwhile
            if module in self._of:
                settle_all(next(module.parameters()).device)
                del self._of[module]
            now = Fingerprint(module)
            found: Engine | str | None = self._why_unsupported(module)
            if found is None:
                # Not as inference tensors, which a caller outside of inference mode could not use.
                with torch.inference_mode(False), torch.no_grad():
                    found = self._make(module, self._options)
            self._of[module] = (asked, now, found)
            return found

    def _known(self, module: Any, asked: Any) -> Engine | str | None:
        """What was found the last time; None where something has changed since."""
        before, state, found = self._of.get(module, (None, None, None))
        unchanged = state is not None and before == asked and state.is_still(module)
        return found if unchanged else None
