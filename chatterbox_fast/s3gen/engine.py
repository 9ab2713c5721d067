"""What the patched model keeps between requests for one S3Gen: packed weights, tables."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch

from ..modules import signature
from ..recent import Recent
from .encoder import pack_encoder
from .flow import TimeTable, pack_flow, time_table

TABLES = 4
"""Numbers of Euler steps whose tables are kept."""


class FlowEngine:
    """The flow of one S3Gen. Immutable but for its tables; threads share it.

    Attributes:
        encoder: the encoder's weights.
        solver: the flow solver's weights.
    """

    def __init__(self, flow: Any) -> None:
        self.encoder = pack_encoder(flow)
        self.solver = pack_flow(flow.decoder)
        self._decoder = flow.decoder
        self._tables: Recent[int, TimeTable] = Recent(TABLES)

    def table(self, n_timesteps: int) -> TimeTable:
        """The time table of `n_timesteps` Euler steps."""

        def make() -> TimeTable:
            with torch.inference_mode(False), torch.no_grad():
                return time_table(self._decoder, n_timesteps)

        return self._tables.get(n_timesteps, make)


def flow_signature(flow: Any) -> tuple[Any, ...]:
    """Changes when a parameter of the flow does, or what stock reads at every call."""
    decoder = flow.decoder
    constants = decoder.inference_cfg_rate, decoder.t_scheduler, decoder.estimator.meanflow
    return (*signature(flow), *constants)


Engine = TypeVar("Engine")


class Engines(Generic[Engine]):
    """The engine of one patch's module, made anew where that module changes.

    It does not keep the module alive.
    """

    def __init__(
        self, make: Callable[[Any], Engine], signature: Callable[[Any], tuple[Any, ...]] = signature
    ) -> None:
        self._make, self._signature = make, signature
        self._lock = Lock()
        self._of: WeakKeyDictionary[Any, tuple[Any, Engine]] = WeakKeyDictionary()

    def of(self, module: Any) -> Engine:
        """The engine of `module`; a new one where its weights have changed since the last call."""
        with self._lock:
            now = self._signature(module)
            known = self._of.get(module)
            if known is not None and known[0] == now:
                return known[1]
            self._of.pop(module, None)
            # Not as inference tensors, which a caller outside of inference mode could not use.
            with torch.inference_mode(False), torch.no_grad():
                engine = self._make(module)
            self._of[module] = (now, engine)
            return engine
