"""The oracle measures what a full run gives, and finds what enumeration finds where that can be had."""

from itertools import product

import pytest
import torch

from moe_backbone import (
    BackboneConfig,
    ComputeMeter,
    MoETransformer,
    NativeRouter,
    token_divergence,
    token_log_likelihood,
)
from policies.baselines import oracle as module
from policies.baselines.oracle import OracleSearch

POSITION = 5
QUALITIES = ("divergence", "log_likelihood")


class OnlyLast:
    """Given subsets for the last token of each sequence, native ones before it."""

    def __init__(self, subsets):
        self.subsets = subsets

    def select(self, view):
        subset = NativeRouter().select(view).unflatten(0, view.tokens.shape)
        subset[:, -1] = self.subsets[view.index]
        return subset.flatten(0, 1)


def make(backbone, tokens, quality="divergence", position=POSITION):
    targets = tokens[:, position + 1]
    search = OracleSearch(backbone, tokens[:, : position + 1], targets, seq_len=tokens.shape[1], quality=quality)
    return search, targets


def measure(backbone, tokens, subsets, quality, position=POSITION):
    """Quality, compute and logits by full runs without a cache."""
    past, targets = tokens[:, : position + 1], tokens[:, position + 1]
    native = backbone.run(past, NativeRouter())[0][:, -1]
    logits = backbone.run(past, OnlyLast(subsets))[0][:, -1]
    meter = ComputeMeter(backbone.sites, tokens.shape[1])
    places = torch.full((len(tokens),), position)
    earlier = torch.full((len(tokens), backbone.config.num_heads), position)  # the native past keeps every key
    compute = sum(meter.compute(index, subset, places, earlier) for index, subset in enumerate(subsets))
    if quality == "divergence":
        return -token_divergence(native, logits), compute, logits
    return token_log_likelihood(logits, targets) - token_log_likelihood(native, targets), compute, logits


@pytest.mark.parametrize("meaning", ["query", "query_key_value"])
@pytest.mark.parametrize("position", [0, POSITION], ids=["first token", "later token"])
@pytest.mark.parametrize("quality", QUALITIES)
def test_quality_compute_and_logits_are_those_of_a_full_run(tiny_backbone, tiny_tokens, quality, position, meaning):
    tiny_backbone.head_meaning = meaning
    search, _ = make(tiny_backbone, tiny_tokens, quality, position)
    choice = search.best(0.02)
    expected = measure(tiny_backbone, tiny_tokens, choice.subsets, quality, position)
    assert not all(subset.all() for subset in choice.subsets)
    for found, known in zip((choice.quality, choice.compute.float(), choice.logits), expected, strict=True):
        torch.testing.assert_close(found, known, atol=1e-5, rtol=1e-4)
    native = tiny_backbone.run(tiny_tokens[:, : position + 1], NativeRouter())[0][:, -1]
    torch.testing.assert_close(search.native_logits, native, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("price", [0.0, 0.02, 0.3])
def test_equals_enumeration_of_two_small_sites_for_nearly_all_tokens(quality, price):
    """64 pairs of subsets: two sites of three units."""
    torch.manual_seed(3)
    config = BackboneConfig(
        vocab_size=16, hidden_size=12, num_layers=1, num_heads=3, num_experts=3, top_k=2, intermediate_size=8, seq_len=8
    )
    backbone = MoETransformer(config).requires_grad_(False).eval()
    tokens = torch.randint(16, (12, 8))
    choice = make(backbone, tokens, quality)[0].best(price)
    best = torch.full((12,), -torch.inf)
    subsets = [torch.tensor(bits, dtype=torch.bool).expand(12, 3) for bits in product((0, 1), repeat=3)]
    for pair in product(subsets, subsets):
        reached, compute, _ = measure(backbone, tokens, list(pair), quality)
        best = torch.maximum(best, reached - price * compute)
    gap = best - (choice.quality - price * choice.compute)
    assert gap.min() > -1e-5
    assert (gap <= module.LEAST_GAIN).sum() >= 11  # one token may stop where only both sites together help
    assert gap.mean() < 0.02


@pytest.mark.parametrize("quality", QUALITIES)
def test_never_worse_than_native_and_free_when_compute_is_dear(tiny_backbone, tiny_tokens, quality):
    search, _ = make(tiny_backbone, tiny_tokens, quality)
    assert (search.best(0.0).quality >= 0).all()
    assert (search.native_compute > 0.5).all()
    costly = search.best(1e6)
    assert costly.compute.max() == 0
    assert not any(subset.any() for subset in costly.subsets)


def test_log_likelihood_beats_what_it_cannot_without_the_label(tiny_backbone, tiny_tokens):
    """The label shows: the gain is above 0 at no price, while the divergence is at best 0."""
    assert make(tiny_backbone, tiny_tokens, "log_likelihood")[0].best(0.0).quality.min() > 0.01
    assert make(tiny_backbone, tiny_tokens, "divergence")[0].best(0.0).quality.max() <= 1e-5


@pytest.mark.parametrize("tiny_site", [0, 4], ids=["flips and exchanges", "every subset"])
def test_no_flip_or_exchange_helps_where_the_search_has_stopped(tiny_backbone, tiny_tokens, tiny_site, monkeypatch):
    monkeypatch.setattr(module, "TINY_SITE", tiny_site)
    monkeypatch.setattr(module, "SHORTLIST", 4)
    price = 0.05
    choice = make(tiny_backbone, tiny_tokens)[0].best(price)
    values = choice.quality - price * choice.compute
    for index, subset in enumerate(choice.subsets):
        for one, other in product(range(4), repeat=2):
            changed = subset.clone()
            changed[:, one] ^= True
            if one < other:
                differed = changed[:, one] == changed[:, other]  # before the flip: an exchange
                changed[differed, other] ^= True
            others = [*choice.subsets[:index], changed, *choice.subsets[index + 1 :]]
            quality, compute, _ = measure(tiny_backbone, tiny_tokens, others, "divergence")
            assert (quality - price * compute <= values + module.LEAST_GAIN + 1e-5).all()


def test_a_start_from_another_price_is_taken_only_where_it_is_better(tiny_backbone, tiny_tokens):
    search, _ = make(tiny_backbone, tiny_tokens)
    dear = search.best(0.5)
    alone, helped = search.best(0.01), search.best(0.01, dear)
    value = alone.quality - 0.01 * alone.compute
    assert (helped.quality - 0.01 * helped.compute >= dear.quality - 0.01 * dear.compute - 1e-6).all()
    assert (helped.quality - 0.01 * helped.compute).mean() >= value.mean() - 1e-3


def test_unknown_quality_is_refused(tiny_backbone, tiny_tokens):
    with pytest.raises(ValueError, match="quality must be one of divergence, log_likelihood, got accuracy"):
        make(tiny_backbone, tiny_tokens, "accuracy")
