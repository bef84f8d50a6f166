"""Runs any router over held-out text: counted compute, paired intervals, tables and plots."""

from evaluation.compare import Comparison, accuracy_at, at_compute, compare, compute_at_accuracy, frontier, loss_at
from evaluation.evaluator import Evaluator, PointSpec, evaluate_all
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
    comparison_table,
    load_evaluation,
    report_console,
    tradeoff_table,
    write_evaluation,
)
from evaluation.summary import average_quality, hypervolume, summarize

__all__ = [
    "Comparison",
    "DocumentSums",
    "Evaluator",
    "Interval",
    "Point",
    "PointSpec",
    "accuracy_at",
    "accuracy_difference",
    "at_compute",
    "average_quality",
    "build_evaluation",
    "compare",
    "comparison_table",
    "compute_at_accuracy",
    "evaluate_all",
    "frontier",
    "hypervolume",
    "load_evaluation",
    "log_likelihood_difference",
    "loss_at",
    "ratio_interval",
    "report_console",
    "save_figure",
    "summarize",
    "tradeoff_figure",
    "tradeoff_table",
    "usage_figure",
    "write_evaluation",
]
