"""How many units a linear map lets run, and how the router travels."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_backbone import MoETransformer, RoutingSite, SiteView
from policies.count_router import CountRouter, CountSpec, load_count_router, save_count_router

SITES = (
    RoutingSite(kind="heads", layer=0, num_units=2, native_units=2, unit_flops=10),
    RoutingSite(kind="experts", layer=0, num_units=3, native_units=1, unit_flops=10),
)
ALLOCATOR = CountSpec(hidden_size=2, sites=SITES)
VALUES = CountSpec(hidden_size=2, sites=SITES, heads=True, least=0, scores=True, priced=True)


def _view(index: int, price: float = 1.0) -> SiteView:
    """Two tokens with features (1, 0) and (0, 1)."""
    scores = torch.tensor([[0.2, 0.7, 0.1], [0.1, 0.3, 0.6]]).log() if index else torch.zeros(2, 2)
    prices = torch.full((2,), price)
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    return SiteView(index=index, site=SITES[index], features=torch.eye(2), scores=scores, price=prices, tokens=tokens)


def _random(spec: CountSpec) -> CountRouter:
    router = CountRouter(spec)
    for weight in router.parameters():
        torch.nn.init.normal_(weight)
    return router.requires_grad_(False)


def test_runs_as_many_of_the_best_experts_as_are_worth_most() -> None:
    """Token 0 wants two experts, token 1 three; heads are native."""
    router = CountRouter(ALLOCATOR)
    with torch.no_grad():
        router.weight[0, 0, 2], router.weight[0, 1, 3] = 1.0, 1.0
    assert router.select(_view(1)).tolist() == [[True, True, False], [True, True, True]]
    assert router.select(_view(0)).tolist() == [[True, True]] * 2


@pytest.mark.parametrize(("spec", "least"), [(ALLOCATOR, 1), (VALUES, 0)], ids=["allocator", "values"])
def test_counts_that_are_not_legal_are_never_chosen(spec: CountSpec, least: int) -> None:
    """Not even where they are worth most: no count below the least, none above the site's own units."""
    router = CountRouter(spec)
    with torch.no_grad():
        router.weight[:, :2, 0] = 5.0
    assert router.select(_view(1)).sum(1).tolist() == [least, least]
    with torch.no_grad():
        router.weight[:, :2, 0] = 0.0
        router.weight[:, :2, 2] = 1.0
        router.weight[0, :2, 3] = 9.0
    most = [2, 2] if spec.heads else [3, 3]
    assert router.select(_view(1)).sum(1).tolist() == most
    assert router.select(_view(0)).sum(1).tolist() == [2, 2]


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("price", [0.01, 0.3, 2.5])
def test_price_folds_into_the_weights(index: int, price: float) -> None:
    """Same choices, whatever price the view shows then, at half the FLOPs; another price chooses otherwise."""
    router = _random(VALUES)
    folded = router.at_price(price)
    assert torch.equal(folded.select(_view(index, price=77.0)), router.select(_view(index, price)))
    values = router.values([index], torch.ones(1, 6), torch.tensor([price]))
    torch.testing.assert_close(folded.values([index], torch.ones(1, 6)), values)
    assert not torch.allclose(router.at_price(price + 1).values([index], torch.ones(1, 6)), values)
    assert 2 * folded.overhead_flops == router.overhead_flops


def test_counts_its_own_flops() -> None:
    """Two features for three counts; six inputs for 3 + 4 counts, twice for the price."""
    assert CountRouter(ALLOCATOR).overhead_flops == 2 * 2 * 3
    assert CountRouter(VALUES).overhead_flops == 2 * 6 * 7 * 2


def test_price_must_be_an_input_and_possible() -> None:
    """The message names rule and value."""
    with pytest.raises(ValueError, match="router must have the price as an input"):
        CountRouter(ALLOCATOR).at_price(1.0)
    with pytest.raises(ValueError, match="price must be positive and finite, got 0"):
        CountRouter(VALUES).at_price(0.0)


@pytest.fixture
def spec_of() -> Callable[[MoETransformer], CountSpec]:
    """What fits a backbone."""
    return lambda backbone: CountSpec(hidden_size=backbone.hidden_size, sites=tuple(backbone.sites))


def test_comes_back_from_its_files_as_it_was(
    tiny_backbone: MoETransformer, tmp_path: Path, spec_of: Callable[[MoETransformer], CountSpec]
) -> None:
    """Same specification, same bits."""
    spec = replace(spec_of(tiny_backbone), heads=True, least=0, scores=True, priced=True)
    router = _random(spec)
    save_count_router(router, tmp_path, tiny_backbone)
    loaded = load_count_router(tmp_path, tiny_backbone)
    assert loaded.spec == spec
    pairs = zip(router.parameters(), loaded.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert not any(weight.requires_grad for weight in loaded.parameters())


def test_files_of_another_backbone_or_damaged_are_refused(
    tiny_backbone: MoETransformer, tmp_path: Path, spec_of: Callable[[MoETransformer], CountSpec]
) -> None:
    """Each with its own message."""
    with pytest.raises(ValueError, match="router folder must hold readable"):
        load_count_router(tmp_path, tiny_backbone)
    save_count_router(_random(spec_of(tiny_backbone)), tmp_path, tiny_backbone)
    with pytest.raises(ValueError, match="router must be made for this backbone"):
        load_count_router(tmp_path, MoETransformer(tiny_backbone.config))
    weights = load_file(tmp_path / "router.safetensors")
    save_file({"weight": weights["weight"] * torch.nan}, tmp_path / "router.safetensors")
    with pytest.raises(ValueError, match="router weights must be finite"):
        load_count_router(tmp_path, tiny_backbone)
    save_file({"weight": weights["weight"][:1].clone()}, tmp_path / "router.safetensors")
    with pytest.raises(ValueError, match="router weights must fit their description"):
        load_count_router(tmp_path, tiny_backbone)
    description = json.loads((tmp_path / "router.json").read_text()) | {"kind": "other"}
    (tmp_path / "router.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="router must be count of format 1, got"):
        load_count_router(tmp_path, tiny_backbone)
    (tmp_path / "router.json").write_text("{")
    with pytest.raises(ValueError, match="router folder must hold readable"):
        load_count_router(tmp_path, tiny_backbone)
