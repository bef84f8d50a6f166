"""Attention-score routers: keys are what their formula says, choices follow them, and their cost is counted."""

import math

import pytest
import torch

from moe_backbone import NativeRouter, RoutingSite, SiteView, token_divergence
from policies.baselines import AttentionThreshold, AttentionTopK, UnitKeys, fit_unit_keys
from policies.baselines import attention_score as module
from policies.baselines.attention_score import head_thresholds


def make_view(features, kind="experts", num_units=3, index=1):
    rows = torch.tensor(features)
    site = RoutingSite(kind=kind, layer=0, num_units=num_units, native_units=num_units, unit_flops=1)
    return SiteView(
        index=index,
        site=site,
        features=rows,
        scores=torch.zeros(len(rows), num_units),
        price=torch.zeros(len(rows)),
        tokens=torch.arange(len(rows)).unsqueeze(0),
    )


def marks(subset):
    assert subset.dtype == torch.bool
    return ["".join("X" if unit else "." for unit in row) for row in subset.tolist()]


@pytest.fixture
def keys():
    """Scores feature, -feature and 1."""
    return {1: UnitKeys(keys=torch.tensor([[1.0, -1.0, 0.0]]), constant=torch.tensor([0.0, 0.0, 1.0]))}


def test_key_of_the_docstring(monkeypatch):
    monkeypatch.setattr(module, "RIDGE", 0.0)
    fitted = UnitKeys.fit(torch.tensor([[-1.0], [1.0]]), torch.tensor([[1.0], [3.0]]))
    assert fitted.keys.tolist() == [[pytest.approx(0.5)]]
    assert fitted.constant.tolist() == [pytest.approx(math.log(2) - 0.125)]


def test_log_linear_weights_of_correlated_features_are_recovered():
    mix, shift = torch.tensor([[1.0, 0.0], [0.8, 0.6]]), torch.tensor([2.0, -1.0])
    features = torch.randn(200_000, 2) @ mix + shift
    slopes = torch.tensor([[0.5, -0.3], [0.2, 0.4]])
    fitted = UnitKeys.fit(features, (features @ slopes + torch.tensor([0.1, -2.0])).exp())
    torch.testing.assert_close(fitted.keys, slopes, atol=0.03, rtol=0)
    torch.testing.assert_close(fitted.constant, torch.tensor([0.1, -2.0]), atol=0.05, rtol=0)


def test_unit_that_no_token_needs_is_never_preferred():
    features = torch.randn(50, 4)
    fitted = UnitKeys.fit(features, torch.cat((torch.rand(50, 1), torch.zeros(50, 1)), dim=1))
    scores = fitted.score(features)
    assert scores.isfinite().all()
    assert (scores[:, 0] > scores[:, 1]).all()


def test_top_units_by_similarity(keys):
    view = make_view([[2.0], [-3.0], [0.5]])
    assert marks(AttentionTopK(keys, 1).select(view)) == ["X..", ".X.", "..X"]
    assert marks(AttentionTopK(keys, 2).select(view)) == ["X.X", ".XX", "X.X"]
    assert marks(AttentionTopK(keys, 0).select(view)) == ["..."] * 3


def test_experts_above_a_probability(keys):
    """Softmax of (2, -2, 1) is (.72, .01, .27)."""
    assert marks(AttentionThreshold(keys, 0.5).select(make_view([[2.0]]))) == ["X.."]
    assert marks(AttentionThreshold(keys, 0.2).select(make_view([[2.0]]))) == ["X.X"]
    assert marks(AttentionThreshold(keys, 0.9).select(make_view([[2.0]]))) == ["..."]


def test_heads_have_their_own_count_and_bar(keys):
    view = make_view([[2.0], [-3.0]], kind="heads")
    assert marks(AttentionTopK(keys, 3, 1).select(view)) == ["X..", ".X."]
    assert marks(AttentionThreshold(keys, 0.9, 0.5).select(view)) == ["X.X", ".XX"]


def test_sites_without_keys_stay_native(keys):
    view = make_view([[2.0]], kind="heads", index=0)
    assert AttentionTopK(keys, 1, 0).select(view).all()
    assert AttentionThreshold(keys, 1.0, 9.0).select(view).all()


def test_keys_are_fitted_on_gate_probabilities_and_on_what_heads_are_missed(tiny_backbone, tiny_tokens):
    fitted = fit_unit_keys(tiny_backbone, tiny_tokens, tiny_tokens, heads=True)
    native, _ = tiny_backbone.run(tiny_tokens, NativeRouter())
    state, views = tiny_backbone.begin(tiny_tokens), []
    for _ in tiny_backbone.sites:
        views.append(tiny_backbone.observe(state))
        state = tiny_backbone.advance(state, NativeRouter().select(views[-1]))
    probabilities = views[1].scores.exp() * NativeRouter().select(views[1])
    divergences = []
    for head in range(4):

        class HeadOff:
            def select(self, view, head=head):
                subset = NativeRouter().select(view)
                return subset & (torch.arange(4) != head) if view.index == 2 else subset

        divergences.append(token_divergence(native, tiny_backbone.run(tiny_tokens, HeadOff())[0]).flatten())
    for index, weights in ((1, probabilities), (2, torch.stack(divergences, dim=1).clamp_min(0))):
        expected = UnitKeys.fit(views[index].features, weights)
        torch.testing.assert_close(fitted[index].keys, expected.keys, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(fitted[index].constant, expected.constant, atol=1e-3, rtol=1e-3)
    assert set(fit_unit_keys(tiny_backbone, tiny_tokens, tiny_tokens, heads=False)) == {1, 3}


def test_head_bars_let_their_share_pass(tiny_backbone, tiny_tokens):
    fitted = fit_unit_keys(tiny_backbone, tiny_tokens, tiny_tokens, heads=True)
    bars = head_thresholds(tiny_backbone, tiny_tokens, fitted, (0.75, 0.25))

    class Counting(AttentionThreshold):
        """Counts heads above the bar, but lets native heads run: bars hold under native routing."""

        passed = 0

        def select(self, view):
            if view.site.kind == "heads":
                Counting.passed += super().select(view).sum().item()
            return NativeRouter().select(view)

    for bar, share in zip(bars, (0.75, 0.25), strict=True):
        Counting.passed = 0
        tiny_backbone.run(tiny_tokens, Counting(fitted, 0.5, bar))
        assert Counting.passed / (2 * 4 * tiny_tokens.numel()) == pytest.approx(share, abs=0.01)


def test_overhead_is_the_products_of_all_scored_sites(tiny_backbone, tiny_tokens, tiny_config):
    per_site = 2 * tiny_config.hidden_size * 4
    for heads, sites in ((False, 2), (True, 4)):
        fitted = fit_unit_keys(tiny_backbone, tiny_tokens, tiny_tokens, heads=heads)
        assert AttentionTopK(fitted, 1, 1).overhead_flops == sites * per_site
        assert AttentionThreshold(fitted, 0.5).overhead_flops == sites * per_site


BAD = {
    "k": (lambda keys: AttentionTopK(keys, -1), "k must be at least 0, got -1"),
    "heads": (lambda keys: AttentionTopK(keys, 1, -1), "num_heads must be at least 0, got -1"),
    "many": (lambda keys: AttentionTopK(keys, 4).select(make_view([[1.0]])), r"k must lie in \[0, units=3\], got 4"),
    "many-heads": (
        lambda keys: AttentionTopK(keys, 1, 4).select(make_view([[1.0]], kind="heads")),
        r"num_heads must lie in \[0, units=3\], got 4",
    ),
    "probability": (lambda keys: AttentionThreshold(keys, 1.5), r"probability must lie in \[0, 1\], got 1.5"),
}


@pytest.mark.parametrize(("act", "message"), BAD.values(), ids=BAD.keys())
def test_impossible_settings_are_refused(keys, act, message):
    with pytest.raises(ValueError, match=message):
        act(keys)
