"""One router at one setting on held-out text."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from evaluation.balance import Balance
from evaluation.intervals import (
    DocumentSums,
    FloatArray,
    Interval,
    accuracy_difference,
    log_likelihood_difference,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Point:
    """What a router scored and what it spent; `compute` counts the router's own FLOPs."""

    router: str
    """Name of the router; `learned` for the trained one."""
    setting: dict[str, Any]
    """What sets this point apart from others of the same router; JSON values only."""
    seed: int | None
    compute: float
    """Routable FLOPs of the chosen units plus the router's own, over the native routable FLOPs."""
    router_overhead: float
    """The router's own FLOPs over the native routable FLOPs."""
    compute_total: float
    """The same with the FLOPs that no routing can save on both sides of the division."""
    documents: DocumentSums = field(repr=False)
    native_documents: DocumentSums = field(repr=False)
    """Scores of native routing on the same windows."""
    usage: FloatArray = field(repr=False)
    """Share of tokens that used each unit (num_sites, max_units), float64; NaN where a site has no such unit."""
    units_per_token: tuple[float, ...]
    """Mean units of a token at each site."""
    distinct_units: float
    """Mean number of distinct units that a batch touches at a site."""
    balance: Balance
    """How evenly the experts are loaded."""
    seconds: float
    """Wall time of the forward passes over all windows."""
    cache: float | None = None
    """Bytes of keys and values kept over those of native routing; None where no site drops any."""
    f1: float | None = None
    """Micro F1 of whole entities, a fraction; None where no entities are tagged."""

    @property
    def log_likelihood(self) -> float:
        """Nats a token, at most 0."""
        return self.documents.mean_log_likelihood

    @property
    def loss(self) -> float:
        """Minus the log-likelihood, nats a token."""
        return -self.log_likelihood

    @property
    def accuracy(self) -> float:
        """Fraction of tokens predicted right."""
        return self.documents.accuracy

    @property
    def accuracy_retained(self) -> float:
        """Accuracy over native accuracy; 1 where native accuracy is 0."""
        native = self.native_documents.accuracy
        return self.accuracy / native if native else 1.0

    @cached_property
    def delta_log_likelihood(self) -> Interval:
        """Log-likelihood minus native, nats a token, paired over documents."""
        return log_likelihood_difference(self.documents, self.native_documents)

    @cached_property
    def delta_accuracy(self) -> Interval:
        """Accuracy minus native, a fraction, paired over documents."""
        return accuracy_difference(self.documents, self.native_documents)

    def to_json(self) -> dict[str, Any]:
        """One entry of `points` in `evaluation.json`; `cache` and `f1` are there where they are measured."""
        measured = {"cache": self.cache, "f1": self.f1}
        return {
            "router": self.router,
            "setting": self.setting,
            "seed": self.seed,
            "compute": self.compute,
            "router_overhead": self.router_overhead,
            "compute_total": self.compute_total,
            **{name: value for name, value in measured.items() if value is not None},
            "accuracy": self.accuracy,
            "log_likelihood": self.log_likelihood,
            "accuracy_retained": self.accuracy_retained,
            "delta_log_likelihood": self.delta_log_likelihood.to_json(),
            "units_per_token": list(self.units_per_token),
            "distinct_units": self.distinct_units,
            **self.balance.to_json(),
            "seconds": self.seconds,
        }
