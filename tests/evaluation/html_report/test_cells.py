from __future__ import annotations

import pytest
import rich.table

from evaluation.html_report.cells import record_table, terminal_table, value_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (True, "yes"),
        (3, "3"),
        (0.7, "0.70"),
        (1.923, "1.9230"),
        (0.00012, "0.00012"),
        (0.0, "0.00"),
        (-0.25, "-0.25"),
        ({}, "-"),
        ({"at_least_one": False, "probability": 0.3}, "at least one no, probability 0.30"),
        ({"mean": 0.1, "low": -0.2, "high": 0.3}, "+0.1000 [-0.2000, +0.3000]"),
        ([1, 0.5], "1 0.50"),
    ],
)
def test_json_values_in_one_line(value, text):
    assert value_text(value) == text


def test_records_may_have_different_keys():
    table = record_table("title", [{"load_cv": 1}, {"load_cv": 2, "other_key": "x"}], "here")
    assert table.columns == ["load CV", "other key"]
    assert [[cell.text for cell in row] for row in table.rows] == [["1", "-"], ["2", "x"]]


def test_names_that_a_terminal_folds_are_whole():
    folded = rich.table.Table("router", "99% at")
    folded.add_row("attention-\nthreshold", "0.500")
    assert [cell.text for cell in terminal_table(folded, "here", "learned").rows[0]] == ["attention-threshold", "0.500"]
