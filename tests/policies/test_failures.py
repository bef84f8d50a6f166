"""The ways in which reinforcement learning for routing is known to fail, each with a check that sees it.

Every check is a function; beside the test that it passes stands one that plants the bug and shows that it does not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import CallbackList
from torch import Tensor

from envs import EnvConfig, FixedSource, RoutingMDP, RoutingVecEnv, TokenSource
from envs import mdp as mdp_module
from envs.planted import PLANTED_CONFIG, PLANTED_RULES, VOCAB, PlantedSource, planted_backbone
from moe_backbone import MoETransformer
from policies import routing_ppo
from policies.bits import bits_entropy, bits_log_prob, bits_terms
from policies.linear_router import LinearRouter, RouterSpec
from policies.router_policy import RouterPolicy
from policies.routing_ppo import Episode, RoutingPPO, leave_one_out

SEQ_LEN, COPIES, NUM_SEQUENCES = 8, 4, 4
NUM_SITES, UNITS = 2, (2, 4)
MANY_COPIES = 3000
"""Rollouts of one sequence: enough for the sampled gradient to lie within a few per cent of the exact one."""
SAMPLING_SIGMAS = 4.5
"""Standard deviations that a frequency may lie from its probability; the seed is fixed, so this never flickers."""
REWARD_RULES = {
    "base": PLANTED_RULES,
    "dearer": replace(PLANTED_RULES, price_low=2.0, price_high=2.0),
    "kl": replace(PLANTED_RULES, quality="kl"),
    "accuracy": replace(PLANTED_RULES, quality="accuracy"),
}


def _model(
    rules: EnvConfig = PLANTED_RULES,
    *,
    source: TokenSource | None = None,
    num_sequences: int = NUM_SEQUENCES,
    seed: int = 0,
    price_range: tuple[float, float] | None = None,
    backbone: MoETransformer | None = None,
    **settings: Any,
) -> RoutingPPO:
    """One minibatch an epoch and one epoch an update, unless told otherwise."""
    low, high = price_range or (rules.price_low, rules.price_high)
    backbone = backbone or planted_backbone()
    lanes = num_sequences * rules.rollouts_per_sequence * SEQ_LEN
    env = RoutingVecEnv(lanes, backbone, source or PlantedSource(), rules, seed=seed)
    spec = RouterSpec(hidden_size=32, sites=backbone.sites, price_low=low, price_high=high)
    settings = {"batch_size": NUM_SITES * lanes, "n_epochs": 1, "learning_rate": 0.01} | settings
    return RoutingPPO(
        "RouterPolicy", env, seed=seed, policy_kwargs={"router_spec": spec.to_json(), "critic": False}, **settings
    )


def _collect(model: RoutingPPO) -> Episode:
    """One episode of every lane."""
    _, callback = model._setup_learn(1, CallbackList([]))
    assert model.env is not None
    model.collect_rollouts(model.env, callback, model.rollout_buffer, NUM_SITES)
    return model._episode


def _router(model: RoutingPPO) -> LinearRouter:
    assert isinstance(model.policy, RouterPolicy)
    return model.policy.router


def _logits(model: RoutingPPO, episode: Episode) -> Tensor:
    return _router(model).site_logits(episode.inputs, episode.priors, episode.log_price)


def _observations(model: RoutingPPO) -> Tensor:
    """Before each site, when all units run (num_sites, num_lanes, size)."""
    assert isinstance(model.env, RoutingVecEnv)
    observations = [model.env.reset_tensor()]
    everything = torch.ones(model.env.num_envs, max(UNITS), dtype=torch.bool)
    for _ in range(NUM_SITES - 1):
        observations.append(model.env.step_tensor(everything).observation)
    return torch.stack(observations)


def _observed_logits(model: RoutingPPO, observations: Tensor) -> Tensor:
    assert isinstance(model.policy, RouterPolicy)
    return _router(model).site_logits(*model.policy.episode_inputs(observations)).detach()


def _weights(model: RoutingPPO) -> Tensor:
    return torch.cat([weight.detach().flatten().clone() for weight in _router(model).parameters()])


def _one_update(model: RoutingPPO) -> dict[str, float]:
    """Collect and learn once; what was logged."""
    _collect(model)
    model.train()
    return dict(model.logger.name_to_value)


def _detached(self: LinearRouter, *args: Tensor) -> Tensor:
    """The bug of a reference pass that overwrote the saved logits: right values, no way back to the weights."""
    return SITE_LOGITS(self, *args).detach() + 0 * self.weight.sum()


SITE_LOGITS = LinearRouter.site_logits


# The policy gradient reaches the weights


def check_gradient_reaches_the_weights() -> None:
    """One update leaves a gradient on the weights of both sites and changes the action distribution everywhere."""
    model = _model()
    _one_update(model)
    before = _logits(_model(), model._episode).sigmoid()
    gradient = _router(model).weight.grad
    assert gradient is not None
    for index, units in enumerate(UNITS):
        assert gradient[index, :, :units].abs().max() > 1e-4
        change = (_logits(model, model._episode).sigmoid() - before)[index, :, :units].detach()
        assert change.abs().max() > 1e-4


def test_gradient_reaches_the_weights() -> None:
    """Non-zero on every site, and one step moves the probabilities."""
    check_gradient_reaches_the_weights()


def test_a_gradient_that_never_reaches_the_weights_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: logits without a graph."""
    monkeypatch.setattr(LinearRouter, "site_logits", _detached)
    with pytest.raises(AssertionError):
        check_gradient_reaches_the_weights()


# Results respond to reward type and coefficient


def check_results_respond_to_the_reward() -> None:
    """Same seed, other reward: other weights, for every pair of rewards, after a single update."""
    results = {}
    for name, rules in REWARD_RULES.items():
        model = _model(rules)
        _one_update(model)
        results[name] = _weights(model)
    for one, other in itertools.combinations(results, 2):
        assert (results[one] - results[other]).abs().max() > 1e-4, (one, other)


def test_results_respond_to_reward_type_and_price() -> None:
    """Price, KL, log-likelihood and accuracy each teach something else."""
    check_results_respond_to_the_reward()


@pytest.mark.parametrize("bug", ["price ignored", "kind ignored", "no reward"])
def test_results_that_ignore_the_reward_are_seen(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: costs without their price, quality without its type, and neither of the two."""
    quality, unit_price = mdp_module.quality, RoutingMDP.unit_price.fget
    assert unit_price is not None
    if bug == "price ignored":
        monkeypatch.setattr(RoutingMDP, "unit_price", property(lambda mdp: unit_price(mdp) / mdp.state.price))
    if bug == "kind ignored":
        monkeypatch.setattr(mdp_module, "quality", lambda kind, *tensors: quality("kl", *tensors))
    if bug == "no reward":
        monkeypatch.setattr(mdp_module, "quality", lambda *args: 0 * quality(*args))
        monkeypatch.setattr(RoutingMDP, "unit_price", property(lambda mdp: 0 * unit_price(mdp)))
    with pytest.raises(AssertionError):
        check_results_respond_to_the_reward()


def check_results_respond_to_the_entropy_bonus() -> None:
    """With a bonus the entropy after updates is higher than without."""
    entropies = []
    for weight in (0.0, 1.0):
        model = _model(ent_coef=weight)
        for _ in range(5):
            _one_update(model)
        entropies.append(bits_entropy(_logits(model, model._episode)).mean().item())
    assert entropies[1] > entropies[0] + 0.01


def test_results_respond_to_the_entropy_bonus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bonus keeps actions random; planted, an entropy without a graph is seen."""
    check_results_respond_to_the_entropy_bonus()

    def detached(logits: Tensor, bits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_prob, entropy, count = bits_terms(logits, bits)
        return log_prob, entropy.detach(), count

    monkeypatch.setattr(routing_ppo, "bits_terms", detached)
    with pytest.raises(AssertionError):
        check_results_respond_to_the_entropy_bonus()


# A loss near zero is no symptom, a missing gradient norm is


def check_gradient_norm_is_logged_and_not_zero() -> None:
    """Centred advantages at ratio 1 make the loss zero by construction, up to the cost, which is next to nothing here.

    The gradient is not zero, and the log says so.
    """
    logged = _one_update(_model(replace(PLANTED_RULES, price_low=1e-6, price_high=1e-6)))
    assert abs(logged["train/loss"]) < 1e-5
    assert logged.get("train/gradient_norm", 0.0) > 1e-3
    assert logged["train/advantage_std"] > 1e-3
    assert logged["train/entropy"] > 0


def test_loss_near_zero_has_a_gradient() -> None:
    """The number to watch is the gradient's norm."""
    check_gradient_norm_is_logged_and_not_zero()


@pytest.mark.parametrize("bug", ["no graph", "not logged"])
def test_a_gradient_norm_of_zero_or_never_logged_is_seen(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: logits without a graph, whose loss is just as close to zero; and a metric that is logged zero times."""
    if bug == "no graph":
        monkeypatch.setattr(LinearRouter, "site_logits", _detached)
    else:
        log_update = RoutingPPO._log_update

        def forgetful(self: RoutingPPO, *args: Tensor) -> None:
            log_update(self, *args)
            del self.logger.name_to_value["train/gradient_norm"]

        monkeypatch.setattr(RoutingPPO, "_log_update", forgetful)
    with pytest.raises(AssertionError):
        check_gradient_norm_is_logged_and_not_zero()


# The gradient does not shrink with depth


def check_gradient_scale_by_depth() -> None:
    """The loss is the mean over (site, lane) transitions, and nothing else divides by the number of sites.

    Deeper episodes that repeat the same transitions pull a parameter shared by all sites exactly as hard. Deeper
    episodes whose other sites have no advantage leave a site the gradient of a shallow one over the number of sites.
    """
    model = _model(normalize_advantage=False)
    expert_site, spec = Episode(*(part[1:] for part in _collect(model))), _router(model).spec
    shared, own = [], []
    for depth in (1, 2, 8):
        router = model.policy.router = LinearRouter(replace(spec, sites=spec.sites[1:] * depth))
        episode = Episode(*(part.expand(depth, *part.shape[1:]) for part in expert_site))
        (gradient,) = torch.autograd.grad(model._loss(episode)[0], router.weight)
        shared.append(gradient.sum(0))
        first = torch.arange(depth).eq(0).unsqueeze(1)
        rewards = {name: getattr(episode, name) * first for name in ("advantages", "unit_price")}
        (gradient,) = torch.autograd.grad(model._loss(episode._replace(**rewards))[0], router.weight)
        own.append(depth * gradient[0])
    for gradients in (shared, own):
        assert gradients[0].abs().max() > 1e-3
        for gradient in gradients[1:]:
            torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-6)


def test_gradient_scale_follows_the_stated_rule() -> None:
    """One, two and eight sites."""
    check_gradient_scale_by_depth()


@pytest.mark.parametrize("power", [1.0, -1.0], ids=["divided twice", "summed"])
def test_a_gradient_that_shrinks_or_grows_with_depth_is_seen(power: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: one more division by the number of sites, and a sum in place of the mean."""
    loss = RoutingPPO._loss

    def scaled(self: RoutingPPO, lanes: Episode) -> Any:
        value, numbers = loss(self, lanes)
        return value / len(lanes.actions) ** power, numbers

    monkeypatch.setattr(RoutingPPO, "_loss", scaled)
    with pytest.raises(AssertionError):
        check_gradient_scale_by_depth()


# Actions are samples, and their log-probability is that of the sample


def check_actions_are_samples() -> None:
    """Each unit of each site is on as often as its probability says, and absent units never are."""
    model = _model(num_sequences=32)
    _router(model).weight.data.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    episode = _collect(model)
    with torch.no_grad():
        probability = _logits(model, episode).sigmoid()
    surplus = (episode.actions.float() - probability).sum(1)
    deviation = (probability * (1 - probability)).sum(1).sqrt()
    assert (surplus.abs() <= SAMPLING_SIGMAS * deviation + 1e-6).all()
    for index, units in enumerate(UNITS):
        assert not episode.actions[index, :, units:].any()


def test_sampled_actions_are_samples() -> None:
    """Frequencies match the probabilities."""
    check_actions_are_samples()


def test_an_argmax_taken_for_a_sample_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: every unit with a probability above one half, always."""
    monkeypatch.setattr(torch, "rand_like", lambda logits: torch.full_like(logits, 0.5))
    with pytest.raises(AssertionError):
        check_actions_are_samples()


def test_sb3s_face_samples_too() -> None:
    """`forward` draws from the same probabilities unless asked for the deterministic action."""
    model = _model(num_sequences=32)
    observations = _observations(model)
    logits = _observed_logits(model, observations)[1]
    probability = logits.sigmoid()
    sampled, _, log_prob = model.policy.forward(observations[1])
    surplus, deviation = (sampled - probability).sum(0), (probability * (1 - probability)).sum(0).sqrt()
    assert (surplus.abs() <= SAMPLING_SIGMAS * deviation + 1e-6).all()
    torch.testing.assert_close(log_prob, bits_log_prob(logits, sampled.bool()))
    best, *_ = model.policy.forward(observations[1], deterministic=True)
    assert torch.equal(best.bool(), probability > 0.5)


def check_log_probabilities() -> None:
    """What the rollout stored is the Bernoulli formula for the action that was sampled, and so is SB3's face."""
    model = _model()
    episode = _collect(model)
    bernoulli = torch.distributions.Bernoulli(logits=_logits(model, episode).detach())
    torch.testing.assert_close(episode.log_probs, bernoulli.log_prob(episode.actions.float()).sum(-1))
    torch.testing.assert_close(bits_entropy(bernoulli.logits), bernoulli.entropy().sum(-1))
    observations = _observations(model)
    logits = _observed_logits(model, observations)
    for site in range(NUM_SITES):
        actions = episode.actions[site]
        _, log_prob, entropy = model.policy.evaluate_actions(observations[site], actions.float())
        torch.testing.assert_close(log_prob, routing_ppo.bits_log_prob(logits[site], actions))
        assert entropy is not None
        torch.testing.assert_close(entropy, bits_entropy(logits[site]))


def test_log_probability_is_that_of_the_sampled_action(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to `torch.distributions`; planted, the formula for the opposite bits is seen."""
    check_log_probabilities()
    monkeypatch.setattr(routing_ppo, "bits_log_prob", lambda logits, bits: bits_log_prob(logits, ~bits))
    with pytest.raises(AssertionError):
        check_log_probabilities()


def test_bits_by_hand() -> None:
    """Probability 3/4 for a unit that is on and 1/2 for one that is off; a far logit stays finite."""
    logits = torch.tensor([[3.0, 1.0]]).log()
    torch.testing.assert_close(bits_log_prob(logits, torch.tensor([[True, False]])).exp(), torch.tensor([0.375]))
    assert bits_log_prob(torch.tensor([[-1e4]]), torch.tensor([[False]])).item() == 0.0
    assert bits_entropy(torch.tensor([[-1e4, 1e4]])).item() == 0.0


# The sampled gradient is the gradient


def _joint_backbone() -> MoETransformer:
    """Random weights with strong heads: what the experts are worth, and what they see, depends on the heads."""
    backbone = MoETransformer(PLANTED_CONFIG).requires_grad_(False).eval()
    backbone.attentions[0].output.mul_(3.0)
    return backbone


def _subsets(units: int, lanes: int) -> list[Tensor]:
    """All subsets of a site, the same for all lanes: bool (lanes, max_units) each."""
    rows = [bits + (False,) * (max(UNITS) - units) for bits in itertools.product((False, True), repeat=units)]
    return [torch.tensor(row).expand(lanes, -1) for row in rows]


def _exact_gradient(model: RoutingPPO, mdp: RoutingMDP) -> Tensor:
    """Of the mean return over the tokens of the one sequence, by trying all 64 joint subsets of the one layer."""
    assert isinstance(model.policy, RouterPolicy)
    batch = mdp.draw(np.random.default_rng(0))
    expected = torch.zeros(())
    for heads, experts in itertools.product(*(_subsets(units, SEQ_LEN) for units in UNITS)):
        observation, log_prob, total = mdp.begin(batch), torch.zeros(SEQ_LEN), torch.zeros(SEQ_LEN)
        for index, action in enumerate((heads, experts)):
            log_prob = log_prob + bits_log_prob(model.policy.step_logits(observation, index), action)
            step = mdp.step(action)
            observation, total = step.observation, total + step.reward
        expected = expected + (log_prob.exp() * total).mean()
    gradients = torch.autograd.grad(expected, list(_router(model).parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def check_sampled_gradient_is_exact() -> None:
    """From rollout to loss: direction and length of the gradient of the expected return, over the number of sites."""
    tokens = torch.arange(SEQ_LEN).unsqueeze(0) % VOCAB
    backbone, source = _joint_backbone(), FixedSource(tokens, (tokens + 3) % VOCAB)
    rules = replace(PLANTED_RULES, rollouts_per_sequence=MANY_COPIES, price_low=0.2, price_high=0.2)
    settings: dict[str, Any] = {"backbone": backbone, "source": source, "num_sequences": 1, "price_range": (0.05, 0.5)}
    model = _model(rules, normalize_advantage=False, price_balance=0.0, **settings)
    for weight in _router(model).parameters():
        weight.data.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad(model._loss(_collect(model))[0], list(_router(model).parameters()))
    sampled = -NUM_SITES * torch.cat([gradient.flatten() for gradient in gradients])
    exact = _exact_gradient(model, RoutingMDP(backbone, source, replace(rules, rollouts_per_sequence=1)))
    assert torch.cosine_similarity(sampled, exact, dim=0) > 0.99
    assert abs(sampled.norm() / exact.norm() - 1) < 0.05


def test_sampled_gradient_is_the_exact_gradient() -> None:
    """Against enumeration, where the choice of heads changes what the choice of experts is worth."""
    check_sampled_gradient_is_exact()


def _only_own_reward(rewards: Tensor, copies: int, seq_len: int) -> Tensor:
    """Credit without what comes after: the heads are never told what their choice was worth at the end."""
    return torch.cat([leave_one_out(row.unsqueeze(0), copies, seq_len) for row in rewards])


def _return_so_far(rewards: Tensor, copies: int, seq_len: int) -> Tensor:
    return leave_one_out(rewards.flip(0), copies, seq_len).flip(0)


GRADIENT_BUGS: dict[str, tuple[Any, str, Any]] = {
    "argmax": (torch, "rand_like", lambda logits: torch.full_like(logits, 0.5)),
    "opposite bits": (routing_ppo, "bits_log_prob", lambda logits, bits: bits_log_prob(logits, ~bits)),
    "sign": (routing_ppo, "leave_one_out", lambda *args: -leave_one_out(*args)),
    "reward only": (routing_ppo, "leave_one_out", _only_own_reward),
    "return so far": (routing_ppo, "leave_one_out", _return_so_far),
    "other lane": (routing_ppo, "leave_one_out", lambda *args: leave_one_out(*args).roll(1, 1)),
    "no cost": (RoutingMDP, "unit_price", property(lambda mdp: torch.zeros_like(mdp.state.price))),
    "half": (routing_ppo, "leave_one_out", lambda *args: leave_one_out(*args) / 2),
}


@pytest.mark.parametrize("bug", GRADIENT_BUGS)
def test_a_wrong_gradient_is_seen(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted one at a time, between the sampling and the loss."""
    monkeypatch.setattr(*GRADIENT_BUGS[bug])
    with pytest.raises(AssertionError):
        check_sampled_gradient_is_exact()


# The baseline


def test_leave_one_out_by_hand() -> None:
    """Two sites, one sequence, three copies of two tokens; lanes are ordered sequence, copy, token."""
    rewards = torch.tensor([[0.0, 1, 0, 0, 0, 0], [1, 0, 2, 0, 6, 3]])
    # to go, first token: 1 2 6 at both sites; second token: 1 0 3 at the first site, 0 0 3 at the second
    expected = [[1 - 4, 1 - 1.5, 2 - 3.5, 0 - 2, 6 - 1.5, 3 - 0.5], [1 - 4, 0 - 1.5, 2 - 3.5, 0 - 1.5, 6 - 1.5, 3 - 0]]
    torch.testing.assert_close(leave_one_out(rewards, copies=3, seq_len=2), torch.tensor(expected))
    docstring = leave_one_out(torch.tensor([[1.0, 3.0]]), copies=2, seq_len=1)
    assert docstring.tolist() == [[-2.0, 2.0]]


def check_baseline(advantage_of: Callable[[Tensor, int, int], Tensor]) -> None:
    """Advantages of copies sum to zero, and a copy's baseline does not move with its own reward."""
    torch.manual_seed(0)
    rewards = torch.randn(NUM_SITES, NUM_SEQUENCES * COPIES * SEQ_LEN)
    advantages = advantage_of(rewards, COPIES, SEQ_LEN)
    groups = advantages.view(NUM_SITES, NUM_SEQUENCES, COPIES, SEQ_LEN)
    torch.testing.assert_close(groups.sum(2), torch.zeros_like(groups[:, :, 0]), rtol=0, atol=1e-5)
    changed = rewards.clone().view_as(groups)
    changed[1, 2, 0, 3] += 10
    moved = (advantage_of(changed.flatten(1), COPIES, SEQ_LEN) - advantages).view_as(groups)
    expected = torch.zeros_like(groups)
    expected[:, 2, 0, 3] = 10
    expected[:, 2, 1:, 3] = -10 / (COPIES - 1)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-5)


def test_baseline_is_that_of_the_others() -> None:
    """So its product with the own score is zero in expectation, and the gradient stays unbiased."""
    check_baseline(leave_one_out)


def _group_mean(rewards: Tensor, copies: int, seq_len: int) -> Tensor:
    return leave_one_out(rewards, copies, seq_len) * (copies - 1) / copies


def _mean_of_all(rewards: Tensor, copies: int, seq_len: int) -> Tensor:
    returns = rewards.flip(0).cumsum(0).flip(0)
    return returns - returns.mean(1, keepdim=True)


def _wrong_order(rewards: Tensor, copies: int, seq_len: int) -> Tensor:
    return leave_one_out(rewards, seq_len, copies)


@pytest.mark.parametrize("bug", [_group_mean, _mean_of_all, _wrong_order])
def test_a_baseline_that_holds_the_own_action_or_other_tokens_is_seen(bug: Callable[..., Tensor]) -> None:
    """Planted: the mean with oneself in it, the mean of all lanes, and lanes in another order."""
    with pytest.raises(AssertionError):
        check_baseline(bug)


def test_baseline_times_score_is_zero_in_expectation() -> None:
    """By enumeration of one bit in two copies: the mean of baseline times score vanishes, that of the return not."""
    logit = torch.tensor(0.7, requires_grad=True)
    value = {False: 1.0, True: 3.0}
    with_baseline = with_return = torch.zeros(())
    for own, other in itertools.product((False, True), repeat=2):
        log_prob = bits_log_prob(logit.view(1), torch.tensor([own]))
        probability = (log_prob + bits_log_prob(logit.view(1), torch.tensor([other]))).exp().detach()
        (score,) = torch.autograd.grad(log_prob, logit)
        rewards = torch.tensor([[value[own], value[other]]])
        baseline = rewards[0, 0] - leave_one_out(rewards, 2, 1)[0, 0]
        with_baseline = with_baseline + probability * baseline * score
        with_return = with_return + probability * rewards[0, 0] * score
    assert abs(with_baseline.item()) < 1e-6
    assert with_return.item() > 0.1


def test_lanes_count_by_their_price() -> None:
    """In proportion to one over its root, so that high prices do not drown the low ones; all alike if asked."""
    rules = replace(PLANTED_RULES, price_low=0.04, price_high=4.0)
    for balance in (0.5, 0.0):
        model = _model(rules, price_balance=balance)
        episode = _collect(model)
        price = episode.log_price.squeeze(2).exp()
        assert price.std() > 0.1
        torch.testing.assert_close(episode.weight, price**-balance)


# Router shift


def check_flip_rate() -> None:
    """The logged share is that of the decisions an update turned round; none without a step, some after a large one."""
    rates = {}
    for learning_rate in (1e-12, 0.3):
        model = _model(learning_rate=learning_rate, n_epochs=4)
        rates[learning_rate] = _one_update(model).get("train/flip_rate", -1.0)
        turned = (_logits(model, model._episode) > 0) != (_logits(_model(), model._episode) > 0)
        assert rates[learning_rate] == pytest.approx(turned.float().mean().item())
    assert rates[1e-12] == 0
    assert rates[0.3] > 0.02


def test_flip_rate_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The share of decisions that an update turned round; planted, a rate taken before the update is seen."""
    check_flip_rate()
    log_update = RoutingPPO._log_update
    monkeypatch.setattr(
        RoutingPPO, "_log_update", lambda self, stats, flips: log_update(self, stats, torch.zeros_like(flips))
    )
    with pytest.raises(AssertionError):
        check_flip_rate()


@pytest.mark.parametrize(("target_kl", "steps"), [(None, 8), (1e-6, 1)], ids=["no bound", "tight bound"])
def test_update_stops_when_the_policy_has_moved_too_far(
    target_kl: float | None, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a tight bound the first step is the last; without one all epochs run."""
    taken = []
    descend = RoutingPPO._descend
    monkeypatch.setattr(RoutingPPO, "_descend", lambda self, loss: taken.append(loss) or descend(self, loss))
    _one_update(_model(target_kl=target_kl, n_epochs=8))
    assert len(taken) == steps


def test_ratios_outside_the_clip_have_no_pull() -> None:
    """Once an action is likelier than the clip allows, more of it earns nothing; the other way it still does."""
    model = _model(normalize_advantage=False)
    episode = _collect(model)
    log_probs = episode.log_probs - torch.tensor(2.0).log()  # ratio 2, clip range 0.2
    doubled = episode._replace(log_probs=log_probs, unit_price=torch.zeros_like(episode.unit_price))
    for advantage, pulls in ((1.0, False), (-1.0, True)):
        loss, (_, clipped, _) = model._loss(doubled._replace(advantages=torch.full_like(episode.advantages, advantage)))
        (gradient,) = torch.autograd.grad(loss, _router(model).weight)
        assert bool(gradient.abs().max() > 1e-6) == pulls
        assert clipped == 1.0


# Seeds, and what must stay as it is


def check_seeds_differ(run: Callable[[int], Tensor], seeds: Sequence[int] = (0, 1, 2)) -> None:
    """Every pair of runs ends with other weights."""
    results = [run(seed) for seed in seeds]
    for one, other in itertools.combinations(results, 2):
        assert not torch.equal(one, other)


def _run(seed: int) -> Tensor:
    model = _model(seed=seed)
    _one_update(model)
    return _weights(model)


def test_three_seeds_are_three_runs() -> None:
    """A replication is one; planted, the same seed three times is seen."""
    check_seeds_differ(_run)
    with pytest.raises(AssertionError):
        check_seeds_differ(lambda seed: _run(0))


def test_backbone_never_learns() -> None:
    """The router's world stands still: no backbone weight moves while it trains."""
    model = _model()
    assert isinstance(model.env, RoutingVecEnv)
    before = model.env.mdp.backbone.sha256()
    model.learn(3 * model.env.num_envs * NUM_SITES)
    backbone = model.env.mdp.backbone
    assert isinstance(backbone, MoETransformer)
    assert backbone.sha256() == before
    assert all(weight.grad is None for weight in backbone.parameters())


def test_before_training_the_router_follows_its_prior() -> None:
    """All heads, and the experts that the gate gives more than a fifth: no random start in a large action space."""
    model = _model()
    observations = _observations(model)
    decisions = _observed_logits(model, observations) > 0
    assert decisions[0, :, : UNITS[0]].all()
    scores = observations[1][:, 32:36]
    assert torch.equal(decisions[1], scores.exp() > 0.2)
    assert decisions[1].any()
    assert not decisions[1].all()
