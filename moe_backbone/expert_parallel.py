"""Experts of a backbone spread over the ranks of a job: tokens travel to them by all-to-all and their updates back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_backbone import ranks
from moe_backbone.checks import require
from moe_backbone.kernels import Backend, expert_mlp
from moe_backbone.placement import Placement, Traffic
from moe_backbone.transformer import MoETransformer


class Spent(NamedTuple):
    """What one rank did at a site since the last `reset`."""

    tokens: int
    """That came here, each once for all of its experts."""
    rows: int
    """(token, expert) pairs that ran here."""
    sent: int
    """Bytes that left for other ranks."""
    computing: float
    """Seconds in experts."""
    waiting: float
    """Seconds in all-to-all, the wait for slower ranks included."""


class SpreadExperts:
    """Runs the experts of one site on the ranks that host them; stands in for `kernels.expert_mlp`.

    Every rank brings tokens of its own and gets the updates of these. A token goes once to each rank that hosts any of
    its experts, with its mixing weights, and comes back as one partial sum. All ranks must call it equally often, if
    need be with no tokens.

    Args:
        placement: One node a rank.
        generator: Draws replicas, where there are any.
    """

    def __init__(self, placement: Placement, generator: torch.Generator | None = None) -> None:
        rule = f"placement must have one node for each of {ranks.world_size()} ranks"
        require(placement.num_nodes == ranks.world_size(), f"{rule}, got {placement.num_nodes}")
        self.placement, self.generator = placement, generator
        self._hosted = [placement.hosted(node) for node in range(placement.num_nodes)]
        self._width = max(map(len, self._hosted))
        self.reset()

    def reset(self) -> None:
        """Count from zero."""
        self.spent = Spent(0, 0, 0, 0.0, 0.0)

    def row_bytes(self, hidden_size: int, itemsize: int = 4) -> tuple[int, int]:
        """Of a token on its way out: hidden state, weights and mask of its experts there; and on its way back."""
        return itemsize * (hidden_size + 2 * self._width), itemsize * hidden_size

    def __call__(
        self, hidden: Tensor, weights: Tensor, subset: Tensor, gate_up: Tensor, down: Tensor, backend: Backend = "auto"
    ) -> Tensor:
        """As `kernels.expert_mlp`, but that `gate_up` and `down` are those of the experts hosted here."""
        where = self.placement.destinations(subset, self.generator)
        leaving = [(where == node).any(1).nonzero().flatten() for node in range(ranks.world_size())]
        parcels = [self._parcel(hidden, weights, where, node, tokens) for node, tokens in enumerate(leaving)]
        counts = [len(tokens) for tokens in leaving]
        started = time.perf_counter()
        arriving = (
            self._exchange(torch.tensor(counts, device=hidden.device).unsqueeze(1), None, None).flatten().tolist()
        )
        arrived = self._exchange(torch.cat(parcels), counts, arriving)
        received = time.perf_counter()
        rows, weight, mask = arrived.split((hidden.shape[1], self._width, self._width), dim=1)
        here = len(self._hosted[ranks.rank()])
        chosen = mask[:, :here] > 0
        update = expert_mlp(rows.contiguous(), weight[:, :here].contiguous(), chosen, gate_up, down, backend)
        computed = time.perf_counter()
        home = self._exchange(update, arriving, counts)
        total = torch.zeros_like(hidden).index_add_(0, torch.cat(leaving), home)
        ended = time.perf_counter()
        own, (out, back) = ranks.rank(), self.row_bytes(hidden.shape[1], hidden.element_size())
        sent = out * (sum(counts) - counts[own]) + back * (sum(arriving) - arriving[own])
        waiting = received - started + ended - computed
        step = Spent(sum(arriving), int(chosen.sum()), sent, computed - received, waiting)
        self.spent = Spent(*(before + now for before, now in zip(self.spent, step, strict=True)))  # type: ignore[arg-type]
        return total

    def _parcel(self, hidden: Tensor, weights: Tensor, where: Tensor, node: int, tokens: Tensor) -> Tensor:
        """What goes to a node: hidden state, weights and mask of its experts, one row a token."""
        hosted, parcel = self._hosted[node], hidden.new_zeros(len(tokens), hidden.shape[1] + 2 * self._width)
        mask = (where[tokens] == node)[:, hosted]
        parcel[:, : hidden.shape[1]] = hidden[tokens]
        parcel[:, hidden.shape[1] :][:, : len(hosted)] = weights[tokens][:, hosted] * mask
        parcel[:, hidden.shape[1] + self._width :][:, : len(hosted)] = mask.to(hidden.dtype)
        return parcel

    @staticmethod
    def _exchange(rows: Tensor, leaving: list[int] | None = None, arriving: list[int] | None = None) -> Tensor:
        """Rows of this rank for all, in their order, against those of all for this one; None for one row each."""
        if ranks.world_size() == 1:
            return rows
        received = rows.new_empty(len(rows) if arriving is None else sum(arriving), rows.shape[1])
        dist.all_to_all_single(received, rows.contiguous(), arriving, leaving)
        return received


def spread_experts(backbone: MoETransformer, placements: Sequence[Placement], seed: int = 0) -> list[SpreadExperts]:
    """Leave this rank the experts that it hosts, and let tokens travel to the others; for a frozen backbone.

    Its weights are no longer whole, so a hash of them, or saving them, means nothing afterwards.

    Args:
        backbone: Equal on all ranks; changed in place.
        placements: One for each layer.
        seed: Of the replicas drawn.

    Returns:
        What runs the experts of each layer, with its counts.

    Raises:
        ValueError: If placements and ranks do not fit, or experts are mixed by a gate vector.
    """
    rule = "mixing must be renormalize or keep for experts on several ranks"
    require(backbone.config.mixing != "gate_vector", f"{rule}, got {backbone.config.mixing}")
    layers = list(backbone.expert_layers)
    require(len(layers) == len(placements), f"placements must be one for each of {len(layers)}, got {len(placements)}")
    generator = torch.Generator().manual_seed(ranks.own_seed(seed))
    spread = []
    for layer, placement in zip(layers, placements, strict=True):
        runs = SpreadExperts(placement, generator)
        hosted = placement.hosted(ranks.rank()).to(layer.gate_up.device)  # type: ignore[arg-type]
        for name in ("gate_up", "down"):
            setattr(layer, name, nn.Parameter(getattr(layer, name).detach()[hosted], requires_grad=False))
        layer.run_experts = runs  # type: ignore[assignment]
        spread.append(runs)
    return spread


def measured_traffic(runs: SpreadExperts) -> Traffic:
    """What all ranks did at a site since the last `reset`; a collective call."""
    spent = ranks.gather(runs.spent)
    columns = [torch.tensor([getattr(one, name) for one in spent]) for name in ("tokens", "rows", "sent")]
    return Traffic(*columns)
