"""Random subsets as training: what is drawn, how often, and what stays native."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moe_backbone import SiteView, best_units
from moe_backbone.random_routing import RandomRouting, RandomUnits, disagreement
from moe_backbone.sites import RoutingSite

NUM_SEQUENCES, SEQ_LEN, NUM_EXPERTS, TOP_K, NUM_HEADS = 400, 16, 4, 2, 8


def _view(index: int) -> SiteView:
    """Random gate scores at an expert site; zeros, as there is no gate, at a head site."""
    heads, num_tokens = index % 2 == 0, NUM_SEQUENCES * SEQ_LEN
    num_units = NUM_HEADS if heads else NUM_EXPERTS
    return SiteView(
        index=index,
        site=RoutingSite(
            kind="heads" if heads else "experts",
            layer=index // 2,
            num_units=num_units,
            native_units=NUM_HEADS if heads else TOP_K,
            unit_flops=1,
        ),
        features=torch.zeros(num_tokens, 1),
        scores=torch.zeros(num_tokens, num_units) if heads else torch.randn(num_tokens, num_units).log_softmax(1),
        price=torch.zeros(num_tokens),
        tokens=torch.zeros(NUM_SEQUENCES, SEQ_LEN, dtype=torch.int64),
    )


def _random_routing(
    native_share: float, views: list[SiteView], units: tuple[RandomUnits, ...] = ("heads", "depth")
) -> list[Tensor]:
    """Subsets of each site (num_sequences, seq_len, num_units)."""
    router = RandomRouting(native_share, torch.Generator().manual_seed(0), units)
    return [router.select(view).unflatten(0, (NUM_SEQUENCES, SEQ_LEN)) for view in views]


def test_random_routing_keeps_whole_sequences_native() -> None:
    """A sequence is native at every site or at none, and the share is the one asked for."""
    views = [_view(index) for index in range(4)]
    subsets = _random_routing(0.25, views)
    natives = []
    for view, subset in zip(views, subsets, strict=True):
        native = best_units(view.scores, view.site.native_units).view_as(subset)
        natives.append((subset == native).flatten(1).all(1))
    assert natives[1].float().mean().item() == pytest.approx(0.25, abs=0.07)
    assert torch.equal(natives[3], natives[1])
    for all_heads in natives[::2]:  # a random sequence has all heads by chance once in 129
        assert all_heads[natives[1]].all()
        assert all_heads[~natives[1]].float().mean() < 0.05


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_random_routing_at_the_ends_of_its_range(share: float) -> None:
    """A share of one is native routing; of zero leaves no sequence with all heads at all tokens but by chance."""
    heads, _ = _random_routing(share, [_view(0), _view(1)])
    native = heads.flatten(1).all(1).float().mean().item()
    assert native == 1.0 if share else native < 0.05


def test_random_routing_draws_zero_to_one_above_top_k_experts() -> None:
    """Every count comes as often, whatever the sequence, and the experts are the best of the gate."""
    views = [_view(0), _view(1)]
    subset = _random_routing(0.0, views)[1].flatten(0, 1)
    counts = subset.sum(1)
    assert torch.equal(subset, best_units(views[1].scores, counts))
    shares = counts.bincount() / len(counts)
    torch.testing.assert_close(shares, torch.full((TOP_K + 2,), 1 / (TOP_K + 2)), atol=0.02, rtol=0)


def test_random_routing_varies_the_rate_of_heads_between_sequences() -> None:
    """Rates of sequences fill [0, 1]; within a sequence each token draws its own heads."""
    heads = _random_routing(0.0, [_view(0)])[0]
    rates = heads.float().mean((1, 2))
    assert rates.std().item() == pytest.approx(math.sqrt(1 / 12), abs=0.03)
    assert rates.min() < 0.05
    assert rates.max() > 0.95
    middle = heads[(rates > 0.3) & (rates < 0.7)]
    assert middle.flatten(2).float().std(1).gt(0).float().mean() > 0.99


def test_one_choice_of_heads_for_a_sequence() -> None:
    """All tokens of a sequence have the same heads, sequences have others."""
    heads = _random_routing(0.0, [_view(0)], ("sequence_heads",))[0]
    assert (heads == heads[:, :1]).all()
    assert heads[:, 0].float().mean(1).std().item() == pytest.approx(math.sqrt(1 / 12 + 1 / 6 / NUM_HEADS), abs=0.03)


def test_random_experts_are_as_many_as_natively_and_any() -> None:
    """The gate has no say in which, every expert comes as often."""
    views = [_view(0), _view(1)]
    heads, experts = _random_routing(0.0, views, ("experts",))
    assert heads.all()
    assert (experts.sum(2) == TOP_K).all()
    rates = experts.flatten(0, 1).float().mean(0)
    torch.testing.assert_close(rates, torch.full((NUM_EXPERTS,), TOP_K / NUM_EXPERTS), atol=0.02, rtol=0)


def test_random_experts_of_random_depth() -> None:
    """Any experts, and every count."""
    experts = _random_routing(0.0, [_view(0), _view(1)], ("experts", "depth"))[1].flatten(0, 1)
    shares = experts.sum(1).bincount() / len(experts)
    torch.testing.assert_close(shares, torch.full((TOP_K + 2,), 1 / (TOP_K + 2)), atol=0.02, rtol=0)
    rates = experts.float().mean(0)
    torch.testing.assert_close(rates, rates.mean().expand(NUM_EXPERTS), atol=0.02, rtol=0)


def test_disagreement_by_hand() -> None:
    """Of (.5, .5) and (.9, .1): half of .5 ln(25/9) + .9 ln 1.8 + .1 ln .2; of equal routes none."""
    rows = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log().unsqueeze(1)
    forward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    backward = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert disagreement(rows).item() == pytest.approx((forward + backward) / 2, abs=1e-6)
    assert disagreement(rows[:1].repeat(2, 1, 1)).item() == pytest.approx(0, abs=1e-7)
