"""Packing T3's weights: what is shared, what is copied, what is given back."""

from __future__ import annotations

import copy
import math
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import engine_of
from safetensors.torch import save_model

from chatterbox_fast import patch, patched, report, selftest, unpatch
from chatterbox_fast.options import Options
from chatterbox_fast.precision import choose_precision
from chatterbox_fast.t3 import engine, weights
from chatterbox_fast.t3.projection import Projection
from chatterbox_fast.t3.support import why_unsupported
from chatterbox_fast.testing import random_t3

CPU = torch.device("cpu")


@pytest.fixture
def tiny() -> Any:
    return random_t3("english", "tiny")


def test_exact_on_a_cpu_reads_the_models_own_tensors(tiny: Any) -> None:
    packed = engine_of(tiny, precision="exact").weights
    assert packed.prefill is packed.decode
    assert packed.decode.head.weight.data_ptr() == tiny.speech_head.weight.data_ptr()
    for ours, layer in zip(packed.decode.layers, tiny.tfmr.layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        own = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
               mlp.gate_proj, mlp.up_proj, mlp.down_proj]  # fmt: skip
        projections = [*ours.qkv, ours.o, *ours.gate_up, ours.down]
        for projection, module in zip(projections, own, strict=True):
            assert projection.weight.data_ptr() == module.weight.data_ptr()
            assert projection.scale is None


def test_a_patched_model_can_be_saved_loaded_copied_and_trained(
    english: Any, tmp_path: Path
) -> None:
    before = copy.deepcopy(english.t3.state_dict())
    with patched(english):
        save_model(english.t3, str(tmp_path / "t3.safetensors"))
        torch.save(english.t3.state_dict(), tmp_path / "t3.pt")
        copied = copy.deepcopy(english.t3)
        assert why_unsupported(copied) is None
        tokens = torch.tensor([[255, 40, 0]])
        once = english.t3.inference(t3_cond=english.conds.t3, text_tokens=tokens, max_new_tokens=3)
        assert once.shape == (1, 3)
        with torch.enable_grad():
            hidden = copied.tfmr(inputs_embeds=torch.ones(1, 2, 1024)).last_hidden_state
            hidden.sum().backward()
        assert copied.tfmr.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0
    for loaded in (torch.load(tmp_path / "t3.pt"), english.t3.state_dict()):
        assert loaded.keys() == before.keys()
        assert all(torch.equal(loaded[name], before[name]) for name in before)


@pytest.mark.parametrize(("narrow", "dtype"), [("bf16", torch.bfloat16), ("int8", torch.int8)])
def test_narrow_weights_are_a_copy(tiny: Any, narrow: str, dtype: torch.dtype) -> None:
    packed = engine_of(tiny, precision=narrow).weights
    ours, layer = packed.decode.layers[1], tiny.tfmr.layers[1]
    assert ours.down.weight.dtype == packed.decode.head.weight.dtype == dtype
    assert ours.input_norm.weight.dtype == packed.decode.speech_emb.dtype == torch.float32
    fused = torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]).detach()
    (gate_up,) = ours.gate_up
    (qkv,) = ours.qkv
    assert qkv.weight.shape == (3 * 1024, 1024)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # one block: a weight lies where the one before it ends
        assert ours.o.weight.data_ptr() == qkv.weight.data_ptr() + qkv.weight.nbytes
        assert gate_up.weight.data_ptr() == ours.o.weight.data_ptr() + ours.o.weight.nbytes
    if narrow == "bf16":
        assert torch.equal(gate_up.weight, fused.bfloat16())
        return
    assert gate_up.scale is not None
    assert torch.equal(gate_up.scale, fused.abs().amax(dim=1) / 127)
    error = (gate_up.weight * gate_up.scale[:, None] - fused).abs()
    assert (error <= 0.501 * gate_up.scale[:, None]).all()


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("multiplies", [False, True])
def test_what_prefill_reads_and_multiplies_in_on_a_cpu(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, precision: str, multiplies: bool
) -> None:
    """In bfloat16 where the CPU multiplies it, int8 too, which reads the own matrices for it."""
    monkeypatch.setattr(weights, "cpu_multiplies_bf16", lambda: multiplies)
    packed = engine_of(tiny, precision=precision).weights
    down, own = packed.prefill.layers[1].down, tiny.tfmr.layers[1].mlp.down_proj.weight
    assert (packed.prefill is packed.decode) == (multiplies and precision == "bf16")
    assert packed.prefill is packed.decode or down.weight.data_ptr() == own.data_ptr()
    x, dtype = torch.randn(9, own.shape[1]), torch.bfloat16 if multiplies else torch.float32
    with torch.no_grad():
        assert torch.equal(down(x), F.linear(x.to(dtype), own.to(dtype)).float())
    if not multiplies:
        assert packed.prefill.cache_dtype == torch.float32


def test_a_row_of_zeros_is_quantised_to_zeros() -> None:
    weight = torch.zeros(2, 8)
    weight[1] = 3.0
    narrow, scale = weights._narrow(weight, torch.int8)
    assert narrow.tolist() == [[0] * 8, [127] * 8]
    assert scale is not None
    assert scale.isfinite().all()


def test_ugly_rows_are_quantised_to_what_they_are() -> None:
    """Subnormal rows do not wrap around; NaN and infinity are seen in the outputs."""
    weight = torch.ones(5, 8)
    weight[0] = (
        torch.linspace(-1, 1, 8) * 2.2e-43
    )  # over 127: a scale of 1.7 ulp, rounded to 1 or 2
    weight[1] = -3e-44
    weight[2, 3] = math.nan
    weight[3, 3] = math.inf
    narrow, scale = weights._narrow(weight, torch.int8)
    assert scale is not None
    restored = narrow.double() * scale.double()[:, None]
    assert ((restored - weight.double())[:2].abs() <= 5e-44).all()
    assert (restored[0].sign() == weight[0].sign()).all()
    for rows in (1, 9):  # by the kernel, and by torch
        projection = Projection(narrow, scale, "extension", torch.bfloat16)
        y = projection(torch.ones(rows, 8))
        assert y[:, [0, 1, 4]].isfinite().all()
        assert not y[:, [2, 3]].isfinite().any()


def test_many_rows_read_int8_as_it_is() -> None:
    """As few do: neither a weight nor its scale is rounded on the way."""
    weight = torch.arange(-127, 128, dtype=torch.int8)[:, None]
    scale = torch.rand(255, generator=torch.Generator().manual_seed(0)) + 0.1
    y = Projection(weight, scale, "torch", torch.bfloat16)(torch.ones(9, 1))
    assert torch.equal(y, (weight[:, 0] * scale).expand(9, -1))


def test_the_report_shows_memory(english: Any) -> None:
    def row() -> Any:
        return next(row for row in report(english) if row.site == "  weights")

    own = sum(p.nbytes for p in english.t3.parameters()) / 1e9
    with patched(english, precision="exact"):
        assert row()[1:3] == (f"{own:.2f} GB -> {own:.2f} GB", "cpu")
    with patched(english, precision="int8"):
        before, now = (float(part.split()[0]) for part in row().runs.split(" -> "))
        assert before == round(own, 2)
        assert now > before, "on a CPU both are kept"


def test_weights_are_packed_when_the_model_is_patched(
    english: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = []
    stock = weights.pack

    def watched(t3: Any, precise: Any, attention: str) -> Any:
        packed.append(precise.precision)
        return stock(t3, precise, attention)

    monkeypatch.setattr(weights, "pack", watched)
    patch(english, precision="bf16")
    assert packed == ["bf16"]
    english.generate("Hello there.", seed=1)
    report(english)
    assert packed == ["bf16"]
    unpatch(english)


def test_a_patch_that_cannot_pack_leaves_the_model_alone(
    english: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(weights, "pack", full)
    with pytest.raises(torch.OutOfMemoryError, match=r"T3 ran out of memory on cpu\..*\(full\)"):
        patch(english)
    assert report(english)[0].why == "not patched"
    assert "forward" not in vars(english.t3.tfmr)


def test_originals_come_home_to_where_the_model_is_now(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer's matrices, and those alone; the norms are where the user put the model."""
    matrices = {id(p) for p in tiny.tfmr.layers.parameters() if p.dim() == 2}
    originals = weights.Originals.of(tiny.tfmr)
    assert {id(matrix) for matrix in originals.matrices} == matrices
    assert originals.at_home is tiny.tfmr.norm.weight
    moves: list[str] = []
    monkeypatch.setattr(weights.Originals, "_move", lambda _, where: moves.append(where.type))
    elsewhere = originals._replace(at_home=torch.nn.Parameter(torch.zeros(1, device="meta")))
    elsewhere.send_to_host()
    elsewhere.bring_home()
    assert moves == ["cpu", "meta"]


def test_weights_are_there_for_every_stream_once_they_are_packed(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    pack = weights.pack
    monkeypatch.setattr(weights, "pack", lambda *how: (pack(*how), done.append("packed"))[0])
    monkeypatch.setattr(engine, "settle", lambda _: done.append("settled"))
    engine.Engine(tiny, Options())
    assert done == ["packed", "settled"]


def test_precisions_that_a_device_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(precision: Any, own: torch.dtype = torch.float32, **options: Any) -> Any:
        return choose_precision(Options(precision=precision, **options), CPU, own)

    assert choose("auto")[:2] == ("exact", torch.float32)
    assert choose("bf16")[:2] == ("bf16", torch.bfloat16)
    assert choose("int8")[1] == torch.int8
    assert choose("fp16").why == "a CPU gains nothing from fp16"
    assert choose("bf16", torch.float64).why.startswith("bf16 needs float32 weights to start from")
    assert choose("int8", backend="reference").why == (
        "int8 needs the kernel skinny_linear: asked for"
    )
    assert choose("exact", backend="reference").linear.backend == "torch"
    cuda = torch.device("cuda")
    monkeypatch.setattr(selftest, "why_failed", lambda *_: None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (7, 5))
    assert choose_precision(Options(), cuda, torch.float32)[:2] == ("fp16", torch.float16)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (8, 9))
    assert choose_precision(Options(), cuda, torch.float32)[:2] == ("bf16", torch.bfloat16)
    bare: Any = {"backend": "reference"}
    assert choose_precision(Options(**bare), cuda, torch.float32).precision == "bf16"
    without = choose_precision(Options(precision="int8", **bare), cuda, torch.float32)
    assert without[:2] == ("exact", torch.float32), "torch has no product with int8"
