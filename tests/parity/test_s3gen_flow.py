"""S3Gen's flow solver against stock's, called in the test: mel, generator state, and who runs."""

from __future__ import annotations

import copy
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from toolkit import Dispatched
from torch import Tensor, nn

from chatterbox_fast import patched, report
from chatterbox_fast.modules import signature
from chatterbox_fast.s3gen import flow
from chatterbox_fast.s3gen.engine import MOST_TABLES, FlowEngine, FlowEngines
from chatterbox_fast.s3gen.support import why_unsupported
from chatterbox_fast.sites import flow_site
from chatterbox_fast.testing import random_s3gen


@pytest.fixture(scope="module", params=[False, True], ids=["cfg", "meanflow"])
def decoder(request: pytest.FixtureRequest) -> Any:
    return random_s3gen("tiny", meanflow=request.param).flow.decoder


@pytest.fixture(scope="module")
def guided() -> Any:
    return random_s3gen("tiny").flow.decoder


def inputs(length: int, seed: int = 0, rows: int = 1) -> dict[str, Tensor]:
    """What the flow gets: mu of unit size, a speaker, a prompt of a third."""
    source = torch.Generator().manual_seed(seed)
    cond = torch.zeros(rows, 80, length)
    cond[..., : length // 3] = torch.randn(rows, 80, length // 3, generator=source)
    return {
        "mu": torch.randn(rows, 80, length, generator=source),
        "mask": torch.ones(rows, 1, length),
        "spks": torch.randn(rows, 80, generator=source),
        "cond": cond,
    }


def replacement(decoder: Any) -> Any:
    """The forward that patch() would put on `decoder`."""
    (change,) = flow_site(decoder).changes()
    return change.replacement  # type: ignore[attr-defined]


def relative(ours: Tensor, stocks: Tensor) -> float:
    return float((ours - stocks).abs().max() / stocks.abs().max())


def both(decoder: Any, seed: int = 3, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Mel of the replacement and of stock, from the same generator state, which ends equal."""
    torch.manual_seed(seed)
    stocks, _ = type(decoder).forward(decoder, **arguments)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    ours, nothing = replacement(decoder)(**arguments)
    assert nothing is None
    assert torch.equal(torch.get_rng_state(), state)
    assert ours.shape == stocks.shape
    assert ours.is_contiguous()
    return ours, stocks


# ---- results


@pytest.mark.parametrize("length", [1, 2, 3, 57, 130])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_mel_and_generator_state_are_stocks(decoder: Any, length: int, steps: int) -> None:
    meanflow = decoder.estimator.meanflow
    arguments = {**inputs(length), "n_timesteps": steps, "meanflow": meanflow}
    assert relative(*both(decoder, **arguments)) < 1e-5


def test_error_against_float64_is_stocks(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock does not compute in float64; ours does, and is the measure of both."""
    given, noise = inputs(60), torch.randn(1, 80, 60)
    wide = copy.deepcopy(decoder).double()
    of = ("mu", "spks", "cond")
    oracle = FlowEngine(wide).mel(wide, noise.double(), *(given[name].double() for name in of), 10)
    ours = FlowEngine(decoder).mel(decoder, noise, *(given[name] for name in of), 10)
    monkeypatch.setattr(torch, "randn_like", lambda _: noise.clone())
    meanflow = decoder.estimator.meanflow
    stocks, _ = type(decoder).forward(decoder, **given, n_timesteps=10, meanflow=meanflow)
    own, theirs = (float((mel - oracle).norm()) for mel in (ours, stocks))
    assert own <= 2 * theirs
    assert theirs < 1e-5 * float(oracle.norm())


def test_noised_mels_follow_the_prompts_noise(decoder: Any) -> None:
    """What Turbo passes."""
    arguments = {**inputs(50), "n_timesteps": 2, "meanflow": decoder.estimator.meanflow}
    plain, _ = both(decoder, **arguments)
    noised = torch.randn(1, 80, 30)
    ours, stocks = both(decoder, **arguments, noised_mels=noised)
    assert relative(ours, stocks) < 1e-5
    assert relative(ours, plain) > 1e-2


def test_what_it_is_given_matters(decoder: Any) -> None:
    arguments = {**inputs(50), "n_timesteps": 2, "meanflow": decoder.estimator.meanflow}
    ours, _ = both(decoder, **arguments)
    for name in ("mu", "spks", "cond"):
        changed, _ = both(decoder, **{**arguments, name: arguments[name] * 1.1})
        assert relative(changed, ours) > 1e-3, name


def test_inputs_are_not_written_to(decoder: Any) -> None:
    arguments = {**inputs(20), "noised_mels": torch.randn(1, 80, 10)}
    before = {name: tensor.clone() for name, tensor in arguments.items()}
    both(decoder, **arguments, n_timesteps=2, meanflow=decoder.estimator.meanflow)
    assert all(torch.equal(arguments[name], before[name]) for name in arguments)


def test_requests_at_once_equal_requests_in_turn(guided: Any) -> None:
    solve = FlowEngine(guided).mel
    jobs = [(inputs(30 + n, seed=n), torch.randn(1, 80, 30 + n), 2 + n % 3) for n in range(8)]

    def run(job: tuple[dict[str, Tensor], Tensor, int]) -> Tensor:
        given, noise, steps = job
        return solve(guided, noise, given["mu"], given["spks"], given["cond"], steps)

    one_by_one = [run(job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        for ours, expected in zip(pool.map(run, jobs), one_by_one, strict=True):
            assert torch.equal(ours, expected)


# ---- what it keeps


def test_tables_are_few_and_computed_once(guided: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, made = FlowEngine(guided), Counter[int]()
    real = flow.time_table

    def counted(decoder: Any, steps: int, *rest: Any) -> Any:
        made[steps] += 1
        return real(decoder, steps, *rest)

    monkeypatch.setattr("chatterbox_fast.s3gen.engine.time_table", counted)
    first = engine.table(guided, 1)
    for steps in range(2, MOST_TABLES + 1):
        engine.table(guided, steps)
    assert engine.table(guided, 1) is first
    engine.table(guided, MOST_TABLES + 1)  # 2 goes
    assert engine.table(guided, 1) is first
    assert made.total() == MOST_TABLES + 1
    engine.table(guided, 2)
    assert made[2] == 2


def test_weights_that_change_are_seen(guided: Any) -> None:
    changed = copy.deepcopy(guided)
    arguments = {**inputs(20), "n_timesteps": 2}
    solve = replacement(changed)
    torch.manual_seed(0)
    before, _ = solve(**arguments)
    with torch.no_grad():
        changed.estimator.mid_blocks[0][0].res_conv.weight.mul_(1.5)
    torch.manual_seed(0)
    after, _ = solve(**arguments)
    torch.manual_seed(0)
    stocks, _ = type(changed).forward(changed, **arguments)
    assert relative(after, stocks) < 1e-5
    assert relative(after, before) > 1e-3


def test_an_engine_is_kept_and_a_copy_has_its_own(guided: Any) -> None:
    engines, copied = FlowEngines(), copy.deepcopy(guided)
    assert engines.of(guided) is engines.of(guided)
    assert engines.of(copied) is not engines.of(guided)
    assert signature(copied) != signature(guided)


# ---- who runs


def deep(size: str = "tiny") -> Any:
    """A flow of stock's depth: its middle blocks are the first one, again and again."""
    decoder = random_s3gen(size).flow.decoder  # type: ignore[arg-type]
    first = decoder.estimator.mid_blocks[0]
    assert len(first[1]) <= 4
    for block in (first, *decoder.estimator.down_blocks, *decoder.estimator.up_blocks):
        block[1] = nn.ModuleList([block[1][0]] * 4)
    decoder.estimator.mid_blocks = nn.ModuleList([first] * 12)
    return decoder


def test_what_ten_steps_dispatch_at_full_depth() -> None:
    """Stock dispatches 12,000, and looks at the host in every block."""
    decoder = deep()
    engine, given, noise = FlowEngine(decoder), inputs(8), torch.randn(1, 80, 8)
    arguments = (decoder, noise, given["mu"], given["spks"], given["cond"], 10)
    engine.mel(*arguments)  # the table of ten steps
    with Dispatched() as ours:
        mel = engine.mel(*arguments)
    assert mel.isfinite().all()
    assert ours.looks() == 0
    with Dispatched() as stocks:
        type(decoder).forward(decoder, **given, n_timesteps=10)
    assert stocks.looks() == 140
    assert ours.ops.total() <= 7000 <= 12000 <= stocks.ops.total()


class Renamed(nn.Linear):
    """A layer of somebody else."""


def _swap(decoder: Any) -> None:
    decoder.estimator.mid_blocks[0][0].mlp[1] = Renamed(8, 8)


def _half(decoder: Any) -> None:
    decoder.half()


def _hook(decoder: Any) -> None:
    decoder.estimator.final_proj.register_forward_hook(lambda *_: None)


def _forward(decoder: Any) -> None:
    decoder.estimator.forward = lambda *_: None


def _chunks(decoder: Any) -> None:
    decoder.estimator.static_chunk_size = 4


def _schedule(decoder: Any) -> None:
    decoder.t_scheduler = "linear"


def _scale(decoder: Any) -> None:
    decoder.estimator.mid_blocks[0][1][0].attn1.scale = 1.0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_swap, "a Renamed is in the flow"),
        (_half, "torch.float16 on cpu; the engine takes float32"),
        (nn.Module.double, "torch.float64 on cpu; the engine takes float32"),
        (_hook, "a forward hook on a Conv1d would not be called"),
        (_forward, "the forward of a ConditionalDecoder is replaced"),
        (_chunks, "attends in chunks"),
        (_schedule, "the schedule is 'linear', not 'cosine'"),
        (_scale, "an Attention does more than Chatterbox's"),
        (nn.Module.train, "training mode"),
    ],
)
def test_what_is_not_known_is_left_to_stock(guided: Any, change: Any, reason: str) -> None:
    assert why_unsupported(guided) is None
    odd = copy.deepcopy(guided)
    change(odd)
    assert reason in str(why_unsupported(odd))
    row = flow_site(odd).describe()[0]
    assert (row.runs, reason in row.why) == ("stock", True)


@pytest.mark.parametrize("case", ["batch", "short mask", "no speaker", "autocast"])
def test_calls_that_stock_must_serve(
    guided: Any, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {**inputs(12, rows=2 if case == "batch" else 1), "n_timesteps": 1}
    if case == "short mask":
        arguments["mask"][..., 9:] = 0
    if case == "no speaker":
        arguments["spks"] = None
    monkeypatch.setattr(FlowEngine, "mel", None)
    solve, stock = replacement(guided), type(guided).forward
    with torch.autocast("cpu", enabled=case == "autocast"):
        if case == "no speaker":  # stock's own error
            for forward in (solve, lambda **named: stock(guided, **named)):
                with pytest.raises(AttributeError, match="NoneType"):
                    forward(**arguments)
            return
        torch.manual_seed(1)
        expected, _ = stock(guided, **arguments)
        torch.manual_seed(1)
        assert torch.equal(solve(**arguments)[0], expected)


def test_patch_puts_it_there_and_unpatch_takes_it_away(english: Any) -> None:
    decoder = english.s3gen.flow.decoder
    with patched(english):
        assert "forward" in vars(decoder)
        rows = {row.site: row for row in report(english)}
        assert rows["s3gen.flow.decoder"].runs == "engine, exact"
        assert "encoder, vocoder" in rows["s3gen, the rest"].why
    assert "forward" not in vars(decoder)
