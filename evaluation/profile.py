"""What each single token costs and loses under a router: who gets the compute."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evaluation.evaluator import PointSpec
from evaluation.intervals import FloatArray
from moe_backbone import Backbone, ComputeMeter, NativeRouter, Router, RoutingSite, token_log_likelihood
from moe_backbone.corpus import Split
from moe_backbone.vocabulary import BYTES, Vocabulary

BATCH_SEQUENCES = 32
PASSAGE_TOKENS = 768


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenRouting:
    """What one router at one setting did with every token; rows are tokens, sequence after sequence."""

    router: str
    """Name of the router; `learned` for the trained one."""
    setting: dict[str, Any]
    """What sets this setting apart from others of the same router."""
    overhead: float
    """The router's own FLOPs for one token, over the native routable FLOPs."""
    site_compute: FloatArray = field(repr=False)
    """Fraction of native compute spent at each site (num_sites, num_tokens), the router's own left out."""
    subsets: tuple[NDArray[np.bool_], ...] = field(repr=False)
    """Units that ran, for each site bool (num_tokens, num_units)."""
    loss: FloatArray = field(repr=False)
    """Minus the log-likelihood of the next token (num_tokens,), nats."""
    entropy: FloatArray = field(repr=False)
    """Entropy of the prediction of the next token (num_tokens,), nats."""

    @property
    def compute(self) -> FloatArray:
        """Fraction of native compute that each token cost (num_tokens,), the router's own counted."""
        return self.site_compute.sum(axis=0) + self.overhead

    @property
    def usage(self) -> FloatArray:
        """Share of tokens that used each unit (num_sites, max_units), float64; NaN where a site has no such unit."""
        usage = np.full((len(self.subsets), max(subset.shape[1] for subset in self.subsets)), np.nan)
        for row, subset in zip(usage, self.subsets, strict=True):
            row[: subset.shape[1]] = subset.mean(axis=0)
        return usage

    @property
    def label(self) -> str:
        """Name and compute, such as `learned at 0.51`."""
        return f"{self.router} at {self.compute.mean():.2f}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Profile:
    """The same tokens under native routing and under a few routers."""

    sites: tuple[RoutingSite, ...]
    tokens: NDArray[np.int64] = field(repr=False)
    """Token ids (num_sequences, seq_len)."""
    targets: NDArray[np.int64] = field(repr=False)
    """Next tokens, same shape."""
    native: TokenRouting
    routings: tuple[TokenRouting, ...]
    vocabulary: Vocabulary = BYTES
    """What the tokens are."""

    @property
    def word(self) -> str:
        """What a reader calls a token."""
        return self.vocabulary.unit

    @property
    def first_bytes(self) -> NDArray[np.int64]:
        """First byte of each token's text but for leading spaces (num_sequences, seq_len); of a byte, itself."""
        if self.vocabulary is BYTES:
            return self.tokens
        distinct, places = np.unique(self.tokens, return_inverse=True)
        texts = self.vocabulary.pieces([int(token) for token in distinct])
        firsts = [((text.lstrip(" ") or text or "\x00").encode()[0]) for text in texts]
        return np.array(firsts, dtype=np.int64)[places].reshape(self.tokens.shape)

    def text(self, token: int) -> str:
        """What a token stands for."""
        return self.vocabulary.pieces([token])[0]


def profile_routing(
    backbone: Backbone,
    tokens: Tensor,
    targets: Tensor,
    router: Router,
    *,
    name: str,
    setting: Mapping[str, Any],
    price: float = 0.0,
) -> TokenRouting:
    """Run `router` and keep what it did with every token.

    Args:
        backbone: What computes; on the device of the tokens.
        tokens: (num_sequences, seq_len), int64.
        targets: Next tokens, same shape.
        router: What decides; `overhead_flops`, if it has it, is its own FLOPs per token over all sites.
        name: Name of the router.
        setting: What sets this setting apart from others of the same router.
        price: Price shown to the router, nats per native compute.
    """
    meter = ComputeMeter(backbone.sites, tokens.shape[1])
    batches = []
    with torch.no_grad():
        for start in range(0, len(tokens), BATCH_SEQUENCES):
            rows = slice(start, start + BATCH_SEQUENCES)
            batches.append(_run(backbone, meter, tokens[rows], targets[rows], router, price))
    site_compute, loss, entropy = (np.concatenate(parts, axis=-1) for parts in list(zip(*batches, strict=True))[:3])
    return TokenRouting(
        router=name,
        setting=dict(setting),
        overhead=float(getattr(router, "overhead_flops", 0.0)) / meter.native_flops,
        site_compute=site_compute,
        subsets=tuple(np.concatenate(parts) for parts in zip(*(batch[3] for batch in batches), strict=True)),
        loss=loss,
        entropy=entropy,
    )


def _run(
    backbone: Backbone, meter: ComputeMeter, tokens: Tensor, targets: Tensor, router: Router, price: float
) -> tuple[FloatArray, FloatArray, FloatArray, list[NDArray[np.bool_]]]:
    """Compute by site, loss, entropy and subsets of one batch."""
    logits, subsets = backbone.run(tokens, router, torch.full((tokens.numel(),), price, device=tokens.device))
    positions = torch.arange(meter.seq_len, device=tokens.device).repeat(len(tokens))
    flops = torch.stack([meter.flops(index, subset, positions) for index, subset in enumerate(subsets)])
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
    loss = -token_log_likelihood(logits, targets)
    numbers = (flops / meter.native_flops, loss.flatten(), entropy.flatten())
    site_compute, losses, entropies = (values.double().cpu().numpy() for values in numbers)
    return site_compute, losses, entropies, [subset.cpu().numpy() for subset in subsets]


def profile_points(
    backbone: Backbone,
    tokens: Tensor,
    targets: Tensor,
    specs: Iterable[PointSpec],
    vocabulary: Vocabulary = BYTES,
) -> Profile:
    """Profile native routing and each of `specs` on the same tokens, int64 (num_sequences, seq_len)."""
    native = profile_routing(backbone, tokens, targets, NativeRouter(), name="native", setting={})
    routings = [
        profile_routing(
            backbone,
            tokens,
            targets,
            spec.router,
            name=spec.name,
            setting=spec.setting,
            price=getattr(spec, "price", 0.0),
        )
        for spec in specs
    ]
    return Profile(
        sites=tuple(backbone.sites),
        tokens=tokens.cpu().numpy(),
        targets=targets.cpu().numpy(),
        native=native,
        routings=tuple(routings),
        vocabulary=vocabulary,
    )


def profile_split(
    backbone: Backbone,
    split: Split,
    specs: Sequence[PointSpec],
    *,
    seq_len: int,
    max_tokens: int = 4096,
    device: torch.device | str = "cpu",
) -> tuple[Profile, Profile]:
    """Profile windows spread over the whole split, and one passage of windows side by side from its middle.

    Args:
        backbone: What computes; on `device`.
        split: Held-out text.
        specs: Routers at their settings.
        seq_len: Tokens of a window.
        max_tokens: Most tokens of the windows that are spread.
        device: Where the tokens go.
    """
    spread = split.windows(seq_len, max_tokens)[:2]
    starts = split.starts(seq_len)
    count = max(1, min(len(starts), PASSAGE_TOKENS // seq_len))
    passage = split.at(starts[(len(starts) - count) // 2 :][:count], seq_len)
    profiles = [
        profile_points(backbone, tokens.to(device), targets.to(device), specs, split.vocabulary)
        for tokens, targets in (spread, passage)
    ]
    return profiles[0], profiles[1]
