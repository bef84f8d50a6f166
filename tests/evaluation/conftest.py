"""Points made by hand, and an evaluator over tiny text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from evaluation import DocumentSums, Evaluator, Point, Scored
from evaluation.balance import Balance
from moe_backbone import MoETransformer
from moe_backbone.corpus import Corpus

TOKENS = np.array([10.0, 30.0])
NATIVE = DocumentSums(tokens=TOKENS, log_likelihood=-1.0 * TOKENS, correct=0.8 * TOKENS)


@pytest.fixture
def make_point() -> Callable[..., Point]:
    """Point of two documents with the same log-likelihood and accuracy on both; native has -1 nats and 0.8."""

    def make(compute: float, log_likelihood: float = -1.0, accuracy: float = 0.8, router: str = "hand") -> Point:
        return Point(
            router=router,
            setting={},
            seed=None,
            compute=compute,
            router_overhead=0.0,
            compute_total=compute,
            documents=DocumentSums(tokens=TOKENS, log_likelihood=log_likelihood * TOKENS, correct=accuracy * TOKENS),
            native_documents=NATIVE,
            usage=np.array([[0.5, 1.0, np.nan], [0.1, 0.2, 0.7]]),
            units_per_token=(1.5, 1.0),
            distinct_units=2.0,
            balance=Balance(load_cv=0.5, max_vio=0.9, dead_units=0.25, diversity=0.6, busiest_load=0.7),
            seconds=0.1,
        )

    return make


@pytest.fixture
def make_scored(make_point: Callable[..., Point]) -> Callable[..., Scored]:
    """A setting whose held-out (compute, log-likelihood, accuracy) is also its selection's, unless that is given."""

    def make(
        *held_out: float,
        selection: tuple[float, ...] = (),
        router: str = "hand",
        seed: int | None = None,
        causal: bool = True,
    ) -> Scored:
        setting = {} if causal else {"causal": False}
        point = replace(make_point(*held_out, router=router), seed=seed, setting=setting)
        return Scored(selection=make_point(*(selection or held_out), router=router), held_out=point)

    return make


@pytest.fixture
def evaluator(tiny_backbone: MoETransformer, tiny_corpus: Corpus) -> Evaluator:
    """Ten windows of the test documents, three at a time, so that the last batch is a short one."""
    return Evaluator(tiny_backbone, tiny_corpus.test, max_tokens=160, batch_sequences=3)
