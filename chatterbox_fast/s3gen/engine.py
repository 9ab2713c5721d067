"""What the patched model keeps between requests for one flow: weights and time tables."""

from __future__ import annotations

from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..modules import signature
from ..recent import Recent
from ..t3.graph import settle
from .flow import FlowWeights, TimeTable, condition, pack_flow, solve, time_table

MOST_TABLES = 8
"""Time tables that are kept, one for each number of steps: 0.1 MB for ten at full size."""


class FlowEngine:
    """One flow, ready to solve. Immutable but for its time tables; threads share it."""

    def __init__(self, decoder: Any) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.weights: FlowWeights = pack_flow(decoder)
        settle(self.weights.project.weight.device)
        self._tables: Recent[int, TimeTable] = Recent(MOST_TABLES)

    def table(self, decoder: Any, n_timesteps: int) -> TimeTable:
        """What depends on the number of steps alone, computed by stock's modules once."""

        def make() -> TimeTable:
            own = self.weights.project.weight
            table = time_table(decoder, n_timesteps, own.device, own.dtype)
            settle(own.device)
            return table

        return self._tables.get(n_timesteps, make)

    @torch.inference_mode()
    def mel(
        self, decoder: Any, noise: Tensor, mu: Tensor, spks: Tensor, cond: Tensor, n_timesteps: int
    ) -> Tensor:
        """Mel ``(1, 80, T)`` from noise ``(1, 80, T)``, as stock's solver computes it.

        Args:
            decoder: what the engine was made for.
            mu: ``(1, 80, T)``, the encoder's output.
            spks: ``(1, 80)``. cond: ``(1, 80, T)``, the voice's mel, then zeros.
        """
        table = self.table(decoder, n_timesteps)
        mu, cond, noise = (t.transpose(1, 2).contiguous() for t in (mu, cond, noise))
        given = condition(self.weights, mu, spks, cond)
        return solve(self.weights, table, given, noise).transpose(1, 2).contiguous()


class FlowEngines:
    """The engines of one patch: of the flow that was patched, and of any deep copy of it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._of: WeakKeyDictionary[Any, tuple[Any, FlowEngine]] = WeakKeyDictionary()

    def of(self, decoder: Any) -> FlowEngine:
        """The engine of `decoder`; a new one where its weights changed since the last request."""
        with self._lock:
            own, known = signature(decoder), self._of.get(decoder)
            if known is not None and known[0] == own:
                return known[1]
            self._of.pop(decoder, None)
            engine = FlowEngine(decoder)
            self._of[decoder] = (own, engine)
            return engine
