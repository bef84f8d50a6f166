"""Head-room: tokens are spread over text and window, differences paired with native, the cheating oracle flagged."""

import json

import pytest

from evaluation.headroom import HeadroomConfig, oracle_headroom
from policies.baselines import oracle


def test_head_room_by_price_and_what_was_known(tiny_backbone, tiny_corpus):
    """Cheaper as the price rises; native is the zero of all differences; the oracle that saw the label says so."""
    config = HeadroomConfig(num_tokens=6, prices=(0.0, 0.05, 1e6), batch_tokens=6)
    points = oracle_headroom(tiny_backbone, tiny_corpus.test, config, progress=False)
    assert [(point.quality, point.price) for point in points] == [
        (quality, price) for quality in ("divergence", "log_likelihood") for price in config.prices
    ]
    for start in (0, 3):
        computes = [point.compute for point in points[start : start + 3]]
        assert computes == sorted(computes, reverse=True)
        assert computes[-1] == 0
    assert all(point.num_tokens == 6 and point.num_documents > 1 for point in points)
    blind, cheating = points[0], points[3]
    assert blind.divergence == pytest.approx(0, abs=1e-5)
    assert blind.delta_log_likelihood.mean == pytest.approx(0, abs=0.01)
    assert cheating.delta_log_likelihood.low > 0
    assert cheating.divergence > 0
    entries = json.loads(json.dumps([point.to_json() for point in points]))
    assert [entry["knows_label"] for entry in entries] == [False] * 3 + [True] * 3
    assert entries[0]["delta_accuracy"].keys() == {"mean", "low", "high"}


def test_batches_stand_at_positions_spread_over_the_window(tiny_backbone, tiny_corpus, monkeypatch):
    seen = []
    search = oracle.OracleSearch.__init__

    def record(self, backbone, tokens, targets, **settings):
        seen.append((tuple(tokens.shape), settings["seq_len"]))
        search(self, backbone, tokens, targets, **settings)

    monkeypatch.setattr("evaluation.headroom.OracleSearch.__init__", record)
    config = HeadroomConfig(num_tokens=8, prices=(1.0,), qualities=("divergence",), batch_tokens=2)
    oracle_headroom(tiny_backbone, tiny_corpus.test, config, progress=False)
    assert seen == [((2, position + 1), 16) for position in (2, 6, 10, 14)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_tokens": 0}, "num_tokens must be at least 1, got 0"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1, got 0"),
        ({"prices": (0.1, -1.0)}, r"prices must be at least 0, got \(0.1, -1.0\)"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        HeadroomConfig(**settings)
