"""Query-norm router: heads with the longest queries, the cost of all queries counted."""

from types import SimpleNamespace

import pytest
import torch

from moe_backbone import NativeRouter, RoutingSite, SiteView
from moe_backbone.kernels import rotate
from policies.baselines import QueryNorm, fixed_routers, query_projections


def make_view(features, kind, scores, index=0):
    site = RoutingSite(kind=kind, layer=0, num_units=scores.shape[1], native_units=2, unit_flops=1)
    price, tokens = torch.zeros(len(scores)), torch.zeros(1, len(scores), dtype=torch.int64)
    return SiteView(index=index, site=site, features=features, scores=scores, price=price, tokens=tokens)


def test_longest_query_of_the_docstring():
    """Heads that read one feature each; the sign does not matter."""
    heads = torch.eye(2).unsqueeze(2)
    features = torch.tensor([[3.0, 4.0], [3.0, -4.0], [-4.0, 3.0]])
    subset = QueryNorm({0: heads}, 1).select(make_view(features, "heads", torch.zeros(3, 2)))
    assert subset.tolist() == [[False, True], [False, True], [True, False]]


def test_experts_are_native_or_top_k():
    view = make_view(torch.zeros(1, 2), "experts", torch.tensor([[0.5, 0.2, 0.3]]).log(), index=1)
    assert QueryNorm({}, 1).select(view).tolist() == [[True, False, True]]
    assert QueryNorm({}, 1, 1).select(view).tolist() == [[True, False, False]]
    assert QueryNorm({}, 1, 0).select(view).tolist() == [[False, False, False]]


def test_choice_is_that_of_the_rotated_queries_of_the_attention(tiny_backbone, tiny_tokens):
    queries = query_projections(tiny_backbone)
    _, subsets = tiny_backbone.run(tiny_tokens, QueryNorm(queries, 2))
    state = tiny_backbone.begin(tiny_tokens)
    query = torch.einsum("nsd,hde->nhse", state.features, tiny_backbone.attentions[0].query)
    norms = rotate(query, tiny_backbone.rotation).norm(dim=3).transpose(1, 2).flatten(0, 1)
    expected = torch.zeros_like(norms, dtype=torch.bool).scatter_(1, norms.topk(2).indices, True)
    assert torch.equal(subsets[0], expected)
    assert set(queries) == {0, 2}
    assert torch.equal(queries[2], tiny_backbone.attentions[1].query)


def test_all_heads_are_native(tiny_backbone, tiny_tokens):
    logits, _ = tiny_backbone.run(tiny_tokens, QueryNorm(query_projections(tiny_backbone), 4))
    assert torch.equal(logits, tiny_backbone.run(tiny_tokens, NativeRouter())[0])


def test_overhead_is_the_queries_of_all_heads_of_all_layers(tiny_backbone, tiny_config):
    expected = tiny_config.num_layers * 2 * tiny_config.hidden_size * tiny_config.hidden_size
    assert QueryNorm(query_projections(tiny_backbone), 1).overhead_flops == expected


def test_backbone_that_hides_its_queries_goes_without_aloud(tiny_backbone, tiny_tokens, caplog):
    hidden = SimpleNamespace(sites=tiny_backbone.sites)
    assert query_projections(hidden) is None
    points = fixed_routers(hidden, tiny_tokens, tiny_tokens, seed=0, wanted=("query-norm",))
    assert points == []
    assert "query-norm left out" in caplog.text


BAD = {
    "heads": (lambda view: QueryNorm({}, -1), "num_heads must be at least 0, got -1"),
    "k": (lambda view: QueryNorm({}, 1, -1), "k must be at least 0, got -1"),
    "many": (lambda view: QueryNorm({}, 3).select(view), r"num_heads must lie in \[0, units=2\], got 3"),
}


@pytest.mark.parametrize(("act", "message"), BAD.values(), ids=BAD.keys())
def test_impossible_counts_are_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act(make_view(torch.zeros(1, 2), "heads", torch.zeros(1, 2)))
