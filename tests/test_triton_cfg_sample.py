"""The Triton twin of cfg_sample against the reference: in Triton's interpreter, and compiled.

The interpreter is chosen by an environment variable when triton is imported. It therefore runs in
a process of its own, and the rest of the suite sees triton as it is.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from toolkit import interpreting_triton
from torch import Tensor

from chatterbox_fast import reference
from chatterbox_fast.reference import FAILED, FORCE, KEEP, STOPPED, SUPPRESS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


class Params(NamedTuple):
    """A row of params, in the order of the op."""

    cfg_weight: float = 0.5
    penalty: float = 1.2
    temperature: float = 0.8
    min_p: float = 0.05
    one_minus_top_p: float = 0.0
    top_k: int = 0


OPEN = Params(min_p=0.0, penalty=1.0, temperature=1.0)
GRID = (
    Params(),
    Params(cfg_weight=0.0, temperature=1.3),
    Params(cfg_weight=1.0, penalty=2.0),
    Params(penalty=0.6),
    Params(temperature=0.05),
    Params(temperature=3.0, min_p=0.0),
    Params(min_p=0.5),
    Params(min_p=1.0),
    Params(one_minus_top_p=1 - 0.9),
    Params(one_minus_top_p=1 - 0.4, min_p=0.0, temperature=2.0),
    Params(one_minus_top_p=1 - 0.01, min_p=0.0),
    Params(one_minus_top_p=1.0),
    Params(top_k=1),
    Params(top_k=40, min_p=0.0, temperature=2.0),
    Params(top_k=10**6, min_p=0.0),
    Params(0.3, 1.5, 1.1, 0.02, 1 - 0.95, 30),
    Params(0.8, 0.7, 1.7, 0.001, 1 - 0.6, 299),
)
"""One launch draws from all of them, a row each."""


@dataclass(frozen=True)
class Case:
    """What `check` draws. `rows` are `params`, or repeats of the one there is."""

    params: tuple[Params, ...] = GRID
    rows: int = len(GRID)
    vocabulary: int = 300
    guided: bool = True
    turbo: bool = False
    actions: tuple[int, ...] | None = None
    flags: tuple[int, ...] | None = None
    stop_token: int = 7
    forget: int = -1
    dtype: torch.dtype = torch.float32
    threads: int = 256
    draws: int = 1
    scores: tuple[tuple[float, ...], ...] = ()
    """Logits that every draw has; else they are random."""
    philox: tuple[int, int] | None = None
    """Seed and offset that every row starts from; else they are random."""


class State(NamedTuple):
    """What a draw updates in place."""

    seen: Tensor
    flags: Tensor
    philox: Tensor

    def copy(self) -> State:
        return State(*(tensor.clone() for tensor in self))


def random_state(case: Case, source: torch.Generator) -> State:
    seed = torch.randint(-(2**62), 2**62, (case.rows,), generator=source)
    offset = 4 * torch.randint(0, 2**40, (case.rows,), generator=source)
    seen = torch.rand(case.rows, case.vocabulary, generator=source) < 0.3
    flags = torch.randint(0, 2, (case.rows,), generator=source, dtype=torch.int32) * 4
    if case.flags:
        flags = torch.tensor(case.flags, dtype=torch.int32)
    philox = torch.stack([seed, offset], dim=1)
    if case.philox:
        philox[:] = torch.tensor(case.philox)
    return State(seen, flags, philox)


def logits_of(case: Case, source: torch.Generator) -> Tensor:
    if case.scores:
        rows = [list(row) + [-math.inf] * (case.vocabulary - len(row)) for row in case.scores]
        return torch.tensor(rows).repeat(case.rows // len(rows), 1).to(case.dtype)
    shape = (case.rows * (1 + case.guided), case.vocabulary)
    return (torch.randn(shape, generator=source) * 4).to(case.dtype)


def host_noise(philox: Tensor, vocabulary: int, threads: int) -> Tensor:
    return reference.philox_exponential(philox, vocabulary, threads)


def torchs_noise(philox: Tensor, vocabulary: int, threads: int) -> Tensor:  # noqa: ARG001
    """What torch itself draws on this device."""
    noise = torch.empty(len(philox), vocabulary, device=philox.device)
    for row, (seed, offset) in zip(noise, philox.tolist(), strict=True):
        generator = torch.Generator(philox.device).manual_seed(seed)
        row.exponential_(generator=generator.set_offset(offset))
    return noise


def check(
    case: Case,
    device: str = "cpu",
    noise_of: Callable[[Tensor, int, int], Tensor] = host_noise,
) -> list[list[int]]:
    """Draws `case.draws` times with twin and reference, from one state to the next; all must agree.

    Returns:
        The tokens of each draw, the last flags.
    """
    from chatterbox_fast.triton_kernels.cfg_sample import cfg_sample

    source = torch.Generator().manual_seed(23)
    ours = State(*(tensor.to(device) for tensor in random_state(case, source)))
    expected = ours.copy()
    params = torch.tensor(case.params * (case.rows // len(case.params)), device=device)
    actions = case.actions and torch.tensor(case.actions, dtype=torch.int32, device=device)
    rules = {"stop_token": case.stop_token, "turbo": case.turbo, "forget": case.forget}
    tokens = []
    for draw in range(case.draws):
        logits = logits_of(case, source).to(device)
        noise = noise_of(expected.philox, case.vocabulary, case.threads)
        wanted = reference.cfg_sample(
            logits, expected.seen, params, expected.flags, noise, stop_action=actions, **rules
        )
        expected.philox[:, 1] += reference.philox_increment(case.vocabulary, case.threads)
        token = cfg_sample(
            logits, ours.seen, params, ours.flags, ours.philox, actions, case.threads, **rules
        )
        assert token.dtype == torch.long
        differ = [case.params[i] for i in (token != wanted).nonzero().flatten().tolist()]
        assert not differ, f"draw {draw}: {token.tolist()} for {wanted.tolist()} at {differ}"
        for name, mine, theirs in zip(State._fields, ours, expected, strict=True):
            assert torch.equal(mine, theirs), f"draw {draw}: {name}"
        tokens.append(token.tolist())
    return [*tokens, ours.flags.tolist()]


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[[Case], list[list[int]]]]:
    """`check` in a process where triton interprets."""
    with interpreting_triton() as pool:
        yield lambda case: pool.submit(check, case).result()


@pytest.mark.parametrize("turbo", [False, True])
@pytest.mark.parametrize("guided", [True, False])
def test_tokens_are_the_references(interpreted: Any, guided: bool, turbo: bool) -> None:
    *tokens, _ = interpreted(Case(guided=guided, turbo=turbo, draws=4))
    assert len({token for draw in tokens for token in draw}) > 40


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits(interpreted: Any, dtype: torch.dtype) -> None:
    interpreted(Case(dtype=dtype, draws=2))


@pytest.mark.parametrize(("vocabulary", "threads"), [(1, 256), (256, 256), (2000, 256)])
def test_lanes_and_blocks_of_philox(interpreted: Any, vocabulary: int, threads: int) -> None:
    """Equal scores: the token is the id with the least noise."""
    one = Case((OPEN,), 40, vocabulary, guided=False, threads=threads, stop_token=0)
    equal = replace(one, scores=((0.5,) * vocabulary,))
    tokens, _ = interpreted(equal)
    assert len(set(tokens)) > min(30, vocabulary // 2)


def test_a_uniform_number_of_one(interpreted: Any) -> None:
    """Element 6 of this stream. Its noise is not 0, which would make any id win."""
    scores = ((0.0,) * 6 + (-20.0,) + (0.0,) * 13,)
    case = Case((OPEN,), 1, 20, guided=False, scores=scores, philox=(1, 591304))
    assert host_noise(torch.tensor([case.philox]), 20, 256).argmin() == 6
    tokens, _ = interpreted(case)
    assert tokens != [6]


@pytest.mark.parametrize("turbo", [False, True])
def test_the_real_vocabulary(interpreted: Any, turbo: bool) -> None:
    interpreted(Case(vocabulary=8194, turbo=turbo, threads=2048, stop_token=6562, forget=6561))


@pytest.mark.parametrize("turbo", [False, True])
def test_stop_actions(interpreted: Any, turbo: bool) -> None:
    actions = (KEEP, SUPPRESS, FORCE) * 4
    case = Case((Params(),), 12, turbo=turbo, actions=actions, draws=4, stop_token=9)
    *tokens, flags = interpreted(case)
    assert all(
        (token == 9) == (act == FORCE) for token, act in zip(tokens[0], actions, strict=True)
    )
    assert [flag & STOPPED for flag in flags] == [act == FORCE for act in actions]


def test_the_likeliest_token_is_the_stop_token(interpreted: Any) -> None:
    scores = ((0.0,) * 9 + (30.0,),)
    case = Case((Params(),), 3, guided=False, actions=(KEEP, SUPPRESS, FORCE), scores=scores)
    tokens, flags = interpreted(replace(case, stop_token=9))
    assert tokens[0] == tokens[2] == 9 != tokens[1]
    assert [flag & STOPPED for flag in flags] == [1, 0, 1]


@pytest.mark.parametrize("forget", [0, 9])
def test_forget(interpreted: Any, forget: int) -> None:
    """Also where it is the id just drawn."""
    interpreted(Case((Params(),), 6, actions=(KEEP, FORCE) * 3, stop_token=9, forget=forget))


@pytest.mark.parametrize(
    ("params", "scores", "drawn"),
    [
        (OPEN._replace(top_k=2), (1.0, 3.0, 2.0, 2.0, 0.0, 2.0), {1, 2, 3, 5}),
        (OPEN._replace(top_k=1), (-1.0, 0.0, -2.0, -0.0, -1.0), {1, 3}),
        (OPEN._replace(min_p=1.0), (1.0, 2.0, 0.0, 2.0), {1, 3}),
        (OPEN._replace(one_minus_top_p=0.75), (1.0,) * 10, {0, 1, 2}),
        (OPEN._replace(one_minus_top_p=0.4), (-0.0, 0.0) * 3, {0, 1, 2, 3}),
        (OPEN._replace(one_minus_top_p=1.0), (1.0, 2.0, 0.0, 2.0), {1}),
    ],
)
def test_ties(interpreted: Any, params: Params, scores: tuple[float, ...], drawn: set[int]) -> None:
    case = Case((params,), 24, len(scores), guided=False, scores=(scores,), stop_token=0)
    tokens, _ = interpreted(case)
    assert set(tokens) == drawn


@pytest.mark.parametrize("turbo", [False, True])
@pytest.mark.parametrize("params", [Params(), Params(one_minus_top_p=0.1, top_k=2)])
def test_rows_that_cannot_be_drawn_from(interpreted: Any, turbo: bool, params: Params) -> None:
    """The rows: NaN, its negative, infinite, none finite, one finite."""
    scores = tuple((0.0, 1.0, bad) for bad in (math.nan, -math.nan, math.inf))
    scores = (*scores, (), (-math.inf, -math.inf, 0.5))
    case = Case((params,), 5, 20, guided=False, turbo=turbo, scores=scores, draws=2)
    first, second, flags = interpreted(case)
    assert first == second == [0, 0, 0, 0, 2]
    assert [flag & FAILED for flag in flags] == [FAILED] * 4 + [0]


def test_a_row_that_has_stopped_keeps_its_flags(interpreted: Any) -> None:
    """Rows of NaN, the stop token and another one, with each flag on entry."""
    scores = ((math.nan,), (0.0, 50.0), (50.0, 0.0))
    both = STOPPED | FAILED
    entry = (0, 0, 0, FAILED, FAILED, FAILED, STOPPED, STOPPED, STOPPED, both, both, both)
    case = Case((Params(),), 12, 20, guided=False, scores=scores, flags=entry, stop_token=1)
    tokens, flags = interpreted(case)
    assert tokens == [0, 1, 0] * 4
    assert flags == [FAILED, STOPPED, 0, FAILED, both, FAILED, *entry[6:]]


def test_a_forced_stop_needs_no_logits(interpreted: Any) -> None:
    scores = ((math.nan, 1.0),)
    case = Case((Params(),), 2, 20, guided=False, scores=scores, actions=(FORCE, SUPPRESS))
    tokens, flags = interpreted(replace(case, stop_token=3))
    assert tokens == [3, 0]
    assert [flag & 3 for flag in flags] == [STOPPED, FAILED]


def arguments(**changed: Any) -> dict[str, Any]:
    return {
        "logits": torch.zeros(2, 5),
        "seen": torch.zeros(1, 5, dtype=torch.bool),
        "params": torch.tensor([Params()]),
        "flags": torch.zeros(1, dtype=torch.int32),
        "philox": torch.zeros(1, 2, dtype=torch.long),
        "stop_action": None,
        "threads": 256,
        "stop_token": 3,
    } | changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logits": torch.zeros(2, 4)}, r"logits must be \(1 or 2, 5\) as seen is, got \(2, 4\)"),
        ({"logits": torch.zeros(3, 5)}, r"logits must be \(1 or 2, 5\) as seen is, got \(3, 5\)"),
        ({"logits": torch.tensor(0.0)}, r"logits must be \(1 or 2, 5\) as seen is, got \(\)"),
        ({"logits": torch.zeros(2, 5).double()}, "logits must be float32, float16 or bfloat16"),
        ({"logits": torch.zeros(5, 2).T}, "logits must be contiguous"),
        ({"seen": torch.zeros(5).bool()}, r"seen must be \(R, V\), R at most 64"),
        ({"seen": torch.zeros(1, 5)}, "seen must be torch.bool, got torch.float32"),
        ({"params": torch.zeros(1, 5)}, r"params must be \(1, 6\)"),
        ({"philox": None}, "philox must be given, got None"),
        ({"stop_action": torch.zeros(1)}, "stop_action must be torch.int32"),
        ({"stop_token": 5}, r"stop_token must be in \[0, 5\), got 5"),
        ({"forget": 5}, r"forget must be -1 or in \[0, 5\), got 5"),
        ({"threads": 0}, r"threads must be a positive multiple of 256 below 2\^31, got 0"),
    ],
)
def test_arguments_are_checked(changed: dict[str, Any], message: str) -> None:
    from chatterbox_fast.triton_kernels.cfg_sample import cfg_sample

    with pytest.raises(RuntimeError, match=f"chatterbox_fast::cfg_sample: {message}"):
        cfg_sample(**arguments(**changed))


TYPES = {
    "seen": "*i1",
    "params": "*fp32",
    "flags": "*i32",
    "philox": "*i64",
    "stop_action": "*i32",
    "token": "*i64",
    "threads": "i32",
    "stop_token": "i32",
    "forget": "i32",
}


@pytest.mark.parametrize("turbo", [False, True])
@pytest.mark.parametrize(("architecture", "logits"), [(89, "*fp32"), (90, "*bf16")])
def test_it_compiles(architecture: int, logits: str, turbo: bool) -> None:
    from chatterbox_fast.triton_kernels.cfg_sample import LAUNCH
    from chatterbox_fast.triton_kernels.cfg_sample import cfg_sample_kernel as kernel
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {"VOCABULARY": 8194, "BLOCK": 16384, "GUIDED": True, "TURBO": turbo, "CUDA": True}
    types = TYPES | {"logits": logits} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, {name: types[name] for name in kernel.arg_names}, constants)
    asm = compile(source, target=GPUTarget("cuda", architecture, 32), options=LAUNCH).asm
    assert len(asm["cubin"]) > 0
    assert "fma.rn.f32" not in asm["ptx"], "torch rounds the product first"
    assert "lg2.approx" in asm["ptx"], "torch's noise is of the approximate logarithm"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("turbo", [False, True])
@pytest.mark.parametrize("vocabulary", [300, 6563, 8194, 65536])
def test_tokens_on_a_gpu(vocabulary: int, turbo: bool, dtype: torch.dtype) -> None:
    """With torch's own noise, which the reference's accurate logarithm would not match."""
    device = torch.cuda.get_device_properties("cuda")
    resident = device.multi_processor_count * device.max_threads_per_multi_processor
    threads = reference.philox_threads(vocabulary, resident)
    case = Case(vocabulary=vocabulary, turbo=turbo, dtype=dtype, threads=threads, draws=20)
    check(case, "cuda", torchs_noise)
