"""Expert pruning: pruned experts never run, and importance is what brute force gives."""

import pytest
import torch

from moe_backbone import MoETransformer, NativeRouter, RoutingSite, SiteView, token_log_likelihood
from policies.baselines import (
    ExpertPruning,
    UnitPruning,
    expert_importance,
    prune_share,
    prune_units,
    routing_mass,
)
from policies.linear_router import LinearRouter, RouterSpec


def expert_view(probabilities):
    scores = torch.tensor(probabilities).log()
    site = RoutingSite(kind="experts", layer=0, num_units=scores.shape[1], native_units=2, unit_flops=1)
    price, tokens = torch.zeros(len(scores)), torch.zeros(1, len(scores), dtype=torch.int64)
    return SiteView(index=1, site=site, features=scores, scores=scores, price=price, tokens=tokens)


@pytest.mark.parametrize(
    ("kept", "k", "expected"),
    [
        ("FTT", 1, ".X."),
        ("FTT", 3, ".XX"),
        ("FTT", None, ".XX"),
        ("TFT", None, "X.X"),
        ("FFF", 2, "..."),
        ("TTT", 0, "..."),
    ],
)
def test_best_of_the_kept(kept, k, expected):
    router = ExpertPruning({1: torch.tensor([letter == "T" for letter in kept])}, k)
    subset = router.select(expert_view([[0.5, 0.3, 0.2]]))
    assert "".join("X" if unit else "." for unit in subset[0]) == expected


def test_sites_left_out_keep_all():
    assert ExpertPruning({}, 1).select(expert_view([[0.2, 0.5, 0.3]])).tolist() == [[False, True, False]]


def test_negative_k_is_refused():
    with pytest.raises(ValueError, match="k must be at least 0, got -1"):
        ExpertPruning({}, -1)


def test_importance_is_the_rise_when_tokens_use_their_next_best(tiny_backbone, tiny_tokens):
    def loss(router):
        return -token_log_likelihood(tiny_backbone.run(tiny_tokens, router)[0], tiny_tokens).mean().item()

    importance = expert_importance(tiny_backbone, tiny_tokens, tiny_tokens)
    assert list(importance) == [1, 3]
    for index, rises in importance.items():
        for expert, rise in enumerate(rises):

            class WithoutOne:
                def select(self, view, index=index, expert=expert):
                    if view.index != index:
                        return NativeRouter().select(view)
                    scores = view.scores.clone()
                    scores[:, expert] = -1e9
                    chosen = scores.topk(view.site.native_units).indices
                    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)

            assert rise.item() == pytest.approx(loss(WithoutOne()) - loss(NativeRouter()), abs=1e-6)


def test_mass_is_the_gate_probability_of_chosen_experts(tiny_backbone, tiny_tokens):
    masses = routing_mass(tiny_backbone, tiny_tokens)
    view = tiny_backbone.observe(
        tiny_backbone.advance(tiny_backbone.begin(tiny_tokens), torch.ones(tiny_tokens.numel(), 4, dtype=torch.bool))
    )
    best = view.scores.topk(2)
    expected = torch.zeros(4).index_add(0, best.indices.flatten(), best.values.exp().flatten()) / tiny_tokens.numel()
    torch.testing.assert_close(masses[1].float(), expected)
    assert list(masses) == [1, 3]


def test_pruned_heads_and_experts_never_run(tiny_backbone, tiny_tokens):
    experts = prune_units({1: torch.tensor([0.1, 0.4, 0.3, 0.2]), 3: torch.tensor([0.9, 0.0, 0.0, 0.0])}, 4)
    heads = prune_units({0: torch.tensor([4.0, 3.0, 2.0, 1.0]), 2: torch.tensor([0.0, 0.0, 0.0, 5.0])}, 3)
    _, subsets = tiny_backbone.run(tiny_tokens, UnitPruning(ExpertPruning(experts), heads))
    used = [subset.any(0).tolist() for subset in subsets]
    assert used[0] == [True, True, False, False]
    assert used[2] == [False, False, False, True]
    assert not used[1][0] and used[3] == [True, False, False, False]
    assert (subsets[1].sum(1) == 2).all() and (subsets[3].sum(1) == 1).all()


def test_a_share_is_kept_of_each_kind(tiny_backbone: MoETransformer) -> None:
    """However much larger the numbers of one kind are."""
    importance = {index: torch.rand(site.num_units) for index, site in enumerate(tiny_backbone.sites)}
    for index, site in enumerate(tiny_backbone.sites):
        if site.kind == "experts":
            importance[index] += 10
    kept = prune_share(tiny_backbone.sites, importance, 0.5)
    for kind in ("heads", "experts"):
        units = torch.cat([kept[index] for index, site in enumerate(tiny_backbone.sites) if site.kind == kind])
        assert units.sum() == len(units) // 2
    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\], got 2"):
        prune_share(tiny_backbone.sites, importance, 2)


def test_a_mask_keeps_what_the_router_brings(tiny_backbone: MoETransformer, tiny_tokens: torch.Tensor) -> None:
    """Its cost and its constants; of its choice only what is kept."""
    router = LinearRouter(
        RouterSpec(hidden_size=tiny_backbone.hidden_size, sites=tiny_backbone.sites, compensation=True)
    ).at_price(0.1)
    importance = {index: torch.rand(site.num_units) for index, site in enumerate(tiny_backbone.sites)}
    kept = prune_share(tiny_backbone.sites, importance, 0.5)
    masked = UnitPruning(router, kept)
    assert masked.overhead_flops == router.overhead_flops
    assert masked.compensation is router.compensation
    _, subsets = tiny_backbone.run(tiny_tokens, masked)
    assert all(not (subset & ~kept[index]).any() for index, subset in enumerate(subsets))
    assert any(subset.any() for subset in subsets)
    assert UnitPruning(NativeRouter(), kept).compensation is None
