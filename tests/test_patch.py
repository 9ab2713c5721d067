"""patch, unpatch, patched and report: what they touch, and that they give it back."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import instance_dictionaries, same_audio
from tqdm import tqdm

import chatterbox_fast
from chatterbox_fast import dispatch, patch, patched, report, unpatch
from chatterbox_fast.patch import Row
from chatterbox_fast.t3 import weights
from chatterbox_fast.t3.engine import Engine, Engines
from chatterbox_fast.t3.site import Packing
from chatterbox_fast.t3.support import why_unsupported
from chatterbox_fast.testing import random_model, random_t3
from chatterbox_fast.watermark import NoWatermark

TEXT = "Hello there."
ENGINES = ("t3.inference", "s3gen.flow", "s3gen.vocoder")


def row(model: Any, site: str) -> Row:
    return next(row for row in report(model) if row.site == site)


def test_unpatch_gives_back_exactly_what_was_there(english: Any) -> None:
    before = instance_dictionaries(english)
    keys = list(english.t3.state_dict()), list(english.s3gen.state_dict())
    for options in ({}, {"watermark": False, "progress": True, "precision": "exact"}):
        assert patch(english, **options) is english
        assert instance_dictionaries(english) != before
        assert (list(english.t3.state_dict()), list(english.s3gen.state_dict())) == keys
        english.generate(TEXT, seed=1)
        assert unpatch(english) is english
        assert instance_dictionaries(english) == before
        assert list(vars(english)) == list(before["model"])
    assert "generate" not in vars(english)


def test_patching_twice_is_patching_once(english: Any) -> None:
    before = instance_dictionaries(english)
    patch(english)
    once = instance_dictionaries(english)
    patch(english)
    assert instance_dictionaries(english) == once
    unpatch(english)
    assert instance_dictionaries(english) == before
    assert unpatch(english) is english


def test_other_options_replace_the_patch(english: Any) -> None:
    stock = english.watermarker
    patch(english, watermark=False)
    assert isinstance(english.watermarker, NoWatermark)
    patch(english)
    assert english.watermarker is stock
    unpatch(english)


def test_patched_is_a_context(english: Any) -> None:
    before = instance_dictionaries(english)
    with pytest.raises(ZeroDivisionError), patched(english) as model:
        assert model is english
        assert row(model, "t3.inference").runs == "engine, exact"
        _ = 1 / 0
    assert instance_dictionaries(english) == before
    patch(english, progress=True)
    with patched(english, watermark=False):
        assert row(english, "watermark").runs == "none"
    assert row(english, "watermark").runs == "Perth (stock)"
    assert english._chatterbox_fast.options.progress
    unpatch(english)


def test_a_second_model_is_not_touched(english: Any) -> None:
    other = random_model("english", "tiny", seed=1)
    before = instance_dictionaries(other)
    classes = [dict(vars(type(o))) for o in (english, english.t3, english.s3gen)]
    with patched(english, watermark=False):
        assert instance_dictionaries(other) == before
        assert [dict(vars(type(o))) for o in (english, english.t3, english.s3gen)] == classes
        assert report(other)[0].why == "not patched"


def test_copies_of_a_patched_model_are_stock(english: Any, voices: tuple[Path, Path]) -> None:
    other_voice = voices[1]
    torch.manual_seed(4)
    english.conds, before = copy.copy(english.conds), english.conds
    expected = stock_after_seed(english, 4, audio_prompt_path=other_voice)
    english.conds = before
    with patched(english, watermark=False):
        copied = copy.copy(english)
        assert report(copied)[0].why == "not patched"
        assert "generate" not in vars(copied)
        assert not isinstance(copied.watermarker, NoWatermark)
        # Its voice is its own, as a copy of a stock object's is.
        copied.prepare_conditionals(other_voice)
        assert english.conds is before
        assert same_audio(stock_after_seed(copied, 4), expected)
        with patched(copied):
            assert same_audio(copied.generate(TEXT, seed=4), expected)
        assert row(english, "watermark").runs == "none"


def stock_after_seed(model: Any, seed: int, **arguments: Any) -> torch.Tensor:
    torch.manual_seed(seed)
    return model.generate(TEXT, **arguments)


OURS = {
    "inference",
    "embed_ref",
    "flow_inference",
    "generate",
    "forward",
    "__reduce_ex__",
    "_chatterbox_fast",
}


def test_deep_copies_and_pickles_of_a_patched_model_are_stock(english: Any) -> None:
    """Also of one that is patched twice: another model shares its modules."""
    english.conds = None  # a voice with gradients, which torch does not deep-copy
    other = object.__new__(type(english))
    vars(other).update(vars(english))
    patch(english, watermark=False)
    patch(other)
    copied = copy.deepcopy(english)
    parts = [copy.deepcopy(english.t3), copy.copy(english.s3gen.flow), copy.deepcopy(english.s3gen)]
    parts.append(pickle.loads(pickle.dumps(english.s3gen.flow)))
    unpatch(other)
    unpatch(english)
    for part in (copied, copied.t3, copied.t3.tfmr, copied.s3gen, copied.s3gen.flow,
                 copied.s3gen.mel2wav, *parts, parts[0].tfmr, parts[2].flow):  # fmt: skip
        assert OURS.isdisjoint(vars(part)), type(part)
    assert report(copied)[0].why == "not patched"
    assert unpatch(copied) is copied
    assert not isinstance(copied.watermarker, NoWatermark)
    for ours, theirs in ((english.t3, copied.t3), (english.s3gen.flow, parts[3])):
        for name, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name]), name
    with patched(copied):
        assert copied.t3.inference.__self__ is copied.t3


def test_weights_come_home_to_be_copied(english: Any, away: set[int]) -> None:
    """A copy whose weights were on two devices could not speak."""
    english.conds = None
    with patched(english):
        assert away
        copy.deepcopy(english)
        assert away == set()


def test_threads_that_patch_at_once_patch_once(english: Any) -> None:
    before = instance_dictionaries(english)
    threads = [threading.Thread(target=patch, args=(english,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    unpatch(english)
    assert instance_dictionaries(english) == before


def test_a_t3_that_came_after_patch_is_reported(english: Any) -> None:
    t3 = english.t3
    with patched(english):
        english.t3 = random_t3("english", "tiny", seed=9, stop_after=12)
        assert row(english, "t3.inference") == (
            "t3.inference", "stock", "torch", "came after patch(); unpatch, then patch"
        )  # fmt: skip
        expected = stock_after_seed(english, 6)
        state = torch.get_rng_state()
        assert same_audio(english.generate(TEXT, seed=6), expected), "the seed holds all the same"
        assert torch.equal(torch.get_rng_state(), state)
        english.t3 = t3


def test_two_models_may_share_a_t3(english: Any) -> None:
    other = object.__new__(type(english))
    vars(other).update(vars(english))
    with patched(english):
        with patched(other):
            assert row(other, "t3.inference").runs == "engine, exact"
            with pytest.raises(RuntimeError, match="T3.inference was replaced after patch"):
                unpatch(english)
        assert row(english, "t3.inference").runs == "engine, exact"


def test_unknown_options_raise_and_change_nothing(english: Any) -> None:
    before = instance_dictionaries(english)
    with pytest.raises(TypeError, match="unknown option 'presicion'; the options are precision,"):
        patch(english, presicion="exact")
    with pytest.raises(ValueError, match="precision must be one of auto, exact, .*, got 'fp8'"):
        patch(english, precision="fp8")
    with pytest.raises(ValueError, match="backend must be one of auto, .*, got 'metal'"):
        patch(english, backend="metal")
    with pytest.raises(TypeError, match="watermark must be True or False, got 1"):
        patch(english, watermark=1)
    assert instance_dictionaries(english) == before


def test_only_chatterbox_objects_are_taken() -> None:
    with pytest.raises(TypeError, match="model must be a ChatterboxTTS, .*, got Linear"):
        patch(torch.nn.Linear(1, 1))


def test_strict_raises_and_leaves_the_model_as_it_was(english: Any) -> None:
    before = instance_dictionaries(english)
    with patched(english, strict=True):
        assert {row(english, site).runs for site in ENGINES} == {"engine, exact"}
    english.s3gen.mel2wav.train()
    before = instance_dictionaries(english)
    refused = pytest.raises(RuntimeError, match="strict=True, but s3gen.vocoder is left to stock")
    with refused:
        patch(english, strict=True)
    assert instance_dictionaries(english) == before
    patch(english, progress=True)
    with refused:
        patch(english, strict=True)
    assert english._chatterbox_fast.options.progress, "the patch that was there is there again"
    unpatch(english)
    english.s3gen.mel2wav.eval()


def test_what_others_replaced_is_left_alone(english: Any) -> None:
    own = english.t3.inference
    english.t3.inference = own
    try:
        with patched(english):
            assert row(english, "t3.inference").why == "replaced by someone else"
            assert english.t3.inference is own
        assert vars(english.t3)["inference"] is own
    finally:
        del english.t3.inference


def test_an_inference_put_into_t3s_class_after_patch_is_called(
    english: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with patched(english):
        monkeypatch.setattr(type(english.t3), "inference", lambda self, **_: (self, "theirs"))
        assert english.t3.inference(t3_cond=None) == (english.t3, "theirs")


def test_another_vocoder_is_left_alone(english: Any) -> None:
    stock, english.s3gen.mel2wav = english.s3gen.mel2wav, torch.nn.Identity()
    try:
        with patched(english):
            assert row(english, "s3gen.flow").runs == "engine, exact"
            assert row(english, "s3gen.vocoder").why == "a Identity has no inference()"
    finally:
        english.s3gen.mel2wav = stock


def test_unpatch_refuses_to_remove_what_others_put_on_top(english: Any) -> None:
    patch(english)
    ours = english.t3.inference
    english.t3.inference = lambda **arguments: ours(**arguments)
    during = instance_dictionaries(english)
    with pytest.raises(RuntimeError, match="T3.inference was replaced after patch"):
        unpatch(english)
    assert instance_dictionaries(english) == during
    english.t3.inference = ours
    unpatch(english)


def test_changes_after_patching_are_noticed(english: Any) -> None:
    t3 = english.t3
    with patched(english):
        first = english.generate(TEXT, seed=3)
        head = t3.speech_head.weight.data.clone()
        t3.speech_head.weight.data[:6561] = head[:6561].flip(0)
        assert not same_audio(english.generate(TEXT, seed=3), first)
        t3.speech_head.weight.data = head
        assert same_audio(english.generate(TEXT, seed=3), first)
        t3.double()
        assert row(english, "t3.inference").runs == "engine, exact"
        float64 = "float64 is computed by the reference alone"
        assert row(english, "  skinny_linear")[2:] == ("torch", float64)
        assert row(english, "  decode_attention")[2:] == ("reference", float64)
        double = copy.copy(english.conds.t3).to(dtype=torch.float64)
        text = torch.tensor([[255, 40, 0]] * 2)
        arguments = {"t3_cond": double, "text_tokens": text, "max_new_tokens": 5}
        torch.manual_seed(1)
        expected = type(t3).inference(t3, **arguments)
        torch.manual_seed(1)
        assert torch.equal(t3.inference(**arguments), expected)
        t3.float()
        t3.half()
        assert "weights are torch.float16" in row(english, "t3.inference").why
        t3.float()
        assert row(english, "t3.inference").runs == "engine, exact"
        t3.train()
        assert row(english, "t3.inference").why == "the module is in training mode"
        t3.eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert row(english, "t3.inference").why == "torch.autocast is on"
            english.t3.inference(t3_cond=english.conds.t3, text_tokens=text, max_new_tokens=3)


def test_the_report_says_what_has_no_engine(english: Any) -> None:
    assert [tuple(line) for line in report(english)] == [("model", "stock", "torch", "not patched")]
    with patched(english, precision="fp16", compile=True, backend="cuda", watermark=False):
        engine = row(english, "t3.inference")
        assert engine.runs == "engine, exact"
        assert engine.backend == "cpu, compiled"
        assert engine.why == "a CPU gains nothing from fp16; graphs are a GPU's"
        flow, vocoder = row(english, "s3gen.flow"), row(english, "s3gen.vocoder")
        assert flow[1:] == (
            "engine, exact", "cpu, compiled", "a CPU gains nothing from fp16; graphs are a GPU's"
        )  # fmt: skip
        assert vocoder[1:] == ("engine, exact", "cpu, compiled", "a CPU gains nothing from fp16")
        assert row(english, "watermark").runs == "none"
        for op in dispatch.OPS:
            if op == "snake":
                assert row(english, "  snake").backend == "reference"  # for torch.compile to fuse
            elif op == "add_norm":
                assert row(english, "  add_norm")[2:] == (
                    "extension",
                    "compiled for cpu; torch's own in the blocks that torch.compile is given",
                )
            else:
                assert row(english, f"  {op}")[2:] == ("extension", "compiled for cpu")
        text = str(report(english))
        assert text.splitlines()[0].split() == ["site", "runs", "backend", "why"]
        assert len(text.splitlines()) == len(report(english)) + 1


def test_the_environment_chooses_the_backend(english: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATTERBOX_FAST_BACKEND", "reference")
    with patched(english, backend="cuda"):
        assert row(english, "  cfg_sample").why == "asked for"
    monkeypatch.setenv("CHATTERBOX_FAST_BACKEND", "cpu")
    with pytest.raises(ValueError, match="CHATTERBOX_FAST_BACKEND must be one of .*, got 'cpu'"):
        patch(english)


def test_public_names() -> None:
    for name in chatterbox_fast.__all__:
        assert getattr(chatterbox_fast, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = chatterbox_fast.nothing


@pytest.mark.parametrize("kind", ["turbo", "vc"])
def test_s3gen_has_an_engine_where_t3_has_none(kind: Any) -> None:
    model = random_model(kind, "tiny")
    with patched(model):
        for site in ("s3gen.flow", "s3gen.vocoder"):
            assert row(model, site).runs == "engine, exact"
        if kind == "turbo":
            assert row(model, "t3.inference_turbo").runs == "stock"
            reason = "no engine yet for the GPT-2 backbone"
            assert row(model, "t3.inference_turbo").why.startswith(reason)


def test_the_two_upstreams_are_told_apart() -> None:
    """By what the module is: the wheel's has an alignment analysis, HEAD's has none."""
    from chatterbox.models.t3 import t3 as stock

    t3 = random_t3("multilingual", "tiny")
    reason = why_unsupported(t3)
    if hasattr(stock, "AlignmentStreamAnalyzer"):
        assert reason == "no engine yet for this release's multilingual alignment analysis"
    else:
        assert reason is None


def test_progress_is_stocks_bar(english: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []
    monkeypatch.setattr(
        "chatterbox_fast.t3.runner.tqdm",
        lambda **options: bars.append(options["disable"]) or tqdm(**{**options, "disable": True}),
    )
    for progress in (False, True):
        with patched(english, progress=progress):
            english.generate(TEXT, seed=1)
    assert bars == [True, False]


def test_a_backbone_that_was_replaced_is_left_alone(english: Any) -> None:
    """Its forward by the user, or the module by torch.compile's."""
    called = []
    backbone = english.t3.tfmr

    def mine(*args: Any, **kwargs: Any) -> Any:
        called.append(1)
        return type(backbone).forward(backbone, *args, **kwargs)

    backbone.forward = mine
    try:
        with patched(english):
            assert "a LlamaModel has a forward of its own" in row(english, "t3.inference").why
            assert backbone.forward is mine
            english.generate(TEXT, seed=1)
            assert called
    finally:
        del backbone.forward
    english.t3.tfmr = torch.compile(backbone, backend="eager")
    try:
        with patched(english):
            assert row(english, "t3.inference").runs == "stock"
            english.generate(TEXT, seed=1)
    finally:
        english.t3.tfmr = backbone


def engines_of(model: Any) -> Engines:
    changes = model._chatterbox_fast.changes
    (engines,) = (change.engines for change in changes if isinstance(change, Packing))
    return engines


def test_the_guard_brings_weights_home_for_good(english: Any) -> None:
    """Whoever calls the backbone itself finds its weights there, and keeps them."""
    with patched(english):
        guard = vars(english.t3.tfmr)["forward"]
        engines = engines_of(english)
        assert engines._may_send(english.t3.tfmr)
        guard(inputs_embeds=torch.zeros(1, 2, english.t3.dim))
        assert not engines._may_send(english.t3.tfmr)
    assert "forward" not in vars(english.t3.tfmr)


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Makes a CPU's engine send matrices away, as a GPU's does; the ids of those that are."""
    there: set[int] = set()
    monkeypatch.setattr(Engine, "replaces_originals", property(lambda _: True))
    for name, change in (("send_to_host", there.update), ("bring_home", there.difference_update)):
        monkeypatch.setattr(
            weights.Originals,
            name,
            lambda self, change=change: change({id(matrix) for matrix in self.matrices}),
        )
    return there


def test_nothing_is_sent_away_once_weights_are_given_back(english: Any, away: set[int]) -> None:
    """unpatch() takes the guard out after: a request in between must not send them again."""
    with patched(english):
        engines = engines_of(english)
        english.generate(TEXT, seed=1)
        assert len(away) == 7 * len(english.t3.tfmr.layers)
        engines.release(english.t3)
        assert away == set()
        english.generate(TEXT, seed=1)
        assert away == set()


def in_training(t3: Any) -> None:
    t3.train()


def with_a_hook(t3: Any) -> None:
    t3.speech_head.register_forward_hook(lambda *_: None)


def with_an_adapter(t3: Any) -> None:
    attention = t3.tfmr.layers[0].self_attn
    attention.q_proj = torch.nn.Sequential(attention.q_proj)


def in_half_precision(t3: Any) -> None:
    t3.half()


@pytest.mark.parametrize("later", [in_training, with_a_hook, with_an_adapter, in_half_precision])
def test_unpatch_brings_weights_home_whatever_became_of_t3(later: Any, away: set[int]) -> None:
    model = random_model("english", "tiny")
    patch(model)
    assert len(away) == 7 * len(model.t3.tfmr.layers)
    later(model.t3)
    assert row(model, "t3.inference").runs == "stock"
    unpatch(model)
    assert away == set()
