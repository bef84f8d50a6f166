"""The tables that only the page has: the balance of every router, and who gets the compute."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from evaluation.html_report.cells import Cell, Table, heading, value_text
from evaluation.profile import Profile, TokenRouting
from evaluation.showcase import RIVAL_COMPUTE, nearest
from evaluation.token_groups import Grouping, byte_classes, quintiles, word_positions

BALANCE_KEYS = ("compute", "load_cv", "max_vio", "dead_units", "diversity", "busiest_load", "setting")


def balance_table(points: Sequence[Mapping[str, Any]], order: Iterable[str], learned: str) -> Table:
    """How evenly each router loads the experts, at its setting nearest to compute 0.5.

    Args:
        points: Of `evaluation.json`.
        order: Names of the routers, as they stand in the table; native is put first.
        learned: Name of the row that stands out.
    """
    rows = []
    for name in ("native", *order):
        settings = [point for point in points if point["router"] == name]
        if settings:
            point = nearest(settings, RIVAL_COMPUTE, lambda point: (point["compute"], point["log_likelihood"]))
            rows.append([Cell(text=name), *(Cell(text=_balance_text(point[key])) for key in BALANCE_KEYS)])
    return Table(
        title=f"Balance of every router, at its setting nearest to compute {RIVAL_COMPUTE}",
        columns=["router", *(heading(key) for key in BALANCE_KEYS)],
        rows=rows,
        strong=learned,
        note="Means over expert sites. MaxVio: largest load over mean load, minus 1. Dead units: share of experts that "
        "no token uses. Diversity: exp(entropy of the loads) over the number of experts. Busiest load: share of the "
        "tokens that use the busiest expert.",
        source="evaluation.json, key points",
    )


def _balance_text(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else value_text(value)


def site_table(profile: Profile) -> Table:
    """What each site costs and how many units a token uses there, natively and under each router."""
    routings = (profile.native, *profile.routings)
    parts = [np.append(routing.site_compute.mean(axis=1), routing.overhead) for routing in routings]
    longest = max(float(part.max()) for part in parts)
    units = [[float(subset.sum(1).mean()) for subset in routing.subsets] for routing in routings]
    rows = []
    for index, site in enumerate(profile.sites):
        rows.append([Cell(text=site.name, note=f"of {site.num_units}")])
        for part, used in zip(parts, units, strict=True):
            note = f"{_share(part, index)}, {used[index]:.2f} units"
            rows[-1].append(Cell(text=f"{part[index]:.3f}", bar=part[index] / longest, note=note))
    own = [Cell(text=f"{part[-1]:.3f}", bar=part[-1] / longest, note=_share(part, -1)) for part in parts]
    rows.append([Cell(text="the router itself"), *own])
    rows.append([Cell(text="all"), *(Cell(text=f"{part.sum():.3f}") for part in parts)])
    return Table(
        title="By site",
        columns=["site", *(routing.label for routing in routings)],
        rows=rows,
        strong="all",
        note="Fraction of native compute spent at each site; in small print its share of all that the router spends, "
        "and the units that a token uses on average.",
        source=profile_source(profile),
    )


def _share(part: np.ndarray, index: int) -> str:
    total = part.sum()
    return f"{100 * part[index] / total if total else 0:.0f} %"


def group_tables(profile: Profile) -> list[Table]:
    """Compute and loss by class of byte, place in the word, and difficulty."""
    word = profile.word
    caution = (
        f" Native's own luck sorts these {word}s: where it did badly by chance, any other router does better, so the "
        "hardest fifth understates the rise. Entropy has no such bias."
    )
    if word == "byte":
        classes = [byte_classes(profile.tokens), word_positions(profile.tokens)]
    else:
        classes = [byte_classes(profile.first_bytes, "First character of the token")]
    return [
        *(group_table(profile, grouping) for grouping in classes),
        group_table(profile, quintiles(f"Native loss of the next {word}, nats", profile.native.loss), caution),
        group_table(profile, quintiles("Entropy of the native prediction, nats", profile.native.entropy)),
    ]


def group_table(profile: Profile, grouping: Grouping, caution: str = "") -> Table:
    """Mean compute of a token in each group under each router, and how much its loss rises over native."""
    means = [grouping.means(routing.compute) for routing in profile.routings]
    longest = max((float(mean.max()) for mean in means), default=1.0)
    rises = [grouping.means(routing.loss - profile.native.loss) for routing in profile.routings]
    native_loss = grouping.means(profile.native.loss)
    rows = []
    for group, name in enumerate(grouping.names):
        cells = [
            Cell(text=f"{mean[group]:.3f}", bar=mean[group] / longest, note=f"{rise[group]:+.3f}")
            for mean, rise in zip(means, rises, strict=True)
        ]
        facts = [Cell(text=f"{100 * grouping.shares[group]:.1f} %"), Cell(text=f"{native_loss[group]:.3f}")]
        rows.append([Cell(text=name), *facts, *cells])
    rows.append(_all_row(profile))
    return Table(
        title=f"By {grouping.title[0].lower()}{grouping.title[1:]}",
        columns=["group", f"share of {profile.word}s", "native loss", *(routing.label for routing in profile.routings)],
        rows=rows,
        strong="all",
        note=f"Mean compute of a {profile.word} as a fraction of native, the router's own counted; in small print how "
        f"much its loss rises over native, in nats.{caution}",
        source=profile_source(profile),
    )


def _all_row(profile: Profile) -> list[Cell]:
    cells = [_all_cell(routing, profile.native) for routing in profile.routings]
    return [Cell(text="all"), Cell(text="100.0 %"), Cell(text=f"{profile.native.loss.mean():.3f}"), *cells]


def _all_cell(routing: TokenRouting, native: TokenRouting) -> Cell:
    return Cell(text=f"{routing.compute.mean():.3f}", note=f"{(routing.loss - native.loss).mean():+.3f}")


def profile_source(profile: Profile) -> str:
    """Where figures that are counted for the page come from."""
    num_sequences, seq_len = profile.tokens.shape
    return f"counted for this page on {num_sequences} windows of {seq_len} held-out {profile.word}s; in no other file"
