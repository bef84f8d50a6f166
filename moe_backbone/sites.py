"""The types that cross rooms: a routed site, what a router sees of it, and the two protocols."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

HeadMeaning = Literal["query", "query_key_value"]
"""What a token skips in a head that it does not use. `query`: only to attend, as later tokens attend to its key and
value. `query_key_value`: these too, so later tokens cannot attend to it there, and nothing of it is cached."""


@dataclass(frozen=True, kw_only=True)
class RoutingSite:
    """A sublayer whose units can be switched on or off for each token.

    A unit that runs for a token which attends to `n` keys costs `unit_flops + n * unit_flops_per_key` FLOPs,
    multiplications and additions counted separately.
    """

    kind: Literal["heads", "experts"]
    layer: int
    num_units: int
    native_units: int
    """Units that native routing uses for every token."""
    unit_flops: int
    """FLOPs of one unit for one token, whatever its position."""
    unit_flops_per_key: int = 0
    """FLOPs of one unit for one token and one attended key; 0 for experts."""
    drops_keys: bool = False
    """Whether only tokens that use a unit are keys there (`query_key_value`); otherwise every token is a key."""

    @property
    def unit_cached_numbers(self) -> int:
        """Numbers that one unit keeps of one token for later ones, its key and its value; 0 for experts."""
        return self.unit_flops_per_key // 2  # each is multiplied and added once for every token that attends to it

    @property
    def name(self) -> str:
        """Short label for tables and plots, such as `layer0.heads`."""
        return f"layer{self.layer}.{self.kind}"


@dataclass(frozen=True, kw_only=True)
class SiteView:
    """What a router sees of one site. Rows are tokens, sequence after sequence."""

    index: int
    """Place of the site in running order."""
    site: RoutingSite
    features: Tensor
    """The sublayer's normalised input (num_tokens, hidden_size), float32."""
    scores: Tensor
    """Log-softmax of the native gate (num_tokens, num_units), float32, nats; zeros where there is no gate."""
    price: Tensor
    """Price of one unit of compute (num_tokens,), float32, nats per native compute."""
    tokens: Tensor
    """Token ids (num_sequences, seq_len), int64; row-major order is the order of the rows above."""


@runtime_checkable
class Router(Protocol):
    """Everything that decides."""

    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units)."""
        ...


class Backbone(Protocol):
    """Everything that computes."""

    @property
    def sites(self) -> Sequence[RoutingSite]:
        """Routed sites in running order."""
        ...

    @property
    def hidden_size(self) -> int:
        """Width of a token's features."""
        ...

    @property
    def config(self) -> Any:
        """Sizes: at least `seq_len`, `hidden_size`, `max_units` and `vocab_size`."""
        ...

    @property
    def num_parameters(self) -> int:
        """Trained numbers."""
        ...

    @property
    def head_meaning(self) -> HeadMeaning:
        """What a token skips in a head that it does not use."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """All weights; the first lies on the device where tokens go."""
        ...

    def compensated(self, compensation: Any) -> AbstractContextManager[None]:
        """Let `advance` add these constants in place of skipped units meanwhile; None for none."""
        ...

    def new_cache(self) -> Any:
        """An empty cache for decoding."""
        ...

    @property
    def name(self) -> str:
        """What it is called where a reader must know which one is meant."""
        ...

    @property
    def fixed_flops(self) -> float:
        """FLOPs of one token that no routing can save."""
        ...

    def sha256(self) -> str:
        """Hash of sizes and weights: what a router is tied to."""
        ...

    def begin(self, tokens: Tensor, price: Tensor | None = None, cache: Any | None = None) -> Any:
        """Embed tokens (num_sequences, seq_len), int64, and stand before the first site."""
        ...

    def observe(self, state: Any) -> SiteView:
        """What a router may see at the current site."""
        ...

    def advance(self, state: Any, subset: Tensor) -> Any:
        """Run the current site with `subset`, bool (num_tokens, num_units)."""
        ...

    def finish(self, state: Any) -> Tensor:
        """Logits (num_sequences, seq_len, vocab_size) after the last site."""
        ...

    def run(self, tokens: Tensor, router: Router, price: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Loop over the four above: logits, and the subset used at each site."""
        ...


class NativeRouter:
    """The backbone's own choice: the best `native_units` units by gate score, every unit where there is no gate."""

    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units)."""
        return best_units(view.scores, view.site.native_units)


def best_units(scores: Tensor, count: int | Tensor) -> Tensor:
    """Mark the `count` highest scores of each row; of equal scores the first.

    Args:
        scores: (num_tokens, num_units), any float dtype.
        count: Units to choose, at least 0; an int, or int64 (num_tokens,) for each row its own.

    Returns:
        bool (num_tokens, num_units).

    Example: scores [[.1, .7, .2]] with count 2 gives [[False, True, True]].
    """
    if isinstance(count, Tensor):
        ranks = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return ranks < count.unsqueeze(1)
    if count <= 0 or count >= scores.shape[1]:
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    scores = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)  # a broken gate shall show
    last = scores.topk(count, dim=1, sorted=False).values.amin(1, keepdim=True)
    above, level = scores > last, scores == last  # a sort of whole rows would cost ten times more
    missing = count - above.sum(1, keepdim=True, dtype=torch.int32)
    return above | (level & (level.cumsum(1, dtype=torch.int32) <= missing))
