"""Which units count as best, and what native routing chooses."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_backbone import MoETransformer, NativeRouter, Router, best_units


def test_best_units_marks_the_highest_scores() -> None:
    """The docstring's example: the best two of three."""
    assert best_units(torch.tensor([[0.1, 0.7, 0.2]]), 2).tolist() == [[False, True, True]]


def test_best_units_of_equal_scores_are_the_first() -> None:
    """Ties are broken by place, so that runs agree."""
    assert best_units(torch.zeros(1, 4), 2).tolist() == [[True, True, False, False]]


def test_best_units_takes_broken_scores_first() -> None:
    """A gate that gives NaN shows in the output instead of switching its token off."""
    scores = torch.tensor([[0.1, torch.nan, 0.2], [torch.nan, torch.nan, torch.nan]])
    assert best_units(scores, 2).tolist() == [[False, True, True], [True, True, False]]


def test_best_units_takes_a_count_for_each_row() -> None:
    """Rows may ask for none, some and all of their units."""
    scores = torch.tensor([[0.1, 0.7, 0.2]] * 3)
    chosen = best_units(scores, torch.tensor([0, 1, 3]))
    assert chosen.tolist() == [[False, False, False], [False, True, False], [True, True, True]]


def test_native_router_uses_top_k_experts_and_all_heads(tiny_backbone: MoETransformer, tiny_tokens: Tensor) -> None:
    """Without a gate every unit runs; with one, the `top_k` with the highest scores."""
    router = NativeRouter()
    assert isinstance(router, Router)
    state = tiny_backbone.begin(tiny_tokens)
    for site in tiny_backbone.sites:
        view = tiny_backbone.observe(state)
        subset = router.select(view)
        assert subset.sum(1).eq(site.native_units).all()
        if site.kind == "experts":
            worst_chosen = view.scores.masked_fill(~subset, torch.inf).amin(1)
            assert worst_chosen.ge(view.scores.masked_fill(subset, -torch.inf).amax(1)).all()
        state = tiny_backbone.advance(state, subset)
