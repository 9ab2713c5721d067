"""The benches: what they time is checked, what they note, and how a table shows it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import bench_add_norm
import bench_cfg_sample
import bench_decode_attention
import bench_padded_attention
import bench_resample
import bench_snake
import pytest
import table
import timing
import torch
from test_cfg_sample import FakeGenerator

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("case", bench_cfg_sample.CASES)
def test_what_is_timed_draws_stocks_ids(case: str) -> None:
    row = bench_cfg_sample.Row(*bench_cfg_sample.CASES[case], CPU)
    for make in (bench_cfg_sample.stock, bench_cfg_sample.extension, bench_cfg_sample.reference):
        bench_cfg_sample.verify(row, make(row))
    assert len(set(row.draws(bench_cfg_sample.stock(row)))) > 10


def test_another_place_in_the_stream_is_not_timed() -> None:
    """Although every id drawn is one that stock may draw."""
    row = bench_cfg_sample.Row(*bench_cfg_sample.CASES["english"], CPU)
    right = bench_cfg_sample.extension(row)
    with pytest.raises(AssertionError):
        bench_cfg_sample.verify(row, lambda: (torch.rand(1), right())[1])


def test_another_temperature_is_not_timed() -> None:
    row = bench_cfg_sample.Row(*bench_cfg_sample.CASES["english"], CPU)
    row.params[0, 2] += 0.1
    with pytest.raises(AssertionError):
        bench_cfg_sample.verify(row, bench_cfg_sample.extension(row))


def test_kernels_on_a_gpu_draw_where_stocks_generator_stands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = FakeGenerator(40)
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    row = bench_cfg_sample.Row(*bench_cfg_sample.CASES["turbo"], CPU)
    row.philox = torch.zeros(1, 2, dtype=torch.long)
    row.restart()
    assert row.philox.tolist() == [[-1, 40]]
    assert generator.offset == 40


@pytest.mark.parametrize("case", bench_resample.CASES)
def test_what_is_timed_resamples(case: str) -> None:
    job = bench_resample.Job(*bench_resample.CASES[case], CPU)
    for make in (bench_resample.stock, bench_resample.extension, bench_resample.reference):
        bench_resample.verify(job, make(job))
    with pytest.raises(AssertionError):
        bench_resample.verify(job, lambda: 1.001 * bench_resample.extension(job)())


@pytest.mark.parametrize(
    "case", [c for c in bench_decode_attention.CASES if c.startswith("2 rows, 100 ")]
)
def test_what_is_timed_decodes(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each on caches of its own: what one appends is not there for the next."""
    monkeypatch.setattr(bench_decode_attention, "_BEYOND_CACHES", 2**20)
    arguments = bench_decode_attention.CASES[case]
    makes = (bench_decode_attention.stock, bench_decode_attention.sdpa_in_place,
             bench_decode_attention.sdpa_of_prefix, bench_decode_attention.extension,
             bench_decode_attention.reference)  # fmt: skip
    for make in makes:
        step = bench_decode_attention.Step(*arguments, CPU)
        bench_decode_attention.verify(step, make(step))
    step = bench_decode_attention.Step(*arguments, CPU)
    unrotated = step.qkv[:, 0, :, None].to(step.k.dtype)
    with pytest.raises(AssertionError):
        bench_decode_attention.verify(step, lambda: step.attended(unrotated, 0))


@pytest.mark.parametrize("case", [c for c in bench_padded_attention.CASES if "250" in c])
def test_what_is_timed_attends(case: str) -> None:
    """As stock does, and no matter what pads are; without the length it would not be timed."""
    bucket = bench_padded_attention.Bucket(*bench_padded_attention.CASES[case], CPU)
    makes = (bench_padded_attention.stock, bench_padded_attention.sdpa_of_prefix,
             bench_padded_attention.extension, bench_padded_attention.reference)  # fmt: skip
    for make in makes:
        bench_padded_attention.verify(bucket, make(bucket))
    with pytest.raises(AssertionError):
        bench_padded_attention.verify(bucket, lambda: bucket.by_sdpa(bucket.qkv))


@pytest.mark.parametrize("case", bench_snake.CASES)
def test_what_is_timed_is_snake(case: str) -> None:
    job = bench_snake.Job(*bench_snake.CASES[case], CPU)
    for make in (bench_snake.stock, bench_snake.extension, bench_snake.reference):
        bench_snake.verify(job, make(job))
    with pytest.raises(AssertionError):
        bench_snake.verify(job, lambda: 1.05 * bench_snake.extension(job)())
    if job.residual is not None:
        without_offset = (job.x + job.residual).mT
        with pytest.raises(AssertionError):
            bench_snake.verify(job, lambda: job.module(without_offset).mT)


@pytest.mark.parametrize("case", bench_add_norm.CASES)
def test_what_is_timed_adds_and_norms(case: str) -> None:
    """Without what is added it would not be timed."""
    job = bench_add_norm.Job(*bench_add_norm.CASES[case], CPU)
    for make in (bench_add_norm.stock, bench_add_norm.extension, bench_add_norm.reference):
        bench_add_norm.verify(job, make(job))
    expected = job.expected()
    wrong = expected - job.shift if job.shift is not None else job.norm(job.x.float())
    with pytest.raises(AssertionError):
        bench_add_norm.verify(job, lambda: wrong)


# ---- time in a CUDA graph


class FakeCuda:
    """What `timing` uses of torch.cuda, with a device whose clock only kernels move."""

    def __init__(self) -> None:
        self.clock_us, self.mode, self.graphs = 0.0, 0, 0
        self.work: list[float] | None = None
        self.Stream = object

    def kernel(self, us: float, waits: bool = False) -> None:
        if waits and self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation\nin a trial")
        if self.work is None:
            self.clock_us += us
        else:
            self.work.append(us)

    def synchronize(self) -> None:
        pass

    def get_sync_debug_mode(self) -> int | str:
        return self.mode

    def set_sync_debug_mode(self, mode: int | str) -> None:
        self.mode = mode

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        assert type(stream) is self.Stream
        yield

    def CUDAGraph(self) -> Any:
        self.graphs += 1
        work: list[float] = []
        return SimpleNamespace(work=work, replay=lambda: self.kernel(sum(work)))

    @contextmanager
    def graph(self, graph: Any, stream: object) -> Iterator[None]:
        assert type(stream) is self.Stream
        self.work = graph.work
        yield
        self.work = None

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        event = SimpleNamespace(synchronize=self.synchronize)
        event.record = lambda: setattr(event, "at", self.clock_us)
        event.elapsed_time = lambda end: 1e-3 * (end.at - event.at)
        return event


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(timing, "torch", SimpleNamespace(cuda=fake))
    return fake


def test_the_time_in_a_graph_is_that_of_one_call(cuda: FakeCuda) -> None:
    us, no_graph = timing.graph_time(CUDA, lambda: cuda.kernel(3.0))
    assert us == pytest.approx(3.0)
    assert no_graph is None
    assert cuda.clock_us == pytest.approx(3.0 * (1 + timing.GRAPH_CALLS * timing.ROUNDS))
    assert cuda.mode == 0


def test_a_call_that_waits_is_not_captured(cuda: FakeCuda) -> None:
    """A capture would fail, and leave torch's generator unusable."""
    got = timing.graph_time(CUDA, lambda: cuda.kernel(3.0, waits=True))
    assert got == (None, "called a synchronizing CUDA operation")
    assert cuda.graphs == 0
    assert cuda.mode == 0


def test_a_cpu_has_no_graph() -> None:
    times = SimpleNamespace(stats=SimpleNamespace(data=[2e-6, 1e-6, 3e-6]))
    benchmark = SimpleNamespace(extra_info={}, stats=times, pedantic=lambda *_, **__: None)
    timing.measure(benchmark, CPU, lambda: None, 1)
    assert benchmark.extra_info["median_us"] == pytest.approx(2.0)
    assert benchmark.extra_info["graph_us"] is None
    assert benchmark.extra_info["no_graph"] == "no CUDA graph on a CPU"


@pytest.mark.gpu
def test_graphs_on_a_gpu() -> None:
    x = torch.rand(2**20, device="cuda")
    us, no_graph = timing.graph_time(CUDA, lambda: x.exponential_())
    assert us is not None
    assert us > 0
    assert no_graph is None
    us, no_graph = timing.graph_time(CUDA, lambda: x.sum().item())
    assert us is None
    assert "synchronizing" in str(no_graph)
    assert 0 < x.exponential_().mean().item() < 2, "torch's generator draws on"


# ---- tables


def result(implementation: str, **info: Any) -> dict[str, Any]:
    times = {"median_us": 20.0, "p20_us": 19.0, "p80_us": 22.0, "timing": "warm"}
    return {
        "group": "op, a, cuda",
        "extra_info": {"implementation": implementation} | times | info,
    }


def table_of(*results: dict[str, Any]) -> list[str]:
    machine = {"device": "GPU", "threads": 2, "torch": "2.11"}
    return table.bench_table({
        "benchmarks": results,
        "machine_info": {"measured": machine},
        "commit_info": {"dirty": True, "id": "0123456789"},
        "datetime": "2026-11-23T01:00:00",
    }).splitlines()  # fmt: skip


def test_a_table_has_a_row_for_a_case() -> None:
    """Ours by the faster of its backends, against stock and the fastest of what is not ours."""
    header, rule, row, _, conditions = table_of(
        result("stock"),
        result("stock_compiled", median_us=12.0),
        result("sdpa", median_us=11.0),
        result("extension", median_us=5.0, graph_us=3.14, timing="cold"),
        result("triton", median_us=4.0, graph_us=None),
        result("reference", median_us=1.0),
    )
    names = ("case", "stock", "fastest other baseline", "extension", "triton", "stock / ours")
    assert header == f"| {' | '.join(names)} |"
    assert rule == "|---" * len(names) + "|"
    cells = ("op, a, cuda", "20 µs (19 – 22)", "11 µs, sdpa",
             "5 µs (19 – 22); 3.1 µs in a graph", "4 µs (19 – 22)", "5.00×")  # fmt: skip
    assert row == f"| {' | '.join(cells)} |"
    assert ", warm; cold, " in conditions
    assert conditions.endswith(", commit 0123456+.")


def test_a_table_of_stock_alone() -> None:
    header, _, row, *_ = table_of(result("stock"))
    assert header == "| case | stock | fastest other baseline | stock / ours |"
    assert row == "| op, a, cuda | 20 µs (19 – 22) | – | – |"


@pytest.mark.parametrize(
    ("key", "results"),
    [
        ("benchmarks", [result("stock"), result("extension", median_us=5.0)]),
        ("s3gen", [
            {"stage": stage, "variant": "stock", "seconds_of_audio": 2.0, "median_ms": 10.0}
            for stage in ("encoder", "solver")
        ]),
        ("end_to_end", [
            {"variant": "stock", "seconds_of_audio": 5.0, "stages": {"t3": 1.0, "total": 1.0}}
        ]),
    ],
)  # fmt: skip
def test_results_are_drawn(key: str, results: list[dict[str, Any]], tmp_path: Path) -> None:
    table.PICTURES[key]({key: results}, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_bars_are_times_of_stocks_speed(tmp_path: Path) -> None:
    from matplotlib import pyplot

    raw = {"benchmarks": [result("stock"), result("extension", median_us=5.0)]}
    with mock.patch.object(pyplot.Axes, "barh") as bars:
        table.draw(raw, tmp_path / "a.png")
    assert bars.call_args.args == (["op, a, cuda"], [4.0])


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (12.3456, "12.35 s"), (1.0, "1.00 s"), (0.9996, "1.00 s"), (0.9994, "999 ms"),
        (0.5, "500 ms"), (0.0432, "43.2 ms"), (0.00524, "5.24 ms"), (0.0, "0.00 ms"),
    ],
)  # fmt: skip
def test_a_time_has_three_figures(seconds: float, shown: str) -> None:
    assert table._clock(seconds) == shown


def test_pages_that_are_not_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo's results: with --check they are said to be, else made anew."""
    stock, ours = {"t3": 4.0, "total": 6.0}, {"t3": 2.0, "total": 4.0}
    raw = {
        "stock_seconds": stock, "patched_seconds": ours, "token_count": 50, "audio_seconds": 2.0,
        "machine": {"device": "GPU", "threads": 2, "torch": "2.11"}, "tokens_equal": 50,
        "mel_difference": 1e-6, "audio_difference": 1e-6, "weights": "random",
        "when": "2026-11-23T01:00:00", "commit": "0123456",
    }  # fmt: skip
    (tmp_path / "demo.json").write_text(json.dumps(raw))
    for name, value in (("ROOT", tmp_path), ("RESULTS", tmp_path), ("PAGES", ("a.md", "b.md"))):
        monkeypatch.setattr(table, name, value)
    stale = "before\n<!-- table: demo.json -->\nold\n<!-- end -->\nafter\n"
    (tmp_path / "a.md").write_text(stale)
    (tmp_path / "b.md").write_text("no table\n")
    assert table.main(["--check"]) == 1
    assert (tmp_path / "a.md").read_text() == stale
    assert table.main([]) == 0
    lines = (tmp_path / "a.md").read_text().splitlines()
    assert lines[:2] == ["before", "<!-- table: demo.json -->"]
    assert lines[-2:] == ["<!-- end -->", "after"]
    assert "| t3 | 4.00 s | 2.00 s | 2.00× |" in lines
    assert "| T3 tokens/s | 12.50 | 25.00 | 2.00× |" in lines
    assert "| real-time factor | 3.00 | 2.00 | 1.50× |" in lines
    assert table.main(["--check"]) == 0
