"""A kernel that computes something else than its reference on this machine is not used."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import tokens_of
from torch import Tensor
from torch._subclasses import FakeTensorMode

from chatterbox_fast import ops, patched, precision, report, selftest
from chatterbox_fast.audio import resample
from chatterbox_fast.options import Options
from chatterbox_fast.t3 import runner
from chatterbox_fast.t3.engine import Engine, Engines
from chatterbox_fast.testing import random_t3

CPU = torch.device("cpu")
OPS = tuple(selftest._CASES)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
Break = Callable[..., Any]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, Break], None]]:
    """(op, function of the right kernel and its arguments): what runs in the extension's place."""
    selftest.why_failed.cache_clear()

    def put(op: str, instead: Break) -> None:
        by = getattr(ops, f"{op}_by")

        def chosen(backend: str) -> Any:
            right = by(backend)
            if backend != "extension":
                return right
            return lambda *arguments, **how: instead(right, *arguments, **how)

        monkeypatch.setattr(ops, f"{op}_by", chosen)

    yield put
    selftest.why_failed.cache_clear()


def chosen(op: str) -> Any:
    return selftest.choose(op, CPU, "auto", torch.float32)


@pytest.mark.parametrize("op", OPS)
def test_the_kernels_of_this_build_pass(op: str) -> None:
    selftest.why_failed.cache_clear()
    assert selftest.why_failed(op, "extension", CPU) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert selftest.why_failed.__wrapped__(op, "extension", CPU) is None
    assert chosen(op) == ("extension", "compiled for cpu")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torchs_defaults_do_not_matter(op: str, dtype: torch.dtype) -> None:
    """The choice is kept for the process, which may have other defaults for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            assert selftest.why_failed.__wrapped__(op, "extension", CPU) is None
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_skinny_linear_that_is_wrong_with_a_dtype(
    broken: Any, dtype: torch.dtype, vectors: bool
) -> None:
    """In a kernel's loop over 16 bytes of weights at a time, or in the one over single ones."""

    def is_wrong(w: Tensor) -> bool:
        return w.dtype == dtype and (w.shape[1] % 16 == 0) == vectors

    broken("skinny_linear", lambda right, x, w, *rest, **how: (
        right(x, w, *rest, **how) * (1 + is_wrong(w) / 100)
    ))  # fmt: skip
    assert chosen("skinny_linear") == (
        "reference",
        f"skinny_linear is wrong on this machine with {dtype} weights, "
        f"{2112 if vectors else 37} inputs",
    )
    precise = precision.choose_precision(Options(precision="int8"), CPU, torch.float32)
    assert (precise.precision, precise.linear.backend) == ("exact", "torch")
    assert "is wrong on this machine" in precise.why


@pytest.mark.parametrize("lost", ["norm", "residual", "gate", "what no loop takes at once"])
def test_a_skinny_linear_that_loses_a_part(broken: Any, lost: str) -> None:
    def loses(right: Any, x: Any, w: Any, s: Any, norm: Any, residual: Any, **how: Any) -> Any:
        if lost == "norm":
            norm = None
        elif lost == "residual":
            residual = None
        elif lost == "gate" and not how["gated"]:
            return 2 * right(x, w, s, norm, residual, **how)
        elif x.shape[1] > 2048:
            x = torch.cat([x[:, :2048], torch.zeros_like(x[:, 2048:])], dim=1)
        return right(x, w, s, norm, residual, **how)

    broken("skinny_linear", loses)
    assert "is wrong" in chosen("skinny_linear").reason


def test_a_decode_attention_that_does_not_append(broken: Any) -> None:
    def forgets(right: Any, qkv: Any, k: Any, v: Any, *rest: Any) -> Any:
        return right(qkv, k.clone(), v if v.dtype == torch.float32 else v.clone(), *rest)

    broken("decode_attention", forgets)
    assert "with a cache in torch.float32" in chosen("decode_attention").reason


def test_a_decode_attention_that_is_wrong_in_half_precision(broken: Any) -> None:
    broken("decode_attention", lambda right, qkv, k, *rest: (
        right(qkv, k, *rest) * (1.1 if k.dtype == torch.bfloat16 else 1)
    ))  # fmt: skip
    assert "with a cache in torch.bfloat16" in chosen("decode_attention").reason


@pytest.mark.parametrize("lost", ["seen", "a draw"])
def test_a_cfg_sample_that_is_wrong(broken: Any, lost: str) -> None:
    def wrong(right: Any, logits: Any, seen: Any, *rest: Any, **how: Any) -> Any:
        if lost == "seen":
            return right(logits, seen.clone(), *rest, **how)
        return right(logits, seen, *rest, **how) + 1

    broken("cfg_sample", wrong)
    assert chosen("cfg_sample").backend == "reference"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("error", [RuntimeError(""), ImportError("no symbol\nfoo"), OSError("x")])
def test_a_kernel_that_raises(broken: Any, op: str, error: Exception) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    broken(op, fails)
    first = str(error).partition("\n")[0]
    assert chosen(op) == ("reference", f"{op} raises {type(error).__name__}: {first}")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), RuntimeError("CUDA error: out of memory\nhint")]
)
def test_memory_that_ran_out_says_nothing_of_a_kernel(broken: Any, error: Exception) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    broken("cfg_sample", full)
    for _ in range(2):  # nor is it remembered
        with pytest.raises(type(error), match=re.escape(str(error))):
            chosen("cfg_sample")


def test_an_engine_without_a_working_kernel_speaks_as_the_reference(
    broken: Any, t3_cond: Any
) -> None:
    """Each op falls back by itself; what failed is never called again."""
    t3 = random_t3("english", "tiny")
    settings = {"t3_cond": t3_cond, "text_tokens": torch.tensor([[255, 40, 0]]), "seed": 1}
    settings["max_new_tokens"] = 5
    expected = tokens_of(t3, options={"backend": "reference"}, **settings)
    for op in OPS:
        broken(op, lambda *_, **__: pytest.fail("called") if called else 1 / 0)
    called: list[int] = []
    engine = Engine(t3, Options())
    called.append(1)
    assert {choice.backend for choice in engine.choices.values()} == {"torch", "reference"}
    assert "ZeroDivisionError" in engine.choices["decode_attention"].reason
    with torch.inference_mode():
        assert engine.weights.decode.layers[0].attention == "reference"
        assert engine.weights.decode.head.kernel == "torch"
    torch.manual_seed(settings.pop("seed"))
    assert torch.equal(runner.inference(t3, engine, **settings), expected)


def test_the_report_shows_what_the_engine_uses(
    broken: Any, english: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken("cfg_sample", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(english.t3.cfg, "head_dim", 32)
    engine = Engine(english.t3, Options())
    monkeypatch.undo()
    monkeypatch.setattr(Engines, "of", lambda *_: engine)
    with patched(english):
        rows = {row.site: row[2:] for row in report(english)}
    assert rows["  cfg_sample"] == (
        "reference",
        "cfg_sample raises ZeroDivisionError: division by zero",
    )
    wide = "the kernels take heads of 64, these are 32 wide"
    assert rows["  decode_attention"] == ("reference", wide)
    assert rows["  skinny_linear"] == ("extension", "compiled for cpu")


@pytest.mark.parametrize("op", ["padded_attention", "add_norm", "snake", "istft", "resample"])
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_an_op_of_s3gen_that_is_wrong_with_a_dtype(
    broken: Any, op: str, dtype: torch.dtype
) -> None:
    """By a twentieth: more than any rounding to bfloat16."""
    if op == "istft" and dtype != torch.float32:
        pytest.skip("its spectrum is float32")
    broken(op, lambda right, x, *a, **k: right(x, *a, **k) * (1 + (x.dtype == dtype) / 20))
    found = chosen(op)
    assert found.backend == "reference"
    assert found.reason.startswith(f"{op} is wrong on this machine with ")


def test_a_snake_that_is_wrong_where_it_loads_vectors(broken: Any) -> None:
    broken("snake", lambda right, x, *rest: right(x, *rest) * (1 + (x.shape[-1] % 8 == 0) / 20))
    assert chosen("snake").reason.endswith("with torch.float32, 40 channels")


def test_an_add_norm_that_forgets_the_sum(broken: Any) -> None:
    def on_copies(right: Any, *arguments: Any, **how: Any) -> Tensor:
        return right(*(None if each is None else each.clone() for each in arguments), **how)

    broken("add_norm", on_copies)
    assert "the residual of torch.float32" in chosen("add_norm").reason


def test_an_add_norm_that_ignores_strides(broken: Any) -> None:
    def dense(right: Any, x: Tensor, *arguments: Any, **how: Any) -> Tensor:
        _, times, channels = x.shape
        return right(x.as_strided(x.shape, (times * channels, channels, 1)), *arguments, **how)

    broken("add_norm", dense)
    assert "wrong on this machine" in chosen("add_norm").reason


@pytest.mark.parametrize("lost", ["first", "neighbours", "many phases", "far apart"])
def test_a_resample_that_loses_a_part(broken: Any, lost: str) -> None:
    def loses(right: Any, x: Any, filters: Tensor, first: Any, **how: Any) -> Tensor:
        if lost == "first":
            first = None
        elif lost == "neighbours":
            filters = filters.as_strided(filters.shape, (filters.shape[1], 1))
        elif (len(filters) > 512) if lost == "many phases" else (how["stride"] == 400):
            how["left"] += 1
        return right(x, filters, first, **how)

    broken("resample", loses)
    assert "resample is wrong on this machine" in chosen("resample").reason


def test_a_voice_is_resampled_without_a_working_kernel(broken: Any, english: Any) -> None:
    """By the patched object and by the public function, and in whatever mode it is first asked."""
    waveform = torch.sin(torch.arange(3000) / 9)
    expected = resample(waveform, 3, 2, backend="reference")
    broken("resample", lambda *_, **__: 1 / 0)
    with torch.device("meta"), FakeTensorMode(allow_non_fake_inputs=True):
        assert resample(torch.empty(3000, device="cpu"), 3, 2).shape == expected.shape
    assert torch.equal(resample(waveform, 3, 2), expected)
    with patched(english, precision="bf16"):
        rows = {row.site: row for row in report(english)}
        english.s3gen.embed_ref(waveform[None], 22050)
    assert rows["s3gen.embed_ref"].runs == "own resampler"
    assert rows["  resample"][2:] == (
        "reference",
        "resample raises ZeroDivisionError: division by zero",
    )


def test_what_is_asked_in_a_mode_holds_for_all(broken: Any) -> None:
    del broken  # for what is kept
    with FakeTensorMode(), torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.func.vmap(lambda x: x + len(chosen("resample").reason))(torch.empty(2))
    assert chosen("resample") == ("extension", "compiled for cpu")


def test_norms_wider_than_the_kernels_take() -> None:
    for channels, backend in ((1024, "extension"), (1025, "reference")):
        found = selftest.choose_add_norm(channels, CPU, "auto", torch.float32)
        assert found.backend == backend
    assert found.reason == "the kernels take up to 1024 channels, these are 1025"
