"""patch(model): swaps fast engines into a stock Chatterbox object, and takes them out again.

Each replacement is an instance attribute, recorded with what was there before, so that unpatch()
gives back exactly that. Classes, modules and other models in the process are never touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Any, TypeVar

from . import dispatch
from .options import Options
from .overrides import (
    REDUCE,
    Absent,
    Change,
    Override,
    apply_all,
    bound,
    copied_as_stock,
    reduce_as_stock,
    undo_all,
)
from .site import Row, Site
from .sites import RECORD, STOCK_CLASSES, describe_rest, sites_of, watermark_override

Model = TypeVar("Model")

_lock = RLock()
"""Held while attributes are replaced or restored; never while a model speaks."""


@dataclass
class Record:
    """What patch() did to a model; lives on the model, next to what it replaced."""

    options: Options
    sites: list[Site]
    changes: list[Change]
    model: Any


def patch(model: Model, **options: Any) -> Model:
    """Makes a stock Chatterbox object fast, in place.

    Args:
        model: a `ChatterboxTTS`, `ChatterboxMultilingualTTS`, `ChatterboxTurboTTS` or
            `ChatterboxVC`.
        **options: the switches of `Options`: precision, backend, compile, watermark, progress,
            strict.

    A copy or a pickle of a patched model, or of its modules, is a stock object: patch it too.

    Returns:
        `model` itself. Its ``generate`` takes stock's arguments, and ``seed``: with a seed the
        request draws from generators of its own and gives what stock gives after
        ``torch.manual_seed(seed)``; without one it draws from torch's global generators.

    Patching again with the same options does nothing (`unpatch` first to have everything packed
    anew); with other options it replaces the patch.

    Raises:
        TypeError: not a Chatterbox object, or an unknown option.
        ValueError: an option out of range.
        RuntimeError: with ``strict=True``, where something would be left to stock; the model is
            then as it was.
    """
    chosen = Options.of(**options)
    dispatch.requested_backend(chosen.backend)
    if not any(base.__name__ in STOCK_CLASSES for base in type(model).__mro__):
        raise TypeError(
            f"chatterbox_fast.patch: model must be a {', '.join(STOCK_CLASSES)}, "
            f"got {type(model).__qualname__}"
        )
    with _lock:
        previous = _record(model)
        if previous is None:
            _install(model, chosen)
        elif previous.options != chosen:
            unpatch(model)
            try:
                _install(model, chosen)
            except BaseException:
                _install(model, previous.options)
                raise
    return model


def unpatch(model: Model) -> Model:
    """Undoes patch(): every replaced attribute is again what it was. Returns `model`.

    A model that is not patched is left alone.

    Raises:
        RuntimeError: something else replaced one of the attributes after patch(); nothing is
            changed then.
    """
    with _lock:
        record = _record(model)
        if record is None:
            return model
        for change in record.changes:
            if not change.in_place():
                raise RuntimeError(
                    f"chatterbox_fast.unpatch: {type(change.owner).__qualname__}."
                    f"{change.name} was replaced after patch(); undo that first"
                )
        undo_all(record.changes)
        delattr(model, RECORD)
    return model


@contextmanager
def patched(model: Model, **options: Any) -> Iterator[Model]:
    """``with patched(model): ...``: patched within, afterwards what it was before."""
    before = _record(model)
    patch(model, **options)
    try:
        yield model
    finally:
        with _lock:
            unpatch(model)
            if before is not None:
                _install(model, before.options)


class Report(tuple[Row, ...]):
    """The rows of report(); prints as a table."""

    def __str__(self) -> str:
        cells = [Row("site", "runs", "backend", "why"), *self]
        widths = [max(len(row[i]) for row in cells) for i in range(3)]
        return "\n".join(
            "  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row.why]) for row in cells
        )


def report(model: Any) -> Report:
    """What runs where in `model`: rows of (site, runs, backend, why). Prints as a table."""
    record = _record(model)
    if record is None:
        return Report([Row("model", "stock", "torch", "not patched")])
    ours = {(id(site.owner), site.attribute): site for site in record.sites}
    rows: list[Row] = []
    for site in sites_of(model, record.options):
        if (patched_site := ours.get((id(site.owner), site.attribute))) is not None:
            rows.extend(patched_site.describe())
        elif (reason := site.why_not()) is not None:
            rows.append(Row(site.name, "stock", "-", reason))
        else:
            rows.append(Row(site.name, "stock", "torch", "came after patch(); unpatch, then patch"))
    return Report([*rows, *describe_rest(model, record.options)])


def _record(model: Any) -> Record | None:
    record: Record | None = getattr(model, "__dict__", {}).get(RECORD)
    return record if record is not None and record.model is model else None


def _install(model: Any, options: Options) -> None:
    sites = [site for site in sites_of(model, options) if site.why_not() is None]
    changes: list[Change] = [change for site in sites for change in site.changes()]
    if not options.watermark:
        changes.append(watermark_override(model))
    changes.append(Override(model, REDUCE, bound(_reduce_model, model)))
    changes.extend(copied_as_stock(changes))
    apply_all(changes)
    setattr(model, RECORD, Record(options, sites, changes, model))
    if options.strict:
        _refuse_stock(model)


def _reduce_model(model: Any, protocol: Any) -> Any:
    """As `reduce_as_stock`; a model has the record too, and may have lost its watermarker."""
    make, arguments, stock, *rest = reduce_as_stock(model, protocol)
    record = stock.pop(RECORD, None)
    for change in reversed(record.changes if record is not None else []):
        if not isinstance(change, Override) or change.owner is not model:
            continue
        if change.before is not Absent:
            stock[change.name] = change.before
    return (make, arguments, stock, *rest)


def _refuse_stock(model: Any) -> None:
    """Raises where report() shows a site left to stock; takes the patch out again first."""
    for row in report(model):
        if row.runs == "stock":
            unpatch(model)
            raise RuntimeError(
                f"chatterbox_fast.patch: strict=True, but {row.site} is left to stock: {row.why}"
            )
