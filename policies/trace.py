"""Routing decisions as arrays: recorded for serving and for reading, and replayed.

`routed_experts` has the layout in which vLLM captures routed experts: tokens x layers x k, expert numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_backbone.checks import require
from moe_backbone.files import write_atomic
from moe_backbone.sites import Backbone, NativeRouter, Router, SiteView
from policies.baselines import FixedPoint

NO_EXPERT = -1
"""Fills up a token's experts where it uses fewer than another token does."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """What ran for every token of some sequences."""

    tokens: NDArray[np.int64]
    """Token ids (num_sequences, seq_len)."""
    routed_experts: NDArray[np.int32]
    """Experts of each token in rising order, then `NO_EXPERT` (num_sequences * seq_len, num_expert_sites, k)."""
    head_mask: NDArray[np.bool_] | None = None
    """Heads of each token (num_sequences * seq_len, num_head_sites, num_heads); None where no heads are routed."""
    backbone_sha256: str = ""

    def save(self, path: Path) -> None:
        """Write an `.npz`, whole or not at all."""
        arrays: dict[str, Any] = {"tokens": self.tokens, "routed_experts": self.routed_experts}
        arrays["backbone_sha256"] = np.array(self.backbone_sha256)
        if self.head_mask is not None:
            arrays["head_mask"] = self.head_mask

        def write(place: Path) -> None:
            with place.open("wb") as file:  # by a handle, as numpy adds an ending to a name
                np.savez_compressed(file, **arrays)

        write_atomic(path, write)

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Read what `save` wrote; loads no code.

        Raises:
            ValueError: If it cannot be read as a trace.
        """
        try:
            # by a handle of our own: numpy leaves its own open where an archive is cut off
            with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            return cls(**{**arrays, "backbone_sha256": str(arrays["backbone_sha256"])})
        except (OSError, ValueError, TypeError, KeyError, EOFError, BadZipFile, AttributeError, RuntimeError) as error:
            raise ValueError(f"trace must be a file that --trace wrote, got {path}: {error}") from None


@torch.no_grad()
def record(
    backbone: Backbone, router: Router, tokens: Tensor, *, price: float = 0.0, batch_sequences: int = 32
) -> Trace:
    """Run a router and keep what it decided.

    Args:
        backbone: What computes.
        router: What decides.
        tokens: (num_sequences, seq_len), int64, on the backbone's device.
        price: Shown to the router, nats per native compute.
        batch_sequences: Sequences of one forward pass.
    """
    batches = []
    for part in tokens.split(batch_sequences):
        prices = torch.full((part.numel(),), price, device=part.device)
        batches.append(backbone.run(part, router, prices)[1])
    subsets = [torch.cat(parts).cpu() for parts in zip(*batches, strict=True)]
    kinds = [site.kind for site in backbone.sites]
    experts = [subset for kind, subset in zip(kinds, subsets, strict=True) if kind == "experts"]
    heads = [subset for kind, subset in zip(kinds, subsets, strict=True) if kind == "heads"]
    return Trace(
        tokens=tokens.cpu().numpy(),
        routed_experts=_indices(experts, tokens.numel()),
        head_mask=torch.stack(heads, dim=1).numpy() if heads else None,
        backbone_sha256=backbone.sha256(),
    )


def _indices(subsets: Sequence[Tensor], num_tokens: int) -> NDArray[np.int32]:
    """Numbers of the chosen units (num_tokens, num_sites, k)."""
    most = max((int(subset.sum(1).max()) for subset in subsets), default=0)
    routed = np.full((num_tokens, len(subsets), most), NO_EXPERT, dtype=np.int32)
    for site, subset in enumerate(subsets):
        order = (~subset).int().argsort(dim=1, stable=True)[:, :most]
        chosen = subset.gather(1, order)
        routed[:, site, : order.shape[1]] = torch.where(chosen, order, NO_EXPERT).numpy()
    return routed


class TraceRouter:
    """Decides as a trace did, for the sequences that are in it.

    Args:
        trace: What was recorded; a bare array of vLLM's makes one with the tokens that it belongs to.
        backbone: What it is replayed on.

    Raises:
        ValueError: If the trace was recorded on another backbone, or has other sites.
    """

    def __init__(self, trace: Trace, backbone: Backbone) -> None:
        sha256 = backbone.sha256()
        made_for = trace.backbone_sha256 or sha256
        rule = f"trace must be recorded on this backbone, {backbone.name} (sha256 {sha256[:12]})"
        require(made_for == sha256, f"{rule}, got one of {made_for[:12]}")
        kinds = [site.kind for site in backbone.sites]
        count = trace.routed_experts.shape[1]
        require(count == kinds.count("experts"), f"trace must have {kinds.count('experts')} expert sites, got {count}")
        self.trace = trace
        self._place = {kind: [i for i, other in enumerate(kinds) if other == kind] for kind in ("experts", "heads")}
        self._row = {sequence.tobytes(): row for row, sequence in enumerate(trace.tokens)}

    def select(self, view: SiteView) -> Tensor:
        """What was chosen: bool (num_tokens, num_units); native heads if none were recorded.

        Raises:
            ValueError: If a sequence is not in the trace.
        """
        kind, seq_len = view.site.kind, view.tokens.shape[1]
        rows = [self._row.get(sequence.tobytes()) for sequence in view.tokens.cpu().numpy()]
        require(None not in rows, f"trace must hold every sequence that is run, got {rows.count(None)} others")
        source = self.trace.routed_experts if kind == "experts" else self.trace.head_mask
        if source is None:
            return NativeRouter().select(view)
        place = self._place[kind].index(view.index)
        of_rows = source.reshape(len(self.trace.tokens), seq_len, *source.shape[1:])[np.array(rows)][:, :, place]
        recorded: Tensor = torch.from_numpy(np.ascontiguousarray(of_rows)).flatten(0, 1).to(view.scores.device)
        if kind == "heads":
            return recorded
        subset = torch.zeros(len(recorded), view.site.num_units + 1, dtype=torch.bool, device=recorded.device)
        return subset.scatter(1, recorded.long() % (view.site.num_units + 1), True)[:, :-1]  # `NO_EXPERT` comes last


def replay_point(path: Path, backbone: Backbone) -> FixedPoint:
    """The decisions of a trace as a router of the table."""
    return FixedPoint("trace", {"file": path.name}, TraceRouter(Trace.load(path), backbone))
