"""A learned router boiled down to a table: static heads, and a gate threshold for the experts of every site.

It costs no product. What it cannot keep is what the learned router makes of a token's features.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_backbone.checks import require
from moe_backbone.files import write_text_atomic
from moe_backbone.plain import read_json
from moe_backbone.sites import Backbone, Router, SiteView
from policies.baselines.site_rules import ExpertRule, HeadRule, PerSiteRules, SiteRule
from policies.tied_files import check_made_for

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ThresholdTable:
    """A router with one static rule for every site, fitted to what another router does at one setting."""

    rules: PerSiteRules
    """Static heads, and for experts a gate probability with a least and a greatest number."""
    agreement: tuple[float, ...] = ()
    """Share of the (token, unit) bits of each site that are those of the router it was fitted to."""
    price: float | None = None
    """Of the router that it was fitted to, nats per native compute."""

    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units)."""
        return self.rules.select(view)

    def save(self, path: Path, backbone: Backbone) -> None:
        """Write a JSON file, tied to the backbone by its hash."""
        made_for = {"backbone_sha256": backbone.sha256(), "backbone_name": backbone.name}
        content = {"agreement": self.agreement, "price": self.price, "rules": self.rules.to_json()}
        description = {"format": FORMAT, "kind": "threshold-table", **made_for, **content}
        write_text_atomic(path, json.dumps(description, indent=1) + "\n")


def load_table(path: Path, backbone: Backbone) -> ThresholdTable:
    """Read a table and check that it was made for this backbone.

    Raises:
        ValueError: If the file is missing, damaged, of another format, or made for another backbone.
    """
    try:
        description = read_json(path)
        made = description["format"], description["kind"]
        made_for = str(description["backbone_sha256"]), description.get("backbone_name")
        rules = PerSiteRules.from_json(description["rules"])
        table = ThresholdTable(rules=rules, agreement=tuple(description["agreement"]), price=description["price"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"threshold table must be a readable file, got {path}: {error}") from None
    require(made == (FORMAT, "threshold-table"), f"threshold table must be of format {FORMAT}, got {made} in {path}")
    check_made_for(made_for[0], backbone, made_for[1])
    return table


@torch.no_grad()
def fit_table(router: Router, backbone: Any, tokens: Tensor, price: float | None = None) -> ThresholdTable:
    """Fit a table to a router on training text, so that every site spends as many units as under the router.

    Site by site in running order, on the tokens as they come under the rules found so far. Heads: those that the
    router uses most, as many as it uses of them on average; what rounding leaves over goes to the next head site.
    Experts: of the rules whose mean number is the router's, one for each least and greatest number, that which agrees
    with the router on most bits. Memory is 8 times the text's gate scores.

    Args:
        router: For one price, as `LinearRouter.at_price` gives it.
        backbone: What computes.
        tokens: Training text (num_sequences, seq_len), int64, on the backbone's device.
        price: Only kept with the table.
    """
    _, wanted = backbone.run(tokens, router)
    state, left_over = backbone.begin(tokens), 0.0
    rules: list[SiteRule] = []
    agreement = []
    for subset in wanted:
        view = backbone.observe(state)
        rule: SiteRule
        if view.site.kind == "heads":
            rule, left_over = _fit_heads(subset, left_over)
        else:
            rule = _fit_experts(view, subset)
        rules.append(rule)
        chosen = rule.select(view)
        agreement.append(_agreement(chosen, subset))
        state = backbone.advance(state, chosen)
    return ThresholdTable(rules=PerSiteRules(tuple(rules)), agreement=tuple(agreement), price=price)


def _fit_heads(subset: Tensor, left_over: float) -> tuple[HeadRule, float]:
    """The heads used most, and what was not spent yet of the mean number."""
    wanted = subset.sum(1).double().mean().item() + left_over
    count = min(max(round(wanted), 0), subset.shape[1])
    most_used = subset.double().mean(0).argsort(descending=True, stable=True)[:count]
    return HeadRule(kept=tuple(sorted(most_used.tolist()))), wanted - count


def _fit_experts(view: SiteView, subset: Tensor) -> ExpertRule:
    """The rule that agrees best among those with as many experts as `subset` on average."""
    counts = subset.sum(1)
    mean, most = counts.double().mean().item(), max(int(counts.max()), 1)
    candidates = [
        ExpertRule(most=high, above=_threshold(view.scores, mean, low, high), least=low)
        for high in range(max(1, -int(-mean // 1)), most + 1)
        for low in range(min(high, int(mean)) + 1)
    ]
    return max(candidates, key=lambda rule: _agreement(rule.select(view), subset))


def _threshold(scores: Tensor, mean: float, least: int, most: int) -> float:
    """The gate probability above which tokens have `mean` experts on average, within a least and a greatest number.

    Experts up to the least run anyway and those behind the greatest never, so it is a quantile of the ranks between.
    """
    between = scores.exp().sort(dim=1, descending=True).values[:, least:most].flatten()
    spent = min(max(round((mean - least) * len(scores)), 0), len(between))
    if spent == len(between):
        return 0.0
    return between.sort(descending=True).values[spent].item()


def _agreement(chosen: Tensor, subset: Tensor) -> float:
    return (chosen == subset).double().mean().item()
