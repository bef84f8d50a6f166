"""The command and the clock of the GPU benchmark, without a GPU."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import gpu, gpu_experts, gpu_heads
from benchmarks.experts import Sizes
from benchmarks.gpu_heads import HeadSizes
from benchmarks.gpu_machine import Ceilings, Machine, Timing, Trace, relative_error
from benchmarks.measure import Row


def _run(
    machine: Machine, subjects: gpu.Subjects, capsys: pytest.CaptureFixture[str]
) -> tuple[int, list[list[str]], str]:
    kept: list[list[str]] = []
    code = gpu.run(machine, subjects, lambda rows: kept.append([row["name"] for row in json.loads(json.dumps(rows))]))
    return code, kept, capsys.readouterr().out


def _good(machine: Machine) -> Iterator[Row]:
    yield machine.row("good/met", 3.0, 2.0)
    yield machine.row("good/missed", 1.0, 2.0)


def _broken(machine: Machine) -> Iterator[Row]:
    yield machine.row("broken/first", 3.0, 2.0)
    raise RuntimeError("out of memory")


def _wrong(machine: Machine) -> Iterator[Row]:
    yield machine.row("wrong/case", 3.0, 2.0, equal=False, error="no such kernel")


def test_a_subject_that_fails_is_reported_and_the_others_still_run(
    machine: Machine, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Its rows so far are kept, rows are handed over after every subject, and the command fails."""
    code, kept, shown = _run(machine, {"broken": _broken, "good": _good}, capsys)
    assert code == 1
    assert kept == [["broken/first"], ["broken/first", "good/met", "good/missed"]]
    assert "broken failed" in caplog.text
    assert "good/missed" in shown


@pytest.mark.parametrize(("measure", "expected"), [(_good, 0), (_wrong, 1)], ids=["missed bar", "outputs disagree"])
def test_only_outputs_that_disagree_fail_the_command(
    machine: Machine, measure: Callable[[Machine], Iterator[Row]], expected: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missed bar is a measurement."""
    code, _, shown = _run(machine, {"subject": measure}, capsys)
    assert code == expected
    if expected:
        assert "outputs disagree: no such kernel" in shown


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is written."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^error: benchmarks\.gpu must run on a machine with a CUDA GPU, found none$"):
        gpu.main(["--output", str(tmp_path / "gpu.json")])
    assert list(tmp_path.iterdir()) == []


def test_the_file_has_the_agreed_names(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of `benchmarks.run` too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "Machine", lambda: machine)
    output = tmp_path / "gpu.json"
    assert gpu.main(["--output", str(output), "--only", "good"], {"wrong": _wrong, "good": _good}) == 0
    rows = json.loads(output.read_text(encoding="utf-8"))
    assert [set(row) for row in rows] == [{"name", "ratio", "bar", "equal", "detail"}] * 2
    assert rows[0]["detail"]["versions"] == {"gpu": "none"}


# The machine


class FakeEvent:
    """Of a clock that each call moves on."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        """Keep the time."""
        self.at = FakeEvent.now

    def elapsed_time(self, other: FakeEvent) -> float:
        """Milliseconds."""
        return other.at - self.at


def test_clocks_take_turns_with_cold_caches(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Median and least of at least ten rounds, every other one in reverse order, each call after a flush."""
    calls: list[str] = []

    def spend(name: str, milliseconds: float) -> None:
        calls.append(name)
        FakeEvent.now += milliseconds * (3 if len(calls) == 3 else 1)  # the first function's first call but one

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    bench = machine
    bench._cold = SimpleNamespace(zero_=lambda: spend("flush", 100.0))  # type: ignore[assignment]
    first, second = Machine.time(bench, [partial(spend, "a", 1.0), partial(spend, "b", 2.0)], seconds=0.0)
    assert (first, second) == (Timing(1000.0, 1000.0), Timing(2000.0, 2000.0))
    assert calls[::2] == ["flush"] * (len(calls) // 2)
    assert calls[1::2] == list("ab" * 2 + "ba" + "abba" * 4)[: len(calls) // 2]
    assert len(calls) == 2 * 2 * 11


class FakeProfile:
    """Saw two kernels and a copy of 2 microseconds each, and three waits, or of an idle call one wait."""

    calls = 0

    def __enter__(self) -> FakeProfile:
        FakeProfile.calls += 1
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def events(self) -> list[SimpleNamespace]:
        """Of the device and of the driver."""
        lasting = SimpleNamespace(elapsed_us=lambda: 2.0)
        names = ["kernel", "Memcpy DtoH", "kernel"] if FakeProfile.calls == 1 else []
        waits = ["cudaStreamSynchronize"] * 2 * bool(names) + ["cudaDeviceSynchronize", "cudaMemcpyAsync"]
        kinds = {DeviceType.CUDA: names, DeviceType.CPU: waits}
        return [
            SimpleNamespace(name=name, device_type=kind, time_range=lasting) for kind in kinds for name in kinds[kind]
        ]


def test_launches_and_waits_are_counted_without_those_of_the_profiler(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy keeps the device busy and is no launch; a copy that nothing waits for is no wait."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.profiler, "profile", FakeProfile)
    assert Machine.trace(machine, lambda: None) == Trace(["kernel", "kernel"], 6.0, 2)


def test_what_cannot_be_captured_is_timed_as_it_is(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Aloud, and marked."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def waits() -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    assert Machine.captured(machine, waits) == (waits, False)
    assert "synchronizing" in caplog.text
    replay, captured = Machine.captured(machine, lambda: torch.ones(1))
    assert (replay(), captured) == (torch.ones(1), True)


def test_floor_is_the_larger_of_arithmetic_and_memory() -> None:
    """In microseconds; the hand-worked layer and heads of the docstrings."""
    ceilings = Ceilings(bytes_per_second=1e6, flops_per_second=1e6)
    assert (ceilings.floor(2.0, 3.0), ceilings.floor(5.0, 3.0)) == (3.0, 5.0)
    subset = torch.tensor([[True], [False]])
    assert gpu_experts.layer_work(Sizes(num_tokens=2, hidden_size=3, intermediate_size=2), subset, 2) == (36.0, 54.0)
    one = HeadSizes(num_sequences=1, num_queries=1, num_keys=2, num_heads=1, head_size=2, hidden_size=4)
    flops, _ = gpu_heads.work(one, torch.ones(1, 1, 1, dtype=torch.bool), 2)
    assert flops == 48.0


def test_error_is_relative_and_nan_is_infinitely_wrong() -> None:
    """Several tensors count alike, whatever their size."""
    two = torch.tensor([2.0])
    assert relative_error([torch.tensor([2.2])], [two]) == pytest.approx(0.1, rel=1e-5)
    assert relative_error([torch.tensor([math.nan])], [two]) == math.inf
    assert relative_error([two, two], [two, 2 * two]) == pytest.approx(0.5 / 2**0.5)
    assert relative_error([two], [torch.zeros(1)]) == math.inf
