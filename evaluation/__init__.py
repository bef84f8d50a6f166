"""Runs any router over text: counted compute, choice and report on separate text, intervals, tables and plots."""

from evaluation.bootstrap import Gain, gain, iqm
from evaluation.checks import Check, check_native, check_seeds
from evaluation.compare import COMPUTES, Comparison, best_others, compare
from evaluation.curves import (
    Curve,
    Curves,
    Quantity,
    Scored,
    accuracy_at,
    at_compute,
    frontier,
    group_curves,
    loss_at,
    scores_along,
)
from evaluation.evaluator import Evaluator, PointSpec
from evaluation.intervals import (
    DocumentSums,
    Interval,
    accuracy_difference,
    log_likelihood_difference,
    ratio_interval,
)
from evaluation.plots import save_figure, tradeoff_figure, usage_figure
from evaluation.points import Point
from evaluation.report import (
    build_evaluation,
    check_lines,
    comparison_table,
    load_evaluation,
    print_and_keep,
    report_console,
    report_parts,
    rivals_table,
    summary_table,
    tradeoff_table,
    write_evaluation,
)
from evaluation.results import Evaluation
from evaluation.scoring import score_all
from evaluation.summary import average_quality, compute_at_accuracy, hypervolume, summarize

__all__ = [
    "COMPUTES",
    "Check",
    "Comparison",
    "Curve",
    "Curves",
    "DocumentSums",
    "Evaluation",
    "Evaluator",
    "Gain",
    "Interval",
    "Point",
    "PointSpec",
    "Quantity",
    "Scored",
    "accuracy_at",
    "accuracy_difference",
    "at_compute",
    "average_quality",
    "best_others",
    "build_evaluation",
    "check_lines",
    "check_native",
    "check_seeds",
    "compare",
    "comparison_table",
    "compute_at_accuracy",
    "frontier",
    "gain",
    "group_curves",
    "hypervolume",
    "iqm",
    "load_evaluation",
    "log_likelihood_difference",
    "loss_at",
    "print_and_keep",
    "ratio_interval",
    "report_console",
    "report_parts",
    "rivals_table",
    "save_figure",
    "score_all",
    "scores_along",
    "summarize",
    "summary_table",
    "tradeoff_figure",
    "tradeoff_table",
    "usage_figure",
    "write_evaluation",
]
