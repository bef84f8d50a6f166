"""How evenly a router loads the experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np

from evaluation.intervals import FloatArray


@dataclass(frozen=True, kw_only=True)
class Balance:
    """Five readings of the same loads, each the mean over expert sites; a load is the tokens that use an expert."""

    load_cv: float
    """Standard deviation of the loads over their mean; 0 when balanced, and at a site never used."""
    max_vio: float
    """Largest load over the mean load, minus 1 (arXiv:2408.15664); 0 when balanced, and at a site never used."""
    dead_units: float
    """Share of the experts that no token uses, in [0, 1]."""
    diversity: float
    """exp(entropy of the loads) over the number of experts, in [0, 1]; 1 when balanced, 0 at a site never used."""
    busiest_load: float
    """Share of the tokens that use the busiest expert, in [0, 1]."""

    def to_json(self) -> dict[str, float]:
        """The five readings by name."""
        return asdict(self)


def balance(loads: Sequence[FloatArray], num_tokens: int) -> Balance:
    """Read the balance off the loads of all expert sites.

    Args:
        loads: Tokens that used each expert, for each site float64 (num_experts,).
        num_tokens: Tokens that passed every site.

    Returns:
        Means over the sites; of a backbone without expert sites what a balanced one has, with no load.

    Example: loads (3, 1, 0, 0), 4 tokens: load_cv 1.22, max_vio 2, dead_units .5, diversity .44, busiest_load .75.
    """
    if not loads:
        return Balance(load_cv=0.0, max_vio=0.0, dead_units=0.0, diversity=1.0, busiest_load=0.0)
    sites = [_site_balance(load, num_tokens) for load in loads]
    names = [field.name for field in fields(Balance)]
    return Balance(**{name: float(np.mean([getattr(site, name) for site in sites])) for name in names})


def _site_balance(load: FloatArray, num_tokens: int) -> Balance:
    if not load.any():
        return Balance(load_cv=0.0, max_vio=0.0, dead_units=1.0, diversity=0.0, busiest_load=0.0)
    shares = load[load > 0] / load.sum()
    return Balance(
        load_cv=load.std() / load.mean(),
        max_vio=load.max() / load.mean() - 1,
        dead_units=float((load == 0).mean()),
        diversity=np.exp(-(shares * np.log(shares)).sum()) / len(load),
        busiest_load=load.max() / num_tokens,
    )
