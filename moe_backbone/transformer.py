"""Causal mixture-of-experts transformer whose routing comes from outside, site by site."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from moe_backbone.attention import Attention, KeptCache, KeyValueCache, rotation_table
from moe_backbone.checks import require
from moe_backbone.compensation import Compensation
from moe_backbone.compute import fixed_flops, transformer_sites
from moe_backbone.config import BackboneConfig
from moe_backbone.experts import ExpertLayer
from moe_backbone.kernels import Backend, linear
from moe_backbone.sites import HeadMeaning, NativeRouter, Router, RoutingSite, SiteView


@dataclass(frozen=True, kw_only=True)
class RoutingState:
    """Where the tokens stand: before site `site_index`, or behind the last one."""

    tokens: Tensor
    """Token ids (num_sequences, seq_len), int64."""
    price: Tensor
    """(num_sequences * seq_len,), float32."""
    hidden: Tensor
    """Residual stream (num_sequences, seq_len, hidden_size)."""
    features: Tensor
    """Normalised input of the next sublayer, same shape; after the last site, of the output head."""
    scores: Tensor | None
    """Native gate of the next site, log-softmax (num_tokens, num_units); None where there is no gate."""
    site_index: int
    first_position: int
    """Position of the first token in its sequence; above 0 when a cache holds earlier tokens."""
    cache: KeyValueCache | KeptCache | None = field(repr=False)

    @property
    def positions(self) -> Tensor:
        """Position of each row's token in its sequence (num_sequences * seq_len,), int64."""
        num_sequences, seq_len = self.tokens.shape
        positions = torch.arange(self.first_position, self.first_position + seq_len, device=self.tokens.device)
        return positions.repeat(num_sequences)

    @property
    def earlier_keys(self) -> Tensor | None:
        """Keys that the heads of the current layer keep of tokens before these (num_sequences, num_heads), int64.

        None where there are none, and where every token is a key.
        """
        return self.cache.counts(self.site_index // 2) if isinstance(self.cache, KeptCache) else None


class MoETransformer(nn.Module):
    """The `Backbone` of this project: RMSNorm, rotary positions, head sites and SwiGLU expert sites.

    Args:
        config: Sizes and rules.

    Attributes:
        sites: `2 * num_layers` routed sites in running order; what a unit costs there follows `head_meaning`.
        backend: Which kernels run; see `moe_backbone.kernels`.
        head_meaning: What a token skips in a head that it does not use; any weights run under either meaning.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.head_meaning = "query"
        self.backend: Backend = "auto"
        self._compensation: tuple[Compensation | None] = (None,)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.norms = nn.ModuleList(nn.RMSNorm(config.hidden_size, eps=1e-6) for _ in range(2 * config.num_layers + 1))
        self.attentions = nn.ModuleList(Attention(config) for _ in range(config.num_layers))
        self.expert_layers = nn.ModuleList(ExpertLayer(config) for _ in range(config.num_layers))
        self.output_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("rotation", rotation_table(config), persistent=False)
        self.rotation: Tensor
        nn.init.normal_(self.embedding.weight, std=0.5)
        nn.init.normal_(self.output_head.weight, std=config.hidden_size**-0.5)

    @property
    def head_meaning(self) -> HeadMeaning:
        """What a token skips in a head that it does not use."""
        return self._head_meaning

    @head_meaning.setter
    def head_meaning(self, meaning: HeadMeaning) -> None:
        rule = "must be 'query' or 'query_key_value'"
        require(meaning in ("query", "query_key_value"), f"head_meaning {rule}, got {meaning!r}")
        self._head_meaning = meaning
        self.sites: tuple[RoutingSite, ...] = transformer_sites(self.config, meaning)

    def begin(
        self, tokens: Tensor, price: Tensor | None = None, cache: KeyValueCache | KeptCache | None = None
    ) -> RoutingState:
        """Embed tokens and stand before the first site.

        Args:
            tokens: (num_sequences, seq_len), int64.
            price: (num_sequences * seq_len,) or None for zeros; only shown to the router.
            cache: Keys and values of earlier tokens of the same sequences; grown in place by `advance`.

        Raises:
            ValueError: If the tokens have another shape, or reach past the longest sequence, or the cache was made
                under another head meaning.
        """
        if tokens.dim() != 2:
            raise ValueError(f"tokens must have shape (num_sequences, seq_len), got {tuple(tokens.shape)}")
        first_position = 0 if cache is None else cache.length
        if first_position + tokens.shape[1] > self.rotation.shape[1]:
            raise ValueError(
                f"sequence length must be at most {self.rotation.shape[1]}, got {first_position + tokens.shape[1]}"
            )
        if cache is not None and isinstance(cache, KeptCache) != (self.head_meaning == "query_key_value"):
            raise ValueError(
                f"cache must be made under head_meaning {self.head_meaning!r}, got a {type(cache).__name__}"
            )
        if price is None:
            price = torch.zeros(tokens.numel(), device=tokens.device)
        hidden = self.embedding(tokens)
        state = RoutingState(
            tokens=tokens,
            price=price,
            hidden=hidden,
            features=hidden,
            scores=None,
            site_index=0,
            first_position=first_position,
            cache=cache,
        )
        return self._stand_before(state, hidden, 0)

    def _stand_before(self, state: RoutingState, hidden: Tensor, site_index: int) -> RoutingState:
        """Normalise for the next sublayer and ask its native gate."""
        features = self.norms[site_index](hidden)
        scores = None
        if site_index < len(self.sites):
            scores = self._sublayer(site_index).scores(features.flatten(0, 1))
        return replace(state, hidden=hidden, features=features, scores=scores, site_index=site_index)

    def _sublayer(self, site_index: int) -> Attention | ExpertLayer:
        layers = self.expert_layers if site_index % 2 else self.attentions
        return layers[site_index // 2]  # type: ignore[return-value]

    def observe(self, state: RoutingState) -> SiteView:
        """What a router may see at the current site."""
        site = self.sites[state.site_index]
        features = state.features.flatten(0, 1)
        scores = state.scores
        if scores is None:
            scores = features.new_zeros(features.shape[0], site.num_units)
        return SiteView(
            index=state.site_index,
            site=site,
            features=features,
            scores=scores,
            price=state.price,
            tokens=state.tokens,
        )

    def advance(self, state: RoutingState, subset: Tensor | None, switch: Tensor | None = None) -> RoutingState:
        """Run the current site and stand before the next.

        Args:
            state: From `begin` or `advance`.
            subset: Chosen units, bool (num_tokens, num_units); an empty row leaves the residual stream unchanged
                but for a shared expert. None to run every unit to the degree of `switch`.
            switch: For training by back-propagation, float of the same shape; every unit is computed. With a subset,
                which its values must equal, its gradient is what turning a unit round would change, under
                `query_key_value` for later tokens too, which then find its key or do not. Without, degrees in [0, 1]
                and their derivative.
        """
        sublayer = self._sublayer(state.site_index)
        constants = None if self.compensation is None else self.compensation[state.site_index]
        if isinstance(sublayer, Attention):
            rotation = self.rotation[:, state.first_position : state.first_position + state.tokens.shape[1]]
            update = sublayer(state, subset, rotation, self.backend, self.head_meaning, switch, constants)
        else:
            update = sublayer(state.features, state.scores, subset, self.backend, switch, constants)
        return self._stand_before(state, state.hidden + update, state.site_index + 1)

    def finish(self, state: RoutingState) -> Tensor:
        """Logits (num_sequences, seq_len, vocab_size), float32, after the last site."""
        if state.cache is not None:
            state.cache.length += state.tokens.shape[1]
        return linear(state.features, self.output_head.weight).float()

    def run(
        self,
        tokens: Tensor,
        router: Router,
        price: Tensor | None = None,
        cache: KeyValueCache | KeptCache | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run every site under `router`; its `compensation`, if it has one, stands in for what it skips.

        Returns:
            Logits (num_sequences, seq_len, vocab_size), and the subset used at each site.
        """
        state = self.begin(tokens, price, cache)
        subsets = []
        with self.compensated(getattr(router, "compensation", None)):
            while state.site_index < len(self.sites):
                subsets.append(router.select(self.observe(state)))
                state = self.advance(state, subsets[-1])
        return self.finish(state), subsets

    def new_cache(self) -> Any:
        """An empty cache for decoding, of the kind that `head_meaning` needs."""
        if self.head_meaning == "query_key_value":
            return KeptCache(self.config.num_layers)
        return KeyValueCache(self.config.num_layers, self.config.seq_len)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits under native routing."""
        return self.run(tokens, NativeRouter())[0]

    @contextmanager
    def using(self, backend: Backend | None = None, *, head_meaning: HeadMeaning | None = None) -> Iterator[None]:
        """Run on other kernels or under another head meaning meanwhile; None leaves it as it is."""
        before = self.backend, self.head_meaning
        try:
            self.backend, self.head_meaning = backend or self.backend, head_meaning or self.head_meaning
            yield
        finally:
            self.backend, self.head_meaning = before

    @property
    def compensation(self) -> Compensation | None:
        """What `advance` adds in place of skipped units; no part of the backbone, nor of its hash."""
        return self._compensation[0]

    def use_compensation(self, compensation: Compensation | None) -> None:
        """Add these constants in place of skipped units from now on; their weights stay with their owner."""
        self._compensation = (compensation,)  # in a tuple, as a module assigned to a module becomes a part of it

    @contextmanager
    def compensated(self, compensation: Compensation | None) -> Iterator[None]:
        """The same meanwhile."""
        before = self.compensation
        self.use_compensation(compensation)
        try:
            yield
        finally:
            self.use_compensation(before)

    @property
    def name(self) -> str:
        """What it is called where a reader must know which one is meant."""
        return "moe-transformer"

    @property
    def fixed_flops(self) -> float:
        """FLOPs of one token that no routing can save."""
        return fixed_flops(self.config, self.head_meaning)

    @property
    def hidden_size(self) -> int:
        """Width of a token's features."""
        return self.config.hidden_size

    @property
    def num_parameters(self) -> int:
        """Trained numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    def sha256(self) -> str:
        """Hash of sizes and weights: what a router is tied to."""
        digest = hashlib.sha256(repr(self.config).encode())
        for name, weight in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def balance_loss(scores: Sequence[Tensor], subsets: Sequence[Tensor]) -> Tensor:
    """Mean over sites of num_experts * sum of (share of rows) * (mean probability); 1 when balanced.

    Args:
        scores: Log-softmax gate scores of each expert site (num_tokens, num_experts).
        subsets: What ran there, bool, same shapes.

    Source: arXiv:2101.03961, equation 4.
    """
    losses = []
    for site_scores, subset in zip(scores, subsets, strict=True):
        share = subset.float().mean(0) / subset.float().mean(0).sum().clamp_min(1e-9)
        losses.append(site_scores.shape[1] * (share * site_scores.exp().mean(0)).sum())
    return torch.stack(losses).mean()
