"""Rules of the routing MDP that a user may choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_backbone.checks import require, require_at_least, require_price
from moe_backbone.loads import LoadPrices


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """What is paid, what it costs, and how an action is written.

    Raises:
        ValueError: If a value is impossible; the message gives name, rule and actual value.
    """

    quality: Literal["kl", "log_likelihood", "accuracy"] = "kl"
    """Paid at the last site, against the native rollout of the same tokens: minus KL(native || routed) in nats, or the
    change in log-likelihood (nats) or in accuracy (0/1) of the true next token."""
    credit: Literal["token", "sequence"] = "token"
    """Whether each lane is paid for its own token, or all lanes of a sequence share the mean. In a task, where few
    tokens are scored, its own is the next scored one, and the mean is that of the scored ones."""
    price_low: float = 0.01
    """Lowest price of native compute, nats; drawn log-uniformly for each sequence and shown to the policy."""
    price_high: float = 1.0
    """Highest price; equal to `price_low` for one fixed price."""
    balance_price: float = 0.0
    """What an uneven load of the experts costs, nats: at each expert site a lane also pays this times the sum over its
    chosen units of (num_experts * share of the site's load - 1) / native_units. Means over lanes are this times (mean
    units / native_units) * CV**2 of the loads, which is 0 where they are even. For vector environments only."""
    nodes: int = 0
    """Nodes that the experts lie on, expert e on node e modulo nodes; 0 for none. With them `balance_price` is for
    uneven loads of the nodes."""
    send_price: float = 0.0
    """What it costs to send a token to a node, nats: a lane pays it at each expert site for every node that has any of
    its chosen experts. Needs `nodes`; for vector environments only."""
    cache_price: float = 0.0
    """What the native keys and values of a token count beside its native compute, as a fraction of native compute: a
    step's cost is its compute plus this times the share of the native cache that the token leaves there. Above 0 only
    under the head meaning `query_key_value`; otherwise every token leaves all."""
    action: Literal["subset", "count", "ranked"] = "subset"
    """`subset`: one bit a unit. `count`: how many units, best gate scores first. `ranked`: an ordered list of
    `ranked_units` different units."""
    ranked_units: int = 2
    """Units that an action of the `ranked` codec names; a site with no more of them runs them all. Its space cannot say
    that they differ: what `sample` draws may be refused."""
    rollouts_per_sequence: int = 1
    """Copies of every sequence in a vector environment, same tokens and same price."""
    native_cache_mb: int = 0
    """Most megabytes (2**20 bytes) of native predictions kept for texts that come again; the first texts stay. Random
    windows hardly ever come again, so 0 keeps none; 256 is 2,048 windows of 128 bytes of text. A resumed run starts
    with none, so it may differ in the last bits."""

    def __post_init__(self) -> None:
        for name in ("price_low", "price_high"):
            require_price(name, getattr(self, name))
        if self.price_high < self.price_low:
            raise ValueError(f"price_high must be at least price_low={self.price_low}, got {self.price_high}")
        require_at_least(self, 1, "rollouts_per_sequence", "ranked_units")
        require_at_least(self, 0, "native_cache_mb", "balance_price", "cache_price", "nodes", "send_price")
        require(self.nodes > 0 or self.send_price == 0, f"send_price must be 0 without nodes, got {self.send_price}")
        for name, known in (
            ("quality", ("kl", "log_likelihood", "accuracy")),
            ("credit", ("token", "sequence")),
            ("action", ("subset", "count", "ranked")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    @property
    def load_prices(self) -> LoadPrices:
        """What loads and nodes cost."""
        return LoadPrices(balance=self.balance_price, send=self.send_price, nodes=self.nodes)
