from __future__ import annotations

import io
import json
import math
from types import SimpleNamespace

import pytest

from evaluation import (
    Check,
    Evaluation,
    Interval,
    build_evaluation,
    check_lines,
    check_native,
    compare,
    comparison_table,
    load_evaluation,
    report_console,
    rivals_table,
    score_all,
    summarize,
    summary_table,
    tradeoff_table,
    write_evaluation,
)
from evaluation.evaluator import Evaluator
from moe_backbone import best_units

POINT_KEYS = {
    "router", "setting", "seed", "compute", "router_overhead", "compute_total", "accuracy", "log_likelihood",
    "accuracy_retained", "delta_log_likelihood", "units_per_token", "distinct_units", "load_cv", "seconds",
    "causal", "selection",
    "max_vio", "dead_units", "diversity", "busiest_load",
}  # fmt: skip


@pytest.fixture
def selection(tiny_backbone, tiny_corpus):
    return Evaluator(tiny_backbone, tiny_corpus.train, max_tokens=160, batch_sequences=2)


@pytest.fixture
def evaluation(evaluator, selection):
    one_unit = SimpleNamespace(select=lambda view: best_units(view.scores, 1))
    specs = [
        SimpleNamespace(name=name, setting={"count": 1, "seed": 0}, router=one_unit) for name in ("learned", "other")
    ]
    whole = Evaluation(
        selection=selection,
        held_out=evaluator,
        specs=specs,
        scored=score_all(specs, selection, evaluator),
        bounds=frozenset(),
        checks=check_native(evaluator.native, evaluator.native),
    )
    return build_evaluation(whole, corpus="words", backbone="tiny", sha256="0" * 64, parameters=123)


def test_schema_has_exactly_the_agreed_keys(evaluation):
    assert set(evaluation) == {
        *("schema", "corpus", "backbone", "native", "points", "summary", "comparisons", "checks", "oracle", "control"),
    }
    assert set(evaluation["corpus"]) == {"name", "split", "tokens", "documents", "selection"}
    assert (evaluation["corpus"]["split"], evaluation["corpus"]["selection"]["split"]) == ("test", "train")
    assert set(evaluation["corpus"]["selection"]) == {"split", "tokens", "documents"}
    assert set(evaluation["backbone"]) == {"name", "sha256", "parameters", "sites"}
    assert set(evaluation["native"]) == {"accuracy", "log_likelihood"}
    assert evaluation["points"][0]["router"] == "native"
    for point in evaluation["points"]:
        assert set(point) == POINT_KEYS
        assert set(point["delta_log_likelihood"]) == {"mean", "low", "high"}
        assert set(point["selection"]) == {"compute", "accuracy", "log_likelihood"}
        assert len(point["units_per_token"]) == len(evaluation["backbone"]["sites"])
    numbers = {"hypervolume", "aiq", "compute_at_99_accuracy", "accuracy_at_50_compute"}
    for entry in evaluation["summary"].values():
        assert set(entry) == {*numbers, "seeds", "intervals", "rival"}
        assert set(entry["intervals"]) == {name for name in numbers if entry[name] is not None}
    for row in evaluation["comparisons"]:
        assert set(row) == {
            *("quantity", "compute", "rival", "best_other", "learned", "other", "difference"),
            "probability_of_improvement",
        }
    assert {row["quantity"] for row in evaluation["comparisons"]} == {"log_likelihood", "accuracy"}
    for check in evaluation["checks"]:
        assert set(check) == {"name", "quantity", "difference", "exact", "equal"}


def test_round_trip(evaluation, tmp_path):
    path = tmp_path / "run" / "evaluation.json"
    write_evaluation(path, evaluation)
    assert load_evaluation(path) == evaluation


def test_evaluation_without_newer_keys_is_read(evaluation, tmp_path):
    old = {name: value for name, value in evaluation.items() if name not in ("comparisons", "checks")}
    write_evaluation(tmp_path / "evaluation.json", old)
    assert load_evaluation(tmp_path / "evaluation.json") == old


def test_infinite_numbers_are_refused(evaluation, tmp_path):
    evaluation["native"]["log_likelihood"] = -math.inf
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_evaluation(tmp_path / "evaluation.json", evaluation)
    assert not (tmp_path / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "evaluation must be a JSON file"),
        ("[]", "schema must be 1, got None"),
        ('{"schema": 2}', "schema must be 1, got 2"),
        ('{"schema": 1, "points": []}', "evaluation must have the keys"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    path = tmp_path / "evaluation.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_evaluation(path)


def test_evaluation_holds_plain_numbers(evaluation):
    assert json.loads(json.dumps(evaluation, allow_nan=False)) == evaluation


def printed(*parts):
    """Lines of a report to a file, and the cells of each row by its first word."""
    text = io.StringIO()
    for part in parts:
        report_console(text).print(part, highlight=False)
    lines = text.getvalue().splitlines()
    assert max(len(line) for line in lines) <= 100
    assert "\x1b" not in text.getvalue()
    return lines, {line.split()[0]: " ".join(line.split()[1:]) for line in lines if line.strip()}


@pytest.fixture
def curves(make_scored):
    return {
        "learned": [[make_scored(0.4, -1.2, 0.76), make_scored(0.8, -1.0, 0.8)]],
        "a router with quite a long name": [[make_scored(0.4, -5.5, 0.3), make_scored(0.8, -5.1, 0.4)]],
        "top-k": [[make_scored(0.6, -1.25, 0.75), make_scored(0.7, -1.2, 0.76)]],
        "sequence-top-k": [[make_scored(0.6, -1.15, 0.75, causal=False)]],
    }


def test_tradeoff_table_by_hand(curves, make_point):
    lines, rows = printed(tradeoff_table(curves, make_point(1.0), summarize(curves, random_accuracy=0.1)))
    assert rows["native"].startswith("loss 1.0000 accuracy 0.8000")
    assert rows["learned"] == "1.050 +.050 98.8 1.100 +.100 97.5 1.150 +.150 96.2 1.200 +.200 95.0 0.720"
    assert rows["top-k"].endswith(" - - -")
    assert any("5.500 +4.50 37.5" in line for line in lines)
    assert rows["sequence-top-k*"]
    assert any(line.startswith("*: not causal") for line in lines)
    assert not any("seeds" in line for line in lines)


def test_tables_say_how_many_seeds_they_are_over(make_scored, make_point):
    curves = {"learned": [[make_scored(0.5, -loss, seed=int(10 * loss))] for loss in (1.0, 1.1, 1.2, 1.3, 9.0)]}
    summary = summarize(curves, random_accuracy=0.1)
    lines, rows = printed(tradeoff_table(curves, make_point(1.0), summary))
    assert rows["learned"].startswith("1.200 +.200 100.0")
    assert any("mean over 5 seeds" in line for line in lines)
    assert printed(summary_table(curves, summary))[1]["learned"].startswith("5 .350 [.350, .350]")


def test_summary_table_by_hand(curves):
    _, rows = printed(summary_table(curves, summarize(curves, random_accuracy=0.3)))
    assert rows["learned"] == "1 .284 [.284, .284] .390 [.390, .390] .720 [.720, .720]"
    assert rows["top-k"].endswith(" -")


def test_comparison_tables_by_hand(curves):
    comparisons = compare(curves, [0.6, 0.5], bounds={"sequence-top-k"})
    lines, _ = printed(comparison_table(comparisons))
    cells = [" ".join(line.split()) for line in lines]
    assert "0.60 top-k nats -1.1000 -1.2500 +.1500 [+.1500, +.1500] 1.00 [1.00, 1.00]" in cells
    assert "0.60 top-k % 78.00 75.00 +3.00 [+3.00, +3.00] 1.00 [1.00, 1.00]" in cells
    _, rows = printed(rivals_table(comparisons, "log_likelihood"))
    assert rows["top-k"] == "†+150 [150, 150] -"
    assert rows["sequence-top-k"] == "+50 [50, 50] -"
    _, rows = printed(rivals_table(comparisons, "accuracy"))
    assert rows["top-k"] == "†+3.0 [3.0, 3.0] -"


def test_column_of_huge_gains_keeps_its_width(make_scored):
    bad = {name: [[make_scored(0.4, -3.3, 0.3)]] for name in ("seventeen-letters", "b")}
    curves = {"learned": [[make_scored(0.4, -1.0)]], **bad}
    _, rows = printed(rivals_table(compare(curves, [0.7, 0.6, 0.5, 0.4]), "log_likelihood"))
    assert rows["b"] == " ".join(["2300 [2300, 2300]"] * 4)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("attention-threshold", ["attention-", "threshold"]),
        ("attention-threshold+heads", ["attention-", "threshold+heads"]),
        ("expert-pruning+heads", ["expert-", "pruning+heads"]),
    ],
)
def test_long_names_break_behind_hyphens(make_scored, name, shown):
    curves = {"learned": [[make_scored(0.4, -1.0)]], name: [[make_scored(0.4, -1.1)]]}
    comparisons = compare(curves, [0.6])
    for table in (
        summary_table(curves, summarize(curves, random_accuracy=0.1)),
        rivals_table(comparisons, "log_likelihood"),
        comparison_table(comparisons),
    ):
        words = [word for line in printed(table)[0] for word in line.split()]
        assert set(shown) <= set(words)


def test_failed_check_is_said_aloud():
    interval = Interval(mean=0.002, low=0.001, high=0.003)
    check = Check(name="halves", quantity="log_likelihood", difference=interval, exact=False, equal=False)
    assert check_lines([check]) == ["A/A FAILED: halves: +.0020 [+.0010, +.0030] nats"]
