"""Fixed routers follow their rule, draw reproducibly, and prune what matters least."""

import importlib.util
import json

import pytest
import torch

from moe_backbone import (
    BackboneConfig,
    MoETransformer,
    NativeRouter,
    RoutingSite,
    SiteView,
    token_log_likelihood,
)
from policies.baselines import (
    FIXED_NAMES,
    EntropyThreshold,
    GreedyConfig,
    GreedySearch,
    HashRouter,
    RandomHeads,
    RandomK,
    RandomSubset,
    SecondRatio,
    SequenceTopK,
    Threshold,
    TopK,
    TopP,
    UnitPruning,
    balanced_table,
    fixed_routers,
    head_importance,
    prune_units,
)

CONFIG = BackboneConfig(
    vocab_size=32, hidden_size=32, num_layers=2, num_heads=4, num_experts=4, top_k=2, intermediate_size=16, seq_len=12
)


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return MoETransformer(CONFIG).requires_grad_(False).eval()


@pytest.fixture
def text():
    stream = torch.randint(CONFIG.vocab_size, (5, 13), generator=torch.Generator().manual_seed(1))
    return stream[:, :-1], stream[:, 1:]


def expert_view(probabilities):
    scores = torch.tensor(probabilities).log()
    return make_view("experts", 1, scores, tokens=torch.arange(len(scores)).unsqueeze(0))


def make_view(kind, index, scores, tokens):
    native = scores.shape[1] if kind == "heads" else 2
    site = RoutingSite(kind=kind, layer=0, num_units=scores.shape[1], native_units=native, unit_flops=1)
    features, price = torch.zeros(len(scores), 3), torch.zeros(len(scores))
    return SiteView(index=index, site=site, features=features, scores=scores, price=price, tokens=tokens)


def head_view(tokens, num_heads=8):
    return make_view("heads", 0, torch.zeros(tokens.numel(), num_heads), tokens)


SCORES = [[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]]
WORKED = {
    "top-0": (TopK(0), ["....", "...."]),
    "top-1": (TopK(1), ["X...", "...X"]),
    "top-3": (TopK(3), ["XXX.", ".XXX"]),
    "above-.18": (Threshold(0.18, False), ["XX..", ".XXX"]),
    "above-.45": (Threshold(0.45, False), ["X...", "...."]),
    "above-.45-or-best": (Threshold(0.45, True), ["X...", "...X"]),
    "mass-.45": (TopP(0.45), ["X...", "..XX"]),
    "mass-.72": (TopP(0.72), ["XX..", ".XXX"]),
    "mass-1": (TopP(1.0), ["XXXX", "XXXX"]),
    "second-.4": (SecondRatio(0.4), ["XX..", "..XX"]),
    "second-.6": (SecondRatio(0.6), ["X...", "..XX"]),
    "second-.8": (SecondRatio(0.8), ["X...", "...X"]),
    "sure-below-.9": (EntropyThreshold(0.9), ["X...", "..XX"]),
    "sure-below-.8": (EntropyThreshold(0.8), ["XX..", "..XX"]),
    "sure-below-1": (EntropyThreshold(1.0), ["X...", "...X"]),
}


@pytest.mark.parametrize(("router", "expected"), WORKED.values(), ids=WORKED.keys())
def test_expert_rules_worked_by_hand(router, expected):
    subset = router.select(expert_view(SCORES))
    assert ["".join("X" if unit else "." for unit in row) for row in subset.tolist()] == expected


@pytest.mark.parametrize(
    "router",
    [
        TopK(1),
        Threshold(0.9, False),
        TopP(0.1),
        RandomK(1, 0),
        SecondRatio(1.0),
        EntropyThreshold(1.0),
        HashRouter(1, 0),
    ],
    ids=lambda router: type(router).__name__,
)
def test_expert_rules_leave_heads_native(router):
    assert router.select(head_view(torch.zeros(1, 3, dtype=torch.int64))).all()


def test_random_heads_are_constant_within_a_sequence_and_differ_between():
    tokens = torch.arange(40).view(10, 4)
    subset = RandomHeads(0.5, seed=3).select(head_view(tokens)).view(10, 4, 8)
    assert (subset == subset[:, :1]).all()
    assert (subset.sum(2) == 4).all()
    assert len({tuple(row) for row in subset[:, 0].tolist()}) > 1


def test_random_heads_of_each_token_differ_within_a_sequence():
    tokens = torch.arange(40).view(10, 4)
    subset = RandomHeads(0.5, seed=3, per_token=True).select(head_view(tokens)).view(10, 4, 8)
    assert (subset.sum(2) == 4).all()
    assert not (subset == subset[:, :1]).all()


@pytest.mark.parametrize(("k", "expected"), [(1, ["X..", "X.."]), (1.5, ["XX.", "X.."])], ids=["k 1", "k 1.5"])
def test_sequence_top_k_of_the_docstring(k, expected):
    scores = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.1, 1e-9]]).log()
    subset = SequenceTopK(k).select(make_view("experts", 1, scores, torch.zeros(1, 2, dtype=torch.int64)))
    assert ["".join("X" if unit else "." for unit in row) for row in subset.tolist()] == expected


def test_sequence_top_k_gives_every_sequence_its_own_budget():
    scores = torch.rand(40, 8).log_softmax(1)
    subset = SequenceTopK(1.5).select(make_view("experts", 1, scores, torch.zeros(4, 10, dtype=torch.int64)))
    assert subset.view(4, -1).sum(1).tolist() == [15] * 4
    assert len(set(subset.sum(1).tolist())) > 1


def test_hash_gives_an_id_the_same_experts_wherever_it_stands():
    tokens = torch.randint(500, (4, 1000))
    scores = torch.rand(4000, 8).log_softmax(1)
    subset = HashRouter(2, seed=0).select(make_view("experts", 1, scores, tokens))
    assert (subset.sum(1) == 2).all()
    for token in (0, 7, 499):
        rows = subset[tokens.flatten() == token]
        assert (rows == rows[0]).all()
    ids = torch.arange(500).unsqueeze(0)
    by_id = HashRouter(2, seed=0).select(make_view("experts", 1, scores[:500], ids))
    assert ((by_id.float().mean(0) - 0.25).abs() < 0.06).all()
    other_site = HashRouter(2, seed=0).select(make_view("experts", 3, scores[:500], ids))
    other_seed = HashRouter(2, seed=1).select(make_view("experts", 1, scores[:500], ids))
    for other in (other_site, other_seed):
        assert abs((by_id & other).sum().item() / 1000 - 0.25) < 0.08  # as much in common as by chance


def test_balanced_table_of_the_docstring():
    table = balanced_table(torch.tensor([0, 0, 0, 1, 1, 2]), num_experts=2, k=1)
    assert table.table.tolist() == [[True, False], [False, True], [False, True]]
    view = make_view("experts", 1, torch.zeros(4, 2), torch.tensor([[2, 0, 1, 3]]))
    assert table.select(view).tolist() == [[False, True], [True, False], [False, True], [True, False]]


def test_balanced_table_loads_experts_evenly():
    tokens = torch.multinomial(1 / torch.arange(1.0, 257), 20_000, replacement=True)
    subset = balanced_table(tokens, num_experts=8, k=2).table[tokens]
    load = subset.float().mean(0)
    assert (subset.sum(1) == 2).all()
    assert load.max() / load.mean() < 1.2


def test_random_k_chooses_k_experts_and_each_about_equally_often():
    scores = torch.tensor([[0.97, 0.01, 0.01, 0.01]]).log().repeat(2000, 1)
    subset = RandomK(2, seed=0).select(make_view("experts", 1, scores, torch.zeros(1, 2000, dtype=torch.int64)))
    assert (subset.sum(1) == 2).all()
    assert ((subset.float().mean(0) - 0.5).abs() < 0.05).all()


def test_random_subset_hits_its_rate_at_every_site():
    subset = RandomSubset(0.25, seed=0).select(head_view(torch.zeros(10, 200, dtype=torch.int64)))
    assert abs(subset.float().mean().item() - 0.25) < 0.02


@pytest.mark.parametrize(
    "make", [lambda s: RandomSubset(0.5, s), lambda s: RandomHeads(0.5, s)], ids=["subset", "heads"]
)
def test_random_choice_depends_on_seed_site_and_tokens_only(make):
    tokens = torch.arange(80).view(20, 4)
    view = head_view(tokens)
    first = make(1).select(view)
    state = torch.get_rng_state()
    torch.manual_seed(7)
    assert torch.equal(make(1).select(view), first)
    torch.set_rng_state(state)
    make(1).select(head_view(tokens + 1))
    assert torch.equal(torch.get_rng_state(), state)
    other_site = make_view("heads", 2, view.scores, tokens)
    for other in (make(2).select(view), make(1).select(head_view(tokens + 1)), make(1).select(other_site)):
        assert not torch.equal(other, first)


BAD = {
    "negative-k": (lambda: TopK(-1), "k must be at least 0, got -1"),
    "large-k": (lambda: TopK(5).select(expert_view(SCORES)), r"k must lie in \[0, num_experts=4\], got 5"),
    "large-random-k": (lambda: RandomK(5, 0).select(expert_view(SCORES)), r"k must lie in \[0, num_experts=4\], got 5"),
    "probability": (lambda: Threshold(1.5, False), r"probability must lie in \[0, 1\], got 1.5"),
    "sequence-k": (lambda: SequenceTopK(4.5).select(expert_view(SCORES)), r"num_experts=4\], got 4.5"),
    "ratio": (lambda: SecondRatio(1.1), r"ratio must lie in \[0, 1\], got 1.1"),
    "limit": (lambda: EntropyThreshold(-1.0), r"limit must lie in \[0, 1\], got -1.0"),
    "hash-k": (lambda: HashRouter(5, 0).select(expert_view(SCORES)), r"k must lie in \[0, num_experts=4\], got 5"),
    "table-k": (lambda: balanced_table(torch.zeros(1).long(), 2, 3), r"k must lie in \[0, num_experts=2\], got 3"),
    "mass": (lambda: TopP(0.0), r"mass must lie in \(0, 1\], got 0.0"),
    "rate": (lambda: RandomSubset(-0.1, 0), r"rate must lie in \[0, 1\], got -0.1"),
    "share": (lambda: RandomHeads(2.0), r"share must lie in \[0, 1\], got 2.0"),
    "seed": (lambda: RandomHeads(0.5, -1), "seed must be at least 0, got -1"),
    "keep": (lambda: prune_units({0: torch.ones(4)}, 5), r"keep must lie in \[0, units=4\], got 5"),
}


@pytest.mark.parametrize(("act", "message"), BAD.values(), ids=BAD.keys())
def test_impossible_settings_are_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()


class OneHeadOff:
    """Native routing without one head, written out."""

    def __init__(self, index, head):
        self.index, self.head = index, head

    def select(self, view):
        subset = NativeRouter().select(view)
        if view.index == self.index:
            subset[:, self.head] = False
        return subset


def test_head_importance_equals_brute_force(backbone, text):
    tokens, targets = text
    native = -token_log_likelihood(backbone.run(tokens, NativeRouter())[0], targets).mean()
    importance = head_importance(backbone, tokens, targets)
    assert list(importance) == [0, 2]
    for index, rises in importance.items():
        for head, rise in enumerate(rises):
            loss = -token_log_likelihood(backbone.run(tokens, OneHeadOff(index, head))[0], targets).mean()
            assert rise.item() == pytest.approx((loss - native).item(), abs=1e-6)
    assert torch.cat(list(importance.values())).abs().max() > 1e-4


def test_pruning_keeps_the_most_important_heads_over_all_layers():
    kept = prune_units({0: torch.tensor([0.3, 0.1, -0.2]), 2: torch.tensor([0.2, 0.4, 0.0])}, 3)
    assert {index: row.tolist() for index, row in kept.items()} == {0: [True, False, False], 2: [True, True, False]}


def test_pruned_heads_are_never_chosen_and_the_rest_is_the_routers_choice(backbone, text):
    kept = {0: torch.tensor([True, False, True, False])}
    router = RandomSubset(0.7, seed=0)
    _, pruned = backbone.run(text[0], UnitPruning(router, kept))
    view = backbone.observe(backbone.begin(text[0]))
    assert not pruned[0][:, [1, 3]].any()
    assert torch.equal(pruned[0][:, [0, 2]], router.select(view)[:, [0, 2]])
    assert pruned[2].float().mean() > 0.5


def test_without_scikit_learn_its_routers_are_left_out_aloud(backbone, text, monkeypatch, caplog):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name))
    with caplog.at_level("WARNING"):
        names = {point.name for point in fixed_routers(backbone, *text, seed=0)}
    assert "hash" in names and not names & {"kmeans", "gaussian"}
    assert "it needs: pip install -e '.[cluster]'" in caplog.text


def test_families_that_nobody_asks_for_cost_nothing(backbone, text, monkeypatch):
    for place in ("calibration.head_importance", "calibration.fit_unit_keys", "fitted_families.fit_clustering"):
        monkeypatch.setattr(f"policies.baselines.{place}", lambda *_, **__: pytest.fail("was computed"))
    names = {point.name for point in fixed_routers(backbone, *text, seed=0, wanted=("second", "hash"))}
    assert names == {"second-ratio", "hash"}


def test_what_several_families_need_is_measured_once(backbone, text, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "policies.baselines.calibration.head_importance",
        lambda *arguments: calls.append(1) or head_importance(*arguments),
    )
    fixed_routers(backbone, *text, seed=0, wanted=("top-k+", "allocation+", "expert-pruning+"))
    assert len(calls) == 1


def test_sweep_has_every_family_once_per_setting_and_all_routers_run(backbone, text):
    pytest.importorskip("sklearn")
    greedy = GreedySearch(backbone, *text, GreedyConfig(stop_compute=0.9)).run(progress=False)
    points = fixed_routers(backbone, *text, seed=0, greedy=greedy)
    assert {point.name for point in points} == {"native", *FIXED_NAMES}
    rows = {json.dumps([point.name, point.setting], sort_keys=True) for point in points}
    assert len(rows) == len(points) <= 150 + len(greedy)
    assert [point.router for point in points if point.name == "greedy"] == [step.router for step in greedy]
    for point in points:
        logits, subsets = backbone.run(text[0], point.router)
        assert logits.isfinite().all()
        if "heads_kept" in point.setting:
            units = [subset.any(0).sum().item() for subset in subsets[::2]]
            assert sum(units) == point.setting["heads_kept"]


def test_uniform_expert_and_soft_routing_are_in_the_sweep(backbone, text):
    """P = 1 / num_experts for every expert, and all experts weighted by the gate."""
    points = fixed_routers(backbone, *text, seed=0, wanted=("random-k", "top-k"))
    uniform = next(point.router for point in points if (point.name, point.setting.get("k")) == ("random-k", 1))
    scores = torch.tensor([[0.97, 0.01, 0.01, 0.01]]).log().repeat(4000, 1)
    subset = uniform.select(make_view("experts", 1, scores, torch.zeros(1, 4000, dtype=torch.int64)))
    assert ((subset.float().mean(0) - 0.25).abs() < 0.03).all()
    assert any(point.name == "top-k" and point.setting["k"] == CONFIG.num_experts for point in points)
