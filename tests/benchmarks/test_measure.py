"""Outputs come before speed, clocks take turns, and the file says what the screen says."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import experts
from benchmarks.measure import Measured, Row, agree, compare, interleave
from benchmarks.run import main

FOURFOLD: Measured = (4.0, {"ours_ms": 1.0, "other_ms": 4.0})


def _refuse_to_measure() -> Measured:
    raise AssertionError("measured although the outputs disagree")


def _fast() -> Iterator[Row]:
    yield compare("fast/met", bar=2.0, equal=True, measure=lambda: FOURFOLD)


def _slow() -> Iterator[Row]:
    yield compare("slow/missed", bar=8.0, equal=True, measure=lambda: FOURFOLD)


def _wrong() -> Iterator[Row]:
    yield compare("wrong/case", bar=2.0, equal=False, measure=_refuse_to_measure)


def _bench(output: Path, *subjects: Callable[[], Iterator[Row]], only: str | None = None) -> tuple[int, list[dict]]:
    arguments = ["--output", str(output), *(["--only", only] if only else [])]
    code = main(arguments, {subject.__name__.strip("_"): subject for subject in subjects})
    return code, json.loads(output.read_text(encoding="utf-8"))


def test_outputs_that_disagree_have_no_ratio_and_fail_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is timed, the file holds null, the table says why, and the others are still measured."""
    code, rows = _bench(tmp_path / "out.json", _wrong, _fast)
    assert code == 1
    assert [(row["name"], row["ratio"], row["equal"]) for row in rows] == [
        ("wrong/case", None, False),
        ("fast/met", 4.0, True),
    ]
    assert "outputs disagree" in capsys.readouterr().out


def test_a_missed_bar_is_shown_and_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is a measurement; the figures are in the file under the agreed names."""
    code, rows = _bench(tmp_path / "new" / "out.json", _fast, _slow)
    assert code == 0
    assert [set(row) for row in rows] == [{"name", "ratio", "bar", "equal", "detail"}] * 2
    assert rows[1]["bar"] == 8.0
    assert rows[1]["detail"]["other_ms"] == 4.0
    assert rows[1]["detail"]["versions"]["torch"] == torch.__version__
    shown = capsys.readouterr().out
    assert "met" in shown
    assert "missed" in shown


def test_one_subject_runs_alone(tmp_path: Path) -> None:
    """The others are not even begun; an unknown one is refused with the names of all."""
    code, rows = _bench(tmp_path / "out.json", _wrong, _fast, only="fast")
    assert (code, [row["name"] for row in rows]) == (0, ["fast/met"])
    with pytest.raises(SystemExit, match="only must be one of wrong, fast, got 'quick'"):
        _bench(tmp_path / "out.json", _wrong, _fast, only="quick")


def test_a_row_refuses_a_ratio_of_outputs_that_disagree() -> None:
    """However it was made."""
    with pytest.raises(ValueError, match="ratio must be None where outputs disagree"):
        Row(name="wrong/case", ratio=4.0, bar=2.0, equal=False, detail={})


def test_clocks_take_turns_and_keep_the_shortest() -> None:
    """One call each before the clock starts; every other round runs in reverse order."""
    calls: list[str] = []
    now = 0.0
    lengths = {"first": iter([100.0, 5.0, 2.0, 9.0]), "second": iter([100.0, 7.0, 8.0, 3.0])}

    def spend(name: str) -> None:
        nonlocal now
        calls.append(name)
        now += next(lengths[name])

    functions = [lambda: spend("first"), lambda: spend("second")]
    assert interleave(functions, seconds=0.0, rounds=3, clock=lambda: now) == [2.0, 3.0]
    assert calls == ["first", "second", *("first", "second"), *("second", "first"), *("first", "second")]


def test_rounds_go_on_until_the_time_is_over() -> None:
    """A function of one second runs eight times in eight seconds, besides the call before the clock."""
    now = 0.0

    def spend() -> None:
        nonlocal now
        now += 1.0

    assert interleave([spend], seconds=8.0, rounds=3, clock=lambda: now) == [1.0]
    assert now == 9.0


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [([1.0, 2.0], [1.0, 2.0005], True), ([1.0, 2.0], [1.0, 2.1], False), ([float("nan")], [float("nan")], False)],
    ids=["rounding", "another number", "not a number"],
)
def test_agreement(first: list[float], second: list[float], expected: bool) -> None:
    """Rounding is forgiven, NaN is not."""
    assert agree(torch.tensor(first), torch.tensor(second)) is expected


def test_without_transformers_its_rows_are_left_out_aloud(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line names rows and remedy; the loop is still measured, by its worst size."""
    times = iter([(1.0, 3.0), (1.0, 2.0), (1.0, 5.0)])
    monkeypatch.setattr(experts.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(experts, "interleave", lambda functions, **_: next(times))
    sizes = [
        experts.Sizes(num_tokens=tokens, hidden_size=8, intermediate_size=4, num_experts=4) for tokens in (1, 3, 5)
    ]
    monkeypatch.setattr(experts, "LOOP_SIZES", sizes)
    with caplog.at_level(logging.WARNING):
        rows = list(experts.rows())
    assert [(row.name, row.ratio) for row in rows] == [("experts/plain-loop", 2.0)]
    (record,) = caplog.records
    assert "pip install -e '.[bench]'" in record.getMessage()
