"""What nodes cost, by hand, and the gradient that units are told of."""

from __future__ import annotations

import pytest
import torch

from moe_backbone.loads import LoadPrices
from moe_backbone.sites import RoutingSite

SITE = RoutingSite(kind="experts", layer=0, num_units=3, native_units=1, unit_flops=1.0)


def _use(*rows: str) -> torch.Tensor:
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


def test_nodes_of_the_worked_example() -> None:
    """One node, two nodes, none; and chances."""
    prices = LoadPrices(send=0.1, nodes=2)
    assert prices.paid(_use("x.x", "xx.", "..."), SITE).tolist() == pytest.approx([0.1, 0.2, 0.0])
    assert prices.paid(torch.full((1, 3), 0.5), SITE).tolist() == pytest.approx([0.125])


def test_loads_of_nodes_are_summed_over_their_experts() -> None:
    """Experts 0 and 2 share node 0: loads 3 and 1 of the nodes, as in the example of `load_excess`."""
    use = _use("x..", "..x", "x..", ".x.")
    assert LoadPrices(balance=1.0, nodes=2).unit_prices(use, SITE).tolist() == [[0.5, -0.5, 0.5]]
    assert LoadPrices(balance=1.0, nodes=2).paid(use, SITE).tolist() == [0.5, 0.5, 0.5, -0.5]


def test_a_unit_is_told_what_it_adds() -> None:
    """Against turning each unit of each token off and on, loads apart."""
    prices = LoadPrices(send=0.3, nodes=2)
    use = torch.rand(20, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    told = prices.unit_prices(use, SITE)
    for unit in range(3):
        on, off = use.clone(), use.clone()
        on[:, unit], off[:, unit] = True, False
        torch.testing.assert_close(told[:, unit], prices.paid(on, SITE) - prices.paid(off, SITE))


def test_chances_have_the_derivative_of_the_expectation() -> None:
    """Mean of what draws pay, and its derivative is the mean of what a unit adds."""
    prices = LoadPrices(send=0.3, nodes=2)
    chance = torch.tensor([[0.2, 0.7, 0.6]]).requires_grad_()
    paid = prices.paid(chance, SITE)
    paid.sum().backward()
    draws = torch.rand(200_000, 3, generator=torch.Generator().manual_seed(0)) < chance
    assert paid.item() == pytest.approx(prices.paid(draws, SITE).mean().item(), abs=1e-3)
    assert chance.grad is not None
    torch.testing.assert_close(chance.grad[0], prices.unit_prices(draws, SITE).mean(0), rtol=0, atol=2e-3)


def test_heads_and_unpriced_loads_cost_nothing() -> None:
    """Zeros of the right shapes."""
    heads = RoutingSite(kind="heads", layer=0, num_units=3, native_units=3, unit_flops=1.0)
    for prices, site in ((LoadPrices(send=1.0, nodes=2), heads), (LoadPrices(nodes=2), SITE)):
        assert prices.paid(_use("xx."), site).tolist() == [0.0]
        assert prices.unit_prices(_use("xx."), site).tolist() == [[0.0, 0.0, 0.0]]
