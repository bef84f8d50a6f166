"""Cluster routers assign as scikit-learn does, keep the experts of the largest mass, and count their own cost."""

import sys

import pytest
import torch

from moe_backbone import NativeRouter, RoutingSite, SiteView
from policies.baselines import clusters as clusters_module
from policies.baselines.clusters import Clustering, ClusterRouter, Clusters, fit_clustering

KINDS = ("kmeans", "gaussian")
NUM_CLUSTERS = 3


@pytest.fixture
def fit(tiny_backbone, tiny_tokens):
    pytest.importorskip("sklearn")

    def fitted(kind="kmeans", num_clusters=NUM_CLUSTERS, seed=0):
        return fit_clustering(tiny_backbone, tiny_tokens, kind=kind, num_clusters=num_clusters, seed=seed)

    return fitted


@pytest.fixture
def worked():
    """Two clusters of one feature around 0 and 4, at an expert site of index 1 with three experts."""
    means = Clusters.from_means(torch.tensor([[0.0], [4.0]]))
    return Clustering(clusters={1: means}, masses={1: torch.tensor([[0.5, 2.0, 1.0], [3.0, 0.0, 1.0]])})


def make_view(features, probabilities, kind="experts", index=1):
    scores = torch.tensor(probabilities).log()
    native = scores.shape[1] if kind == "heads" else 2
    site = RoutingSite(kind=kind, layer=0, num_units=scores.shape[1], native_units=native, unit_flops=1)
    tokens = torch.arange(len(scores)).unsqueeze(0)
    return SiteView(
        index=index,
        site=site,
        features=torch.tensor(features),
        scores=scores,
        price=torch.zeros(len(scores)),
        tokens=tokens,
    )


def native_views(backbone, tokens):
    """What native routing meets at every expert site, by index."""
    state, views = backbone.begin(tokens), {}
    for index, site in enumerate(backbone.sites):
        view = backbone.observe(state)
        if site.kind == "experts":
            views[index] = view
        state = backbone.advance(state, NativeRouter().select(view))
    return views


def blobs(num_tokens=200, hidden_size=6):
    """Features of overlapping clusters with unlike spread."""
    centres, spread = 2 * torch.randn(4, hidden_size), 0.3 + torch.rand(4, hidden_size)
    chosen = torch.randint(4, (num_tokens,))
    return centres[chosen] + spread[chosen] * torch.randn(num_tokens, hidden_size)


def test_nearest_mean_as_scikit_learn_predicts():
    """Also for tokens that the means were not fitted on."""
    cluster = pytest.importorskip("sklearn.cluster")
    model = cluster.KMeans(5, n_init=1, random_state=0).fit(blobs().double().numpy())
    features = blobs()
    assigned = Clusters.from_means(torch.as_tensor(model.cluster_centers_)).assign(features)
    assert assigned.tolist() == model.predict(features.double().numpy()).tolist()
    assert len(set(assigned.tolist())) > 1


def test_most_probable_gaussian_as_scikit_learn_predicts():
    """Weights and variances count, so the nearest mean is not always it."""
    mixture = pytest.importorskip("sklearn.mixture")
    model = mixture.GaussianMixture(5, covariance_type="diag", random_state=0).fit(blobs().double().numpy())
    features = blobs()
    weights, means, variances = map(torch.as_tensor, (model.weights_, model.means_, model.covariances_))
    assigned = Clusters.from_gaussians(weights, means, variances).assign(features)
    assert assigned.tolist() == model.predict(features.double().numpy()).tolist()
    assert not torch.equal(assigned, Clusters.from_means(means).assign(features))


@pytest.mark.parametrize(
    ("k", "expected"),
    [(0, ["...", "...", "..."]), (1, [".X.", "X..", ".X."]), (2, [".XX", "X.X", ".XX"]), (3, ["XXX", "XXX", "XXX"])],
    ids=["none", "one", "two", "all"],
)
def test_experts_of_largest_mass_worked_by_hand(worked, k, expected):
    """The first and last token share a cluster, so they share experts, whatever their gate scores."""
    view = make_view([[1.9], [2.1], [-9.0]], [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]])
    subset = ClusterRouter(worked, k).select(view)
    assert subset.dtype == torch.bool
    assert ["".join("X" if unit else "." for unit in row) for row in subset] == expected


def test_heads_stay_native(worked):
    """A head site has no clusters and keeps all heads."""
    view = make_view([[0.0], [4.0]], [[1.0] * 4] * 2, kind="heads", index=0)
    assert ClusterRouter(worked, 1).select(view).all()


@pytest.mark.parametrize("k", [-1, 4], ids=["negative", "more than the site"])
def test_impossible_count_is_refused(worked, k):
    """When it is made, before any text is routed."""
    with pytest.raises(ValueError, match=rf"k must lie in \[0, num_experts=3\], got {k}"):
        ClusterRouter(worked, k)


@pytest.mark.parametrize("kind", KINDS)
def test_masses_sum_the_native_gate_over_each_cluster(fit, tiny_backbone, tiny_tokens, kind):
    """Every expert site has its own clusters, of its own features under native routing."""
    clustering = fit(kind)
    views = native_views(tiny_backbone, tiny_tokens)
    assert set(clustering.clusters) == set(clustering.masses) == set(views) == {1, 3}
    for index, view in views.items():
        assigned = clustering.clusters[index].assign(view.features)
        expected = [view.scores.exp()[assigned == cluster].sum(0) for cluster in range(NUM_CLUSTERS)]
        torch.testing.assert_close(clustering.masses[index], torch.stack(expected))
        assert len(assigned.unique()) > 1


def test_means_are_those_of_the_members(fit, tiny_backbone, tiny_tokens):
    """k-means has converged on text this short: each cluster's column is the mean of its own tokens."""
    clustering = fit()
    for index, view in native_views(tiny_backbone, tiny_tokens).items():
        assigned = clustering.clusters[index].assign(view.features)
        means = [view.features[assigned == cluster].mean(0) for cluster in range(NUM_CLUSTERS)]
        torch.testing.assert_close(clustering.clusters[index].linear.T, torch.stack(means), atol=1e-4, rtol=1e-4)


def test_longer_text_is_sampled_for_the_fit_but_counted_whole(fit, tiny_backbone, tiny_tokens, monkeypatch):
    """With as many clusters as fitted tokens, each mean is one of them; the masses still hold every token."""
    monkeypatch.setattr(clusters_module, "FIT_TOKENS", NUM_CLUSTERS)
    clustering = fit()
    for index, view in native_views(tiny_backbone, tiny_tokens).items():
        distances = torch.cdist(clustering.clusters[index].linear.T, view.features)
        assert distances.amin(1).tolist() == pytest.approx([0.0] * NUM_CLUSTERS, abs=1e-2)
        assert clustering.masses[index].sum().item() == pytest.approx(tiny_tokens.numel(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_router(fit, tiny_backbone, tiny_tokens, kind):
    """Two fits choose the same units at every site, `k` experts for every token."""
    one, other = (tiny_backbone.run(tiny_tokens, ClusterRouter(fit(kind), 1))[1] for _ in range(2))
    assert all(map(torch.equal, one, other))
    assert all((subset.sum(1) == 1).all() for subset in one[1::2])


@pytest.mark.parametrize(("kind", "per_input"), [("kmeans", 2), ("gaussian", 4)], ids=KINDS)
def test_overhead_counts_the_products_of_all_expert_sites(fit, tiny_config, kind, per_input):
    """One product for k-means, two for the mixture; `k` costs nothing."""
    expected = tiny_config.num_layers * per_input * tiny_config.hidden_size * NUM_CLUSTERS
    clustering = fit(kind)
    assert [ClusterRouter(clustering, k).overhead_flops for k in (0, 4)] == [expected, expected]


REFUSED = {
    "kind": ({"kind": "spectral"}, "kind must be one of kmeans, gaussian, got spectral"),
    "no clusters": ({"num_clusters": 0}, r"num_clusters must lie in \[1, fitted tokens=48\], got 0"),
    "too many clusters": ({"num_clusters": 49}, r"num_clusters must lie in \[1, fitted tokens=48\], got 49"),
    "seed": ({"seed": -1}, "seed must be at least 0, got -1"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_impossible_settings_are_refused(fit, settings, message):
    """Name, rule and actual value."""
    with pytest.raises(ValueError, match=message):
        fit(**settings)


def test_missing_scikit_learn_says_what_to_install(tiny_backbone, tiny_tokens, monkeypatch):
    """Only the fit needs it."""
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    message = r"clustering must have scikit-learn installed \(pip install -e '\.\[cluster\]'\), got none"
    with pytest.raises(ValueError, match=message):
        fit_clustering(tiny_backbone, tiny_tokens, kind="kmeans", num_clusters=2, seed=0)
