from __future__ import annotations

import io
import json
import math

import pytest

from evaluation import (
    build_evaluation,
    compare,
    comparison_table,
    load_evaluation,
    report_console,
    summarize,
    tradeoff_table,
    write_evaluation,
)
from moe_backbone import NativeRouter

POINT_KEYS = {
    "router", "setting", "seed", "compute", "router_overhead", "compute_total", "accuracy", "log_likelihood",
    "accuracy_retained", "delta_log_likelihood", "units_per_token", "distinct_units", "load_cv", "seconds",
    "max_vio", "dead_units", "diversity", "busiest_load",
}  # fmt: skip


@pytest.fixture
def evaluation(evaluator, random_subsets):
    points = [
        evaluator.score("native", NativeRouter(), setting={}),
        evaluator.score("random", random_subsets, setting={"share": 0.5}, seed=0),
    ]
    summary = summarize({point.router: [point] for point in points}, native_accuracy=0.5, random_accuracy=0.1)
    return build_evaluation(
        evaluator, points, summary, corpus="words", backbone="tiny", sha256="0" * 64, parameters=123
    )


def test_schema_has_exactly_the_agreed_keys(evaluation):
    assert set(evaluation) == {"schema", "corpus", "backbone", "native", "points", "summary"}
    assert set(evaluation["corpus"]) == {"name", "split", "tokens", "documents"}
    assert set(evaluation["backbone"]) == {"name", "sha256", "parameters", "sites"}
    assert set(evaluation["native"]) == {"accuracy", "log_likelihood"}
    for point in evaluation["points"]:
        assert set(point) == POINT_KEYS
        assert set(point["delta_log_likelihood"]) == {"mean", "low", "high"}
        assert len(point["units_per_token"]) == len(evaluation["backbone"]["sites"])
    for entry in evaluation["summary"].values():
        assert set(entry) == {"hypervolume", "aiq", "compute_at_99_accuracy", "accuracy_at_50_compute"}


def test_round_trip(evaluation, tmp_path):
    path = tmp_path / "run" / "evaluation.json"
    write_evaluation(path, evaluation)
    assert load_evaluation(path) == evaluation


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


def test_tables_fit_100_columns_as_plain_text(make_point):
    native = make_point(1.0)
    curves = {
        "learned": [make_point(0.4, -1.2, 0.76), make_point(0.8, -1.0, 0.8)],
        "a router with quite a long name": [make_point(0.4, -2.5, 0.3), make_point(0.8, -2.1, 0.4)],
        "top-k": [make_point(0.6, -1.25, 0.75), make_point(0.7, -1.2, 0.76)],
    }
    text = io.StringIO()
    console = report_console(text)
    console.print(tradeoff_table(curves, native))
    console.print(comparison_table(compare(curves["learned"], {"top-k": curves["top-k"]}, [0.6, 0.5])))
    lines = text.getvalue().splitlines()
    assert max(len(line) for line in lines) <= 100
    assert "\x1b" not in text.getvalue()
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines if line.strip()}
    assert rows["native"].startswith("loss 1.0000 accuracy 0.8000")
    assert rows["learned"] == "1.050 +.050 98.8 1.100 +.100 97.5 1.150 +.150 96.2 1.200 +.200 95.0 0.720"
    assert rows["top-k"].endswith(" - - -")
    assert rows["0.60"] == "top-k 1.1000 1.2500 +.1500 [+.1500, +.1500] +3.00 [+3.00, +3.00]"
    assert "0.50" not in rows
    assert any("2.500 +1.50 37.5" in line for line in lines)
