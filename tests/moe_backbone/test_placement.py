"""Where experts lie, where tokens go, and what is counted on the way."""

from __future__ import annotations

import pytest
import torch

from moe_backbone.placement import Placement, count_traffic, place_experts

TOKENS = 20_000


def _hosts(*rows: str) -> Placement:
    return Placement(torch.tensor([[letter == "x" for letter in row] for row in rows]))


def test_balanced_placement_carries_less_at_most() -> None:
    """The worked example."""
    loads = torch.tensor([5, 4, 3, 2])
    carried = {rule: place_experts(rule, 2, loads).hosts.long() @ loads for rule in ("round_robin", "balanced")}
    assert carried["round_robin"].tolist() == [8, 6]
    assert carried["balanced"].tolist() == [7, 7]


@pytest.mark.parametrize("rule", ["round_robin", "balanced", "random"])
@pytest.mark.parametrize("num_nodes", [1, 3, 4, 10])
def test_every_expert_has_a_node_and_every_node_an_expert(rule: str, num_nodes: int) -> None:
    """With more nodes than experts, too."""
    placement = place_experts(rule, num_nodes, torch.tensor([5, 4, 3, 2]))  # type: ignore[arg-type]
    assert placement.num_nodes == num_nodes
    assert placement.hosts.any(0).all()
    assert placement.hosts.any(1).all()


def test_chosen_experts_go_to_their_host() -> None:
    """The worked example: nothing is drawn where there are no replicas."""
    placement = _hosts("x.x", ".x.")
    assert placement.destinations(torch.tensor([[False, True, True]])).tolist() == [[-1, 1, 0]]


def test_a_token_goes_to_one_of_all_nodes_with_equal_chance() -> None:
    """Random routing over nodes: P = 1 / num_nodes, all experts of a token together."""
    placement = place_experts("random", 4, torch.ones(3))
    where = placement.destinations(torch.ones(TOKENS, 3, dtype=torch.bool), torch.Generator().manual_seed(0))
    assert (where == where[:, :1]).all()
    shares = torch.bincount(where[:, 0], minlength=4) / TOKENS
    torch.testing.assert_close(shares, torch.full((4,), 0.25), rtol=0, atol=4 * (0.25 * 0.75 / TOKENS) ** 0.5)


def test_parts_of_a_batch_stay_together() -> None:
    """Neighbours take one draw; the last part may be short."""
    placement = place_experts("random", 8, torch.ones(2), tokens_per_draw=5)
    where = placement.destinations(torch.ones(23, 2, dtype=torch.bool), torch.Generator().manual_seed(0))[:, 0]
    assert [len(set(part.tolist())) for part in where.split(5)] == [1] * 5
    assert len(set(where.tolist())) > 1


def test_traffic_of_the_worked_example() -> None:
    """Two tokens at home on node 0: one token stays with one expert there."""
    where = torch.tensor([[0, 1, -1], [-1, 1, 1]])
    traffic = count_traffic(where, torch.tensor([0, 0]), 2, (100, 10))
    assert traffic.tokens.tolist() == [1, 2]
    assert traffic.rows.tolist() == [1, 3]
    assert traffic.sent.tolist() == [200, 20]
    assert traffic.imbalance == 1.5


def test_no_token_no_traffic() -> None:
    """An empty batch, and tokens that use nothing."""
    for where in (torch.full((0, 3), -1), torch.full((4, 3), -1)):
        traffic = count_traffic(where, torch.zeros(len(where), dtype=torch.int64), 2, (4, 4))
        assert traffic.rows.tolist() == [0, 0]
        assert traffic.imbalance == 1


@pytest.mark.parametrize(
    ("rule", "num_nodes", "message"),
    [
        ("nearest", 2, "placement must be one of round_robin, balanced, random, got 'nearest'"),
        ("random", 0, "num_nodes must be at least 1, got 0"),
    ],
)
def test_impossible_placements_are_refused(rule: str, num_nodes: int, message: str) -> None:
    """Name, rule, actual value."""
    with pytest.raises(ValueError, match=message):
        place_experts(rule, num_nodes, torch.ones(4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every expert somewhere"):
        _hosts("x.", "x.")
