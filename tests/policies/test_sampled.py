"""A learned router under which a backbone is trained."""

from __future__ import annotations

import pytest
import torch

from moe_backbone import MoETransformer, NativeRouter
from policies.linear_router import LinearRouter, RouterSpec
from policies.sampled import SampledRouter


@pytest.fixture
def router(tiny_backbone: MoETransformer) -> LinearRouter:
    """Sure of every unit at the lowest price, and of none at the highest."""
    made = LinearRouter(RouterSpec(hidden_size=32, sites=tiny_backbone.sites, price_low=0.01, price_high=1.0))
    with torch.no_grad():
        made.price_weight[:, -1] = -60.0
    return made.requires_grad_(False)


def sampled(router: LinearRouter, native_share: float, prices: tuple[float, float]) -> SampledRouter:
    return SampledRouter(router, native_share=native_share, prices=prices, generator=torch.Generator().manual_seed(0))


def test_all_native_is_native(router: LinearRouter, tiny_backbone: MoETransformer, tiny_tokens: torch.Tensor) -> None:
    _, subsets = tiny_backbone.run(tiny_tokens, sampled(router, 1.0, (0.01, 1.0)))
    _, native = tiny_backbone.run(tiny_tokens, NativeRouter())
    assert all(torch.equal(one, other) for one, other in zip(subsets, native, strict=True))


@pytest.mark.parametrize(("price", "share"), [(0.01, 1.0), (1.0, 0.0)])
def test_price_is_the_one_that_was_drawn(
    router: LinearRouter, tiny_backbone: MoETransformer, tiny_tokens: torch.Tensor, price: float, share: float
) -> None:
    _, subsets = tiny_backbone.run(tiny_tokens, sampled(router, 0.0, (price, price)))
    assert all(subset.float().mean() == share for subset in subsets)


def test_a_sequence_is_native_as_a_whole(router: LinearRouter, tiny_backbone: MoETransformer) -> None:
    tokens = torch.randint(256, (200, 16))
    _, subsets = tiny_backbone.run(tokens, sampled(router, 0.25, (1.0, 1.0)))
    rows = subsets[0].view(200, 16, -1).all(-1)
    assert torch.equal(rows.all(1), rows.any(1))
    assert 0.15 < rows.all(1).float().mean() < 0.35


@pytest.mark.parametrize(
    ("share", "prices", "message"),
    [
        (1.5, (0.1, 1.0), r"native_share must lie in \[0, 1\], got 1.5"),
        (0.5, (1.0, 0.1), r"prices must be positive and ascending, got \(1.0, 0.1\)"),
    ],
)
def test_impossible_settings_are_refused(
    router: LinearRouter, share: float, prices: tuple[float, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sampled(router, share, prices)
