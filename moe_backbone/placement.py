"""Which node runs which expert, where each token's rows go, and what that sends: counted, for any number of nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe_backbone.checks import require

PlacementRule = Literal["round_robin", "balanced", "random"]
RULES: tuple[PlacementRule, ...] = ("round_robin", "balanced", "random")


@dataclass(frozen=True)
class Placement:
    """Experts of one site on nodes.

    Attributes:
        hosts: bool (num_nodes, num_experts); an expert may have replicas on several nodes.
        tokens_per_draw: Neighbouring tokens that take the same replicas: 1, or a part of a batch that stays together.
    """

    hosts: Tensor
    tokens_per_draw: int = 1

    def __post_init__(self) -> None:
        require(bool(self.hosts.any(0).all()), "placement must host every expert somewhere, got an expert without node")

    @property
    def num_nodes(self) -> int:
        """How many there are."""
        return len(self.hosts)

    def hosted(self, node: int) -> Tensor:
        """Experts of a node, int64."""
        return self.hosts[node].nonzero().flatten()

    def destinations(self, subset: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The node that runs each chosen expert of each token.

        A token takes the same random number to all of its experts, so that replicas which lie together are used
        together: where every node has every expert, the token goes to one node drawn uniformly.

        Args:
            subset: Chosen experts, bool (num_tokens, num_experts).
            generator: Draws replicas; not used where there are none.

        Returns:
            int64 of the same shape, -1 where an expert is not chosen.

        Example: experts 0 and 2 on node 0, expert 1 on node 1: a token that uses 1 and 2 has (-1, 1, 0).
        """
        replicas = self.hosts.sum(0)
        nodes = self.hosts.t().int().argsort(dim=1, descending=True, stable=True)
        if int(replicas.max()) == 1:
            chosen = nodes[:, 0].expand(subset.shape)
        else:
            parts = torch.rand(-(-len(subset) // self.tokens_per_draw), 1, generator=generator)
            draws = parts.repeat_interleave(self.tokens_per_draw, dim=0)[: len(subset)]
            numbers = (draws * replicas).long().clamp(max=replicas - 1)
            chosen = nodes.gather(1, numbers.t()).t()
        return chosen.to(subset.device).masked_fill(~subset, -1)


def place_experts(rule: PlacementRule, num_nodes: int, loads: Tensor, tokens_per_draw: int = 1) -> Placement:
    """Put experts on nodes.

    With more nodes than experts the rules but `random` give expert e to the nodes e, e + num_experts and so on.

    Args:
        rule: `round_robin`: expert e on node e modulo nodes. `balanced`: the heaviest expert first, to the node that
            carries least so far. `random`: every node has every expert, and a token goes to one drawn uniformly, with
            chance 1 / num_nodes each.
        num_nodes: At least 1.
        loads: Rows of each expert, of any scale (num_experts,); read by `balanced`.
        tokens_per_draw: See `Placement`.

    Raises:
        ValueError: If the rule is unknown or there is no node.

    Example: loads (5, 4, 3, 2) on two nodes: round robin carries 8 and 6, balanced 7 and 7.
    """
    require(rule in RULES, f"placement must be one of {', '.join(RULES)}, got {rule!r}")
    require(num_nodes >= 1, f"num_nodes must be at least 1, got {num_nodes}")
    num_experts = len(loads)
    if rule == "random":
        return Placement(torch.ones(num_nodes, num_experts, dtype=torch.bool), tokens_per_draw)
    hosts = torch.zeros(num_nodes, num_experts, dtype=torch.bool)
    if rule == "round_robin" or num_nodes > num_experts:
        most = max(num_nodes, num_experts)
        places = torch.arange(most)
        hosts[places % num_nodes, places % num_experts] = True
        return Placement(hosts, tokens_per_draw)
    carried = torch.zeros(num_nodes, dtype=torch.float64)
    for expert in loads.double().argsort(descending=True, stable=True).tolist():
        node = int(carried.argmin())
        hosts[node, expert], carried[node] = True, carried[node] + loads[expert]
    return Placement(hosts)


@dataclass(frozen=True)
class Traffic:
    """What one site's tokens send and run; every field is (num_nodes,), int64.

    Attributes:
        tokens: Tokens that a node gets, each once however many experts it uses there.
        rows: (token, expert) pairs that it runs.
        sent: Bytes that leave it, hidden states on their way out and updates on their way back, with mixing weights.
    """

    tokens: Tensor
    rows: Tensor
    sent: Tensor

    @property
    def imbalance(self) -> float:
        """Rows of the busiest node over the mean; 1 when balanced, and where nothing runs."""
        mean = self.rows.double().mean()
        return float(self.rows.max() / mean) if mean > 0 else 1.0


def count_traffic(destinations: Tensor, homes: Tensor, num_nodes: int, row_bytes: tuple[int, int]) -> Traffic:
    """Count what goes where.

    Args:
        destinations: From `Placement.destinations` (num_tokens, num_experts).
        homes: Node that each token lives on (num_tokens,), int64.
        num_nodes: How many there are.
        row_bytes: Of a token on its way out, and of its update on the way back.

    Example: two tokens at home on node 0, of two nodes; the first uses an expert of each, the second two of node 1:
    tokens (1, 2), rows (1, 3); node 0 sends two tokens out, node 1 two updates back.
    """
    chosen = destinations >= 0
    pairs = torch.stack((chosen.nonzero()[:, 0], destinations[chosen]))
    rows = torch.bincount(pairs[1], minlength=num_nodes)
    token, node = pairs.unique(dim=1)
    tokens = torch.bincount(node, minlength=num_nodes)
    away = homes[token] != node
    out = torch.bincount(homes[token][away], minlength=num_nodes)
    back = torch.bincount(node[away], minlength=num_nodes)
    return Traffic(tokens=tokens, rows=rows, sent=row_bytes[0] * out + row_bytes[1] * back)
