"""A router boiled down to a table: as many units, agreement, files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_backbone import MoETransformer, SiteView
from policies.baselines import ExpertRule, HeadRule, PerSiteRules
from policies.linear_router import LinearRouter, RouterSpec
from policies.threshold_table import ThresholdTable, fit_table, load_table


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(256, (12, 16))


@pytest.fixture
def learned(tiny_backbone: MoETransformer) -> LinearRouter:
    """With weights, so that it looks at features and price."""
    router = LinearRouter(RouterSpec(hidden_size=tiny_backbone.hidden_size, sites=tiny_backbone.sites, head_prior=0.5))
    with torch.no_grad():
        for weight in (router.weight, router.price_weight):
            weight.normal_(std=0.2)
    return router


def test_finds_a_table_again(tiny_backbone: MoETransformer, tokens: Tensor) -> None:
    """Fitted to a table, it is that table: every bit agrees."""
    rules = [
        HeadRule(kept=(0, 2)) if site.kind == "heads" else ExpertRule(most=3, above=0.27, least=1)
        for site in tiny_backbone.sites
    ]
    table = fit_table(PerSiteRules(tuple(rules)), tiny_backbone, tokens)
    assert table.agreement == (1.0,) * len(rules)
    assert [rule.kept for rule in table.rules.rules if isinstance(rule, HeadRule)] == [(0, 2)] * (len(rules) // 2)


@pytest.mark.parametrize("price", [0.02, 0.9])
def test_spends_what_the_router_spends(
    price: float, learned: LinearRouter, tiny_backbone: MoETransformer, tokens: Tensor
) -> None:
    """At every expert site, and over all head sites up to less than one head; and agrees more than chance."""
    router = learned.at_price(price)
    table = fit_table(router, tiny_backbone, tokens, price)
    with torch.no_grad():
        _, wanted = tiny_backbone.run(tokens, router)
        _, spent = tiny_backbone.run(tokens, table)
    heads = 0.0
    for site, one, other in zip(tiny_backbone.sites, wanted, spent, strict=True):
        gap = (other.sum(1).double().mean() - one.sum(1).double().mean()).item()
        if site.kind == "experts":
            assert abs(gap) < 0.02
        else:
            heads += gap
    assert abs(heads) <= 0.5
    assert not hasattr(table, "overhead_flops")
    assert min(table.agreement) > 0.5


def test_takes_the_heads_that_are_used_most(tiny_backbone: MoETransformer, tokens: Tensor) -> None:
    """Head 3 by every token and head 1 by every other: one and a half heads, so two at one site and one at the next."""

    class Uneven:
        def select(self, view: SiteView) -> Tensor:
            subset = torch.ones_like(view.scores, dtype=torch.bool)
            if view.site.kind == "heads":
                subset[:] = False
                subset[:, 3] = True
                subset[::2, 1] = True
            return subset

    table = fit_table(Uneven(), tiny_backbone, tokens)
    kept = [rule.kept for rule in table.rules.rules if isinstance(rule, HeadRule)]
    assert kept == [(1, 3), (3,)] * (len(kept) // 2)


def test_file_gives_the_same_table_to_its_own_backbone_only(
    learned: LinearRouter, tiny_backbone: MoETransformer, tokens: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "table.json"
    table = fit_table(learned.at_price(0.1), tiny_backbone, tokens, 0.1)
    table.save(path, tiny_backbone)
    assert load_table(path, tiny_backbone) == table
    with torch.no_grad():
        tiny_backbone.output_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match="router must be made for this backbone"):
        load_table(path, tiny_backbone)


def test_damaged_file_is_refused(tiny_backbone: MoETransformer, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    with pytest.raises(ValueError, match="threshold table must be a readable file"):
        load_table(path, tiny_backbone)
    ThresholdTable(rules=PerSiteRules((HeadRule(kept=(0,)),))).save(path, tiny_backbone)
    description = json.loads(path.read_text())
    for change in ({"format": 9}, {"rules": 3}):
        path.write_text(json.dumps(description | change))
        with pytest.raises(ValueError, match="threshold table must be"):
            load_table(path, tiny_backbone)
