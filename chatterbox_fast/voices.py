"""The voice a request speaks with: its own, whatever other requests do to the model."""

from __future__ import annotations

import copy
import inspect
from threading import Lock
from typing import Any


def request_view(model: Any, arguments: dict[str, Any], lock: Lock) -> Any:
    """A shallow copy of `model` that holds this request's voice; shares all modules.

    Stock keeps the voice in ``model.conds`` (`ref_dict` for voice conversion) and changes it in
    place, so two requests can swap voices. Here stock's generate() runs on the view instead. A
    new voice is prepared on the model itself, as stock does, so that later calls find it there.

    Args:
        model: the stock object.
        arguments: generate()'s arguments; the audio prompt is taken out.
        lock: held while a voice is prepared and read.
    """
    prompt, prepare = _prompt_of(model)
    path = arguments.pop(prompt, None)
    with lock:
        if path:
            accepted = inspect.signature(prepare).parameters
            prepare(path, **{k: v for k, v in arguments.items() if k in accepted})
        view = copy.copy(model)
        if hasattr(model, "conds"):
            view.conds = _own_conditionals(model.conds)
        else:
            view.ref_dict = None if model.ref_dict is None else dict(model.ref_dict)
    return view


def _prompt_of(model: Any) -> tuple[str, Any]:
    """The name of generate()'s voice argument, and the method that prepares such a voice."""
    if hasattr(model, "set_target_voice"):
        return "target_voice_path", model.set_target_voice
    return "audio_prompt_path", model.prepare_conditionals


def _own_conditionals(conds: Any) -> Any:
    """A copy of stock's `Conditionals` that shares tensors but no container."""
    if conds is None:
        return None
    own = copy.copy(conds)
    own.t3, own.gen = copy.copy(conds.t3), dict(conds.gen)
    return own
