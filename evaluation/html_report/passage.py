"""A passage of held-out text, each byte coloured by what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.intervals import FloatArray
from evaluation.profile import Profile, TokenRouting
from moe_backbone import RoutingSite

NUM_SHADES = 9
LEAST_STEP = 0.005
"""Fraction of native compute that one shade spans at least, so that rounding does not look like a choice."""
BLANKS = {ord(" "): "\u00b7", ord("\n"): "\u21b5", ord("\t"): "\u2192"}
"""What stands for white space."""


@dataclass(frozen=True, kw_only=True)
class Shading:
    """Shades of equal width, the same for all passages; the first and the last also hold what lies beyond."""

    bounds: FloatArray
    """Compute between two shades (NUM_SHADES - 1,), rising, fraction of native."""

    def shades(self, compute: FloatArray) -> list[int]:
        """Shade of each token, from 0 for the cheapest."""
        return [int(shade) for shade in np.searchsorted(self.bounds, compute, side="right")]

    @property
    def labels(self) -> list[str]:
        """Legend of each shade."""
        inner = [f"{low:.2f} to {high:.2f}" for low, high in zip(self.bounds[:-1], self.bounds[1:], strict=True)]
        return [f"below {self.bounds[0]:.2f}", *inner, f"{self.bounds[-1]:.2f} or more"]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One byte as the page shows it."""

    glyph: str
    """What stands for the byte, visible."""
    shade: int
    tip: str
    """Shown on hover, several lines."""
    ends_line: bool
    begins_window: bool


def shading(routings: Sequence[TokenRouting]) -> Shading:
    """Spread the shades over the middle 96 % of all tokens' compute."""
    compute = np.concatenate([routing.compute for routing in routings])
    low, high = np.quantile(compute, [0.02, 0.98])
    high = max(high, low + LEAST_STEP * NUM_SHADES)
    return Shading(bounds=np.linspace(low, high, NUM_SHADES + 1)[1:-1])


def passage_marks(profile: Profile, routing: TokenRouting, shades: Shading) -> list[Mark]:
    """The bytes of all windows in order, as `routing` treated them."""
    tokens, seq_len = profile.tokens.ravel(), profile.tokens.shape[1]
    return [
        Mark(
            glyph=_shown(profile, int(token)),
            shade=shade,
            tip=_tip(profile, routing, row),
            ends_line=int(token) in (0, 10) if profile.word == "byte" else "\n" in profile.text(int(token)),
            begins_window=row % seq_len == 0,
        )
        for row, (token, shade) in enumerate(zip(tokens, shades.shades(routing.compute), strict=True))
    ]


def glyph(byte: int) -> str:
    """A visible sign for a byte: two hex digits where it has none of its own.

    Example: 65 gives `A`, 32 a middle dot, 10 a bent arrow, 9 an arrow, 0 gives `00` and 255 `ff`.
    """
    if byte in BLANKS:
        return BLANKS[byte]
    return chr(byte) if ord(" ") < byte < 127 else f"{byte:02x}"


def _shown(profile: Profile, token: int) -> str:
    """A visible sign for a token."""
    if profile.word == "byte":
        return glyph(token)
    return "".join(BLANKS.get(ord(sign), sign) for sign in profile.text(token)) or f"<{token}>"


def _tip(profile: Profile, routing: TokenRouting, row: int) -> str:
    """What hovering shows: token, compute, prediction, and the units that ran."""
    token, target = int(profile.tokens.flat[row]), int(profile.targets.flat[row])
    probability, routed = np.exp(-profile.native.loss[row]), np.exp(-routing.loss[row])
    return "\n".join(
        [
            f"{profile.word} {token}: {_shown(profile, token)}",
            f"compute {routing.compute[row]:.3f} of native",
            f"next {profile.word} {target}: {_shown(profile, target)}, "
            f"probability {probability:.3f} natively, {routed:.3f} routed",
            *_units_by_layer(profile.sites, routing, row),
        ]
    )


def _units_by_layer(sites: Sequence[RoutingSite], routing: TokenRouting, row: int) -> list[str]:
    """One line for each layer, such as `layer 0: heads 1 3; experts none`."""
    layers: dict[int, list[str]] = {}
    for site, subset in zip(sites, routing.subsets, strict=True):
        used = " ".join(map(str, np.flatnonzero(subset[row]))) or "none"
        layers.setdefault(site.layer, []).append(f"{site.kind} {used}")
    return [f"layer {layer}: {'; '.join(parts)}" for layer, parts in layers.items()]
