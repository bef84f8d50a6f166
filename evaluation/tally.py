"""Adds up what the subsets of a run ask for, and holds it against what ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from evaluation.balance import Balance, balance
from evaluation.intervals import FloatArray
from moe_backbone import ComputeMeter


class Tally:
    """Loads, FLOPs and rows over the batches of one run.

    Attributes:
        flops: Routable FLOPs of the chosen units over all tokens.
        num_tokens: Tokens seen.
    """

    def __init__(self, meter: ComputeMeter) -> None:
        """Start at zero for the sites of `meter`."""
        self.flops = self._cache_bytes = 0.0
        self.num_tokens = 0
        self._meter = meter
        self._loads = np.full((len(meter.sites), max(site.num_units for site in meter.sites)), np.nan)
        for load, site in zip(self._loads, meter.sites, strict=True):
            load[: site.num_units] = 0
        self._rows: Counter[str] = Counter()
        self._touched: list[int] = []

    def add(self, subsets: Sequence[Tensor], num_sequences: int) -> None:
        """Count one batch of whole sequences.

        Args:
            subsets: What the router chose at each site, bool (num_tokens, num_units).
            num_sequences: Sequences in the batch.
        """
        positions = torch.arange(self._meter.seq_len, device=subsets[0].device).repeat(num_sequences)
        self.num_tokens += positions.numel()
        for index, (site, subset) in enumerate(zip(self._meter.sites, subsets, strict=True)):
            load = subset.sum(0).cpu().numpy()
            self._loads[index, : site.num_units] += load
            self._touched.append(int((load > 0).sum()))
            self._rows[site.kind] += int(load.sum())
            self.flops += float(self._meter.flops(index, subset, positions).sum())
            self._cache_bytes += float(self._meter.cache_bytes(index, subset).sum(dtype=torch.float64))

    def check_rows(self, counted: Mapping[str, int]) -> None:
        """Hold the subsets against the rows that the kernels ran, by kind of unit.

        Raises:
            AssertionError: If the two differ: the reported compute would not be what was spent.
        """
        ran = {kind: rows for kind, rows in counted.items() if rows}
        asked = {kind: rows for kind, rows in self._rows.items() if rows}
        if ran != asked:
            raise AssertionError(f"rows run must equal the rows that the subsets ask for, {asked}, got {ran}")

    @property
    def usage(self) -> FloatArray:
        """Share of tokens that used each unit (num_sites, max_units), float64; NaN where there is no unit."""
        return self._loads / self.num_tokens

    @property
    def units_per_token(self) -> tuple[float, ...]:
        """Mean units of a token at each site."""
        return tuple(float(units) for units in np.nansum(self.usage, axis=1))

    @property
    def distinct_units(self) -> float:
        """Distinct units that a batch touches, mean over sites and batches."""
        return float(np.mean(self._touched))

    @property
    def cache(self) -> float | None:
        """Bytes of keys and values kept over those of native routing; None where no site drops any."""
        if not any(site.drops_keys for site in self._meter.sites):
            return None
        return self._cache_bytes / (self.num_tokens * self._meter.native_cache_bytes)

    @property
    def balance(self) -> Balance:
        """How evenly the experts are loaded."""
        sites = zip(self._meter.sites, self._loads, strict=True)
        return balance([load[: site.num_units] for site, load in sites if site.kind == "experts"], self.num_tokens)
