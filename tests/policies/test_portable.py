"""A learned router as two safe files: the same router again, or one clear line; and one router in all its forms."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from envs import EnvConfig, FixedSource, RoutingVecEnv
from moe_backbone import BackboneConfig, ComputeMeter, MoETransformer, Router
from policies.linear_router import IGNORED_LOGIT, LinearRouter, RouterSpec
from policies.portable import DESCRIPTION, WEIGHTS, load_router, save_router
from policies.router_policy import RouterPolicy
from policies.routing_ppo import RoutingPPO

CONFIG = BackboneConfig(
    vocab_size=32, hidden_size=32, num_layers=2, num_heads=2, num_experts=4, top_k=2, intermediate_size=16, seq_len=8
)
"""Head sites are narrower than expert sites."""
UNITS = (2, 4, 2, 4)
COPIES = 2
PRICES = (0.02, 2.0)
MOST_OVERHEAD = 0.03
"""Of native compute that the router may cost at the default sizes."""


@pytest.fixture
def backbone(seed: int) -> MoETransformer:
    """Seeded random weights, frozen."""
    return MoETransformer(CONFIG).requires_grad_(False).eval()


@pytest.fixture
def router(backbone: MoETransformer) -> LinearRouter:
    """Random weights, so that every part of the logit counts."""
    return _shaken(LinearRouter(_spec(backbone)))


@pytest.fixture
def saved(router: LinearRouter, backbone: MoETransformer, tmp_path: Path) -> Path:
    """Folder that holds the router's two files."""
    folder = tmp_path / "router"
    save_router(router, folder, backbone)
    return folder


def _spec(backbone: MoETransformer) -> RouterSpec:
    return RouterSpec(hidden_size=32, sites=backbone.sites, price_low=PRICES[0], price_high=PRICES[1])


def _shaken(router: LinearRouter) -> LinearRouter:
    generator = torch.Generator().manual_seed(1)
    for weight in router.parameters():
        weight.data.normal_(std=0.3, generator=generator)
    return router


def _episode(backbone: MoETransformer) -> tuple[RoutingVecEnv, RoutingPPO]:
    tokens = torch.randint(32, (3, CONFIG.seq_len))
    config = EnvConfig(rollouts_per_sequence=COPIES, price_low=PRICES[0], price_high=PRICES[1])
    lanes = 3 * COPIES * CONFIG.seq_len
    env = RoutingVecEnv(lanes, backbone, FixedSource(tokens, tokens), config)
    model = RoutingPPO(
        "RouterPolicy", env, batch_size=lanes, policy_kwargs={"router_spec": _spec(backbone).to_json(), "critic": False}
    )
    assert isinstance(model.policy, RouterPolicy)
    _shaken(model.policy.router)
    return env, model


# Files


def test_round_trip(saved: Path, router: LinearRouter, backbone: MoETransformer) -> None:
    """Two files, the same spec and weights, the same choices; frozen."""
    assert {path.name for path in saved.iterdir()} == {WEIGHTS, DESCRIPTION}
    loaded = load_router(saved, backbone)
    assert loaded.spec == router.spec
    for name, weight in router.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)
    assert not any(weight.requires_grad for weight in loaded.parameters())
    tokens, price = torch.randint(32, (3, CONFIG.seq_len)), torch.full((24,), 0.3)
    _, subsets = backbone.run(tokens, router, price)
    _, again = backbone.run(tokens, loaded, price)
    assert all(torch.equal(one, other) for one, other in zip(subsets, again, strict=True))
    assert isinstance(loaded, Router)


def test_files_hold_numbers_and_text_only(
    saved: Path, backbone: MoETransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading them never unpickles anything."""

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a portable router must not be unpickled")

    for module in (pickle, torch):
        monkeypatch.setattr(module, "load", forbidden)
    monkeypatch.setattr(pickle, "loads", forbidden)
    load_router(saved, backbone)


class _Payload:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", [WEIGHTS, DESCRIPTION])
def test_a_pickle_in_disguise_is_refused_and_not_run(
    saved: Path, backbone: MoETransformer, tmp_path: Path, name: str
) -> None:
    """Neither as weights nor as description."""
    (saved / name).write_bytes(pickle.dumps(_Payload(tmp_path / "ran")))
    with pytest.raises(ValueError, match="router folder must hold readable"):
        load_router(saved, backbone)
    assert not (tmp_path / "ran").exists()


def _refused(folder: Path, backbone: MoETransformer) -> str:
    """The message, which is one line."""
    with pytest.raises(ValueError) as caught:
        load_router(folder, backbone)
    message = str(caught.value)
    assert "\n" not in message
    return message


def _rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    description = json.loads((folder / DESCRIPTION).read_text())
    change(description)
    (folder / DESCRIPTION).write_text(json.dumps(description))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no description": (lambda folder: (folder / DESCRIPTION).unlink(), "must hold readable"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "must hold readable"),
    "half the weights": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100]),
        "must hold readable",
    ),
    "empty weights": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "must hold readable"),
    "half the description": (
        lambda folder: (folder / DESCRIPTION).write_text((folder / DESCRIPTION).read_text()[:60]),
        "must hold readable",
    ),
    "a list": (lambda folder: (folder / DESCRIPTION).write_text("[1, 2]"), "must hold readable"),
    "binary description": (lambda folder: (folder / DESCRIPTION).write_bytes(b"\xff\xfe\x00"), "must hold readable"),
    "other format": (
        lambda folder: _rewrite(folder, lambda text: text.update(format=3)),
        "router format must lie in [1, 2], got 3",
    ),
    "no format": (lambda folder: _rewrite(folder, lambda text: text.pop("format")), "must hold readable"),
    "no hash": (lambda folder: _rewrite(folder, lambda text: text.pop("backbone_sha256")), "must hold readable"),
    "a number for a hash": (
        lambda folder: _rewrite(folder, lambda text: text.update(backbone_sha256=7)),
        "must be made for this backbone",
    ),
    "unknown setting": (
        lambda folder: _rewrite(folder, lambda text: text["router"].update(colour="red")),
        "must hold readable",
    ),
    "other width": (
        lambda folder: _rewrite(folder, lambda text: text["router"].update(hidden_size=64)),
        "must fit the backbone's hidden_size=32, got 64",
    ),
    "fewer sites": (
        lambda folder: _rewrite(folder, lambda text: text["router"]["sites"].pop()),
        "must fit the backbone's 4 sites",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused_in_one_line(saved: Path, backbone: MoETransformer, damage: str) -> None:
    """Whatever is missing, cut off or of another kind, the message says what should be there."""
    spoil, message = DAMAGE[damage]
    spoil(saved)
    assert message in _refused(saved, backbone)


def test_weights_that_do_not_fit_are_refused_in_one_line(saved: Path, backbone: MoETransformer) -> None:
    """Of another shape, under another name, one too few, or not numbers."""
    weights = load_file(saved / WEIGHTS)
    for wrong in (
        {name: weight[:, :-1].contiguous() for name, weight in weights.items()},
        {f"other.{name}": weight for name, weight in weights.items()},
        {"weight": weights["weight"]},
    ):
        save_file(wrong, saved / WEIGHTS)
        assert "router weights must fit router.json" in _refused(saved, backbone)
    save_file({**weights, "weight": weights["weight"] * torch.nan}, saved / WEIGHTS)
    assert "router weights must be finite" in _refused(saved, backbone)


def test_another_backbone_is_refused(saved: Path, backbone: MoETransformer) -> None:
    """Other weights in the same sizes, other sizes, and a missing folder each by what is wrong."""
    other = MoETransformer(CONFIG).requires_grad_(False)
    message = _refused(saved, other)
    assert other.sha256()[:12] in message
    assert backbone.sha256()[:12] in message
    wider = MoETransformer(replace(CONFIG, num_experts=8)).requires_grad_(False)
    assert "must fit the backbone's 4 sites of [2, 8] units" in _refused(saved, wider)
    assert "must hold readable" in _refused(saved / "elsewhere", backbone)


def test_a_failed_save_leaves_the_old_router(
    saved: Path, router: LinearRouter, backbone: MoETransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing half-written and no scratch file, if the disk is full."""

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    monkeypatch.setattr("os.fsync", full)
    router.weight.data.add_(1.0)
    with pytest.raises(OSError, match="No space left"):
        save_router(router, saved, backbone)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


# One router, several forms


def test_logits_agree_in_every_form(backbone: MoETransformer) -> None:
    """Whole episodes in one product, one site alone, and lanes at mixed sites in any order: the same logits."""
    env, model = _episode(backbone)
    policy = model.policy
    assert isinstance(policy, RouterPolicy)
    observations = [env.reset_tensor()]
    for _ in range(len(UNITS) - 1):
        observations.append(env.step_tensor(torch.rand(env.num_envs, 4) < 0.5).observation)
    stacked = torch.stack(observations)
    with torch.no_grad():
        whole = policy.router.site_logits(*policy.episode_inputs(stacked))
        for index in range(len(UNITS)):
            torch.testing.assert_close(policy.step_logits(observations[index], index), whole[index])
        order = torch.randperm(stacked[..., 0].numel())
        mixed = policy.logits(stacked.flatten(0, 1)[order])
    torch.testing.assert_close(mixed, whole.flatten(0, 1)[order])
    for index, units in enumerate(UNITS):
        assert (whole[index, :, units:] == IGNORED_LOGIT).all()
        assert (whole[index, :, :units].abs() < 100).all()


def test_deterministic_action_of_the_policy_is_the_routers_choice(backbone: MoETransformer) -> None:
    """What SB3 predicts in the environment is what the router selects when the model runs on its own."""
    env, model = _episode(backbone)
    observation = env.reset()
    batch = env.mdp.batch
    actions = []
    for _ in UNITS:
        actions.append(model.predict(observation, deterministic=True)[0].astype(bool))
        observation, *_ = env.step(actions[-1])
    assert isinstance(model.policy, RouterPolicy)
    prices = batch.price.repeat_interleave(CONFIG.seq_len)
    _, subsets = backbone.run(batch.tokens, model.policy.router, prices)
    for action, subset, units in zip(actions, subsets, UNITS, strict=True):
        np.testing.assert_array_equal(action[:, :units], subset.numpy())
        assert not action[:, units:].any()
        assert 0 < subset.float().mean() < 1


def test_price_folded_into_the_weights_changes_no_choice(backbone: MoETransformer) -> None:
    """A router at one price selects what it selects when every token shows that price, and dearer means fewer units."""
    env, model = _episode(backbone)
    env.reset()
    assert isinstance(model.policy, RouterPolicy)
    router, tokens = model.policy.router, env.mdp.batch.tokens
    used = []
    for price in (0.05, 0.4, 2.0):
        _, shown = backbone.run(tokens, router, torch.full((tokens.numel(),), price))
        _, folded = backbone.run(tokens, router.at_price(price))
        for first, second in zip(shown, folded, strict=True):
            assert torch.equal(first, second)
        used.append(sum(subset.sum().item() for subset in folded))
    assert len(set(used)) > 1


@pytest.mark.parametrize("price", [0.0, -1.0, float("nan"), float("inf")])
def test_router_refuses_a_price_that_is_none(router: LinearRouter, price: float) -> None:
    """Name, rule and actual value."""
    with pytest.raises(ValueError, match=f"price must be positive and finite, got {price}"):
        router.at_price(price)


def test_logit_by_hand() -> None:
    """Prior, weight and price weight, each with its own number, at the dearest price of the range."""
    spec = RouterSpec(
        hidden_size=2,
        sites=MoETransformer(replace(CONFIG, num_heads=1, num_experts=2, num_layers=1)).sites,
        price_low=0.1,
        price_high=10.0,
        head_prior=3.0,
        expert_slope=2.0,
        expert_threshold=0.5,
        expert_clamp=1.0,
    )
    router = LinearRouter(spec).requires_grad_(False)
    router.weight[1, :, 0] = torch.tensor([1.0, 10.0, 100.0, 0.0, 1000.0])  # features, scores, constant
    router.price_weight[1, 4, 0] = 0.5
    features, scores = torch.tensor([[0.3, 0.2]]), torch.tensor([[0.25, 0.75]]).log()
    inputs, prior = router.inputs(features, scores), router.site_prior(1, scores)
    logits = router.one_site_logits(1, inputs, prior, torch.tensor([[10.0]]).log())
    prior = (-1.0, 2 * np.log(1.5))  # 2 log(.25 / .5) clamped at -1, and 2 log(.75 / .5)
    first = prior[0] + 0.3 + 2.0 + 100 * np.log(0.25) + 1000 + 0.5
    torch.testing.assert_close(logits, torch.tensor([[first, prior[1]]], dtype=torch.float32))
    heads = router.one_site_logits(0, inputs, router.site_prior(0, scores), torch.zeros(1, 1))
    assert heads.tolist() == [[3.0, IGNORED_LOGIT]]


def test_overhead_by_hand(router: LinearRouter) -> None:
    """One product of 32 features, 4 scores and a constant with every unit of every site, price folded in."""
    assert router.at_price(0.3).overhead_flops == 2 * (32 + 4 + 1) * (2 + 4 + 2 + 4)
    assert router.overhead_flops == 2 * router.at_price(0.3).overhead_flops


def test_router_costs_little_at_the_default_sizes() -> None:
    """At most three per cent of native compute."""
    config = BackboneConfig()
    sites = MoETransformer(config).sites
    overhead = LinearRouter(RouterSpec(hidden_size=config.hidden_size, sites=sites)).at_price(0.3).overhead_flops
    assert 0 < overhead / ComputeMeter(sites, config.seq_len).native_flops <= MOST_OVERHEAD


def test_policy_needs_bits_and_a_spec(backbone: MoETransformer) -> None:
    """A count is no subset, and without the sites there is nothing to build."""
    tokens = torch.zeros(1, CONFIG.seq_len, dtype=torch.int64)
    rules = EnvConfig(rollouts_per_sequence=2)
    env = RoutingVecEnv(16, backbone, FixedSource(tokens, tokens), replace(rules, action="count"))
    with pytest.raises(ValueError, match="action space must be MultiBinary"):
        RoutingPPO("RouterPolicy", env, batch_size=16, policy_kwargs={"router_spec": _spec(backbone).to_json()})
    env = RoutingVecEnv(16, backbone, FixedSource(tokens, tokens), rules)
    with pytest.raises(ValueError, match="router_spec must be"):
        RoutingPPO("RouterPolicy", env, batch_size=16)
