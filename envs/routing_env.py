"""The Gymnasium door: one token at a time, in the order in which a model decodes."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.error import ResetNeeded
from torch import Tensor

from envs.actions import action_tensor
from envs.config import EnvConfig
from envs.mdp import RoutingMDP, Step, TokenBatch
from envs.token_source import CorpusSource, TokenSource
from moe_backbone import Backbone, BackboneConfig
from moe_backbone.checks import require
from moe_backbone.corpus import load_corpus
from moe_backbone.pretrain import PretrainConfig, load_or_train
from moe_backbone.quality import scored


class RoutingEnv(gym.Env[np.ndarray, Any]):
    """Choose which units one token uses, site by site; `reset` moves to the next token of the sequence.

    - Observation: flat float32, see `ObservationLayout`.
    - Action: `MultiBinary(max_units)`, units beyond the site's own are ignored; or a count, or an ordered list of
      different units, see `EnvConfig`.
    - Reward: minus price times compute at every site, plus quality against the native rollout at the last.
    - Episode: the token's way through all sites; it terminates at the last and is never truncated.
    - Info: `cost`, `quality`, `vector_reward` (quality, minus cost), `reward_weights` (1, price), `price`, `site`.

    `reset(seed=...)` starts a new sequence. `reset(options=...)` takes `price`, and `tokens` with `targets`,
    int64 (seq_len,), to route given text; both start a new sequence too.

    Args:
        backbone: Frozen, in evaluation mode; None loads the default one, and trains it on first use.
        source: Where sequences come from; None for the training part of the default corpus.
        config: Rules; credit must be `token`, as a sequence's mean is not known while it is decoded, and
            `balance_price` 0.
        render_mode: `ansi` for a drawing of the units that ran.

    Raises:
        ValueError: If the rules do not fit decoding.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 4}

    def __init__(
        self,
        backbone: Backbone | None = None,
        source: TokenSource | None = None,
        config: EnvConfig | None = None,
        render_mode: str | None = None,
    ) -> None:
        config = config or EnvConfig()
        if config.credit != "token":
            raise ValueError(f"credit must be 'token' when tokens are decoded one by one, got {config.credit!r}")
        if config.rollouts_per_sequence != 1:
            raise ValueError(f"rollouts_per_sequence must be 1 for one lane, got {config.rollouts_per_sequence}")
        if config.send_price:
            raise ValueError(f"send_price must be 0 for one lane, got {config.send_price}")
        if config.balance_price:
            raise ValueError(
                f"balance_price must be 0 for one lane, as a load over one token means nothing, "
                f"got {config.balance_price}"
            )
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"render_mode must be None or 'ansi', got {render_mode!r}")
        backbone, source = default_parts(backbone, source)
        self.mdp = RoutingMDP(backbone, source, config)
        self.observation_space = self.mdp.observation_space
        self.action_space = self.mdp.action_space
        self.render_mode = render_mode
        self._sequence: TokenBatch | None = None
        self._position = 0
        self._running = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Move to the next token, or to the first of a new sequence.

        A new sequence starts with a seed, with options, after the last token, and when a token is left half-way, as
        the tokens after it would miss its keys and values.
        """
        super().reset(seed=seed)
        new = seed is not None or options is not None or self._sequence is None or self._running
        if new or self._position == self.mdp.source.seq_len:
            self._sequence = draw_with(self.mdp, self.np_random, options or {})
            rule = "every token must be scored when tokens are decoded one by one, as what follows is not known"
            require(bool(scored(self._sequence.targets).all()), f"{rule}, got one that is not")
            self._position = 0
            self._cache = self.mdp.backbone.new_cache()
        assert self._sequence is not None
        observation = self.mdp.begin(self._sequence.token(self._position), self._cache)
        self._running = True
        return _array(observation[0]), {"price": float(self._sequence.price), "site": 0, "position": self._position}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Run the current site.

        Raises:
            ResetNeeded: Before the first reset and after the last site.
            InvalidAction: If shape or values do not fit the action space.
        """
        if not self._running:
            raise ResetNeeded("reset must be called before step: before the first token and after each last site")
        actions = action_tensor(np.asarray(action)[None], self.action_space, 1, self.mdp.device)
        step = self.mdp.step(actions)
        if step.terminated:
            self._running = False
            self._position += 1
        return _array(step.observation[0]), float(step.reward), step.terminated, False, self._info(step)

    def _info(self, step: Step) -> dict[str, Any]:
        info = step_info(step, self.mdp.price)
        return {name: value[0] for name, value in info.items()} | {"site": len(self.mdp.subsets)}

    def render(self) -> str | None:
        """Draw the units that ran for this token: `#` on, `.` off, one line a site."""
        if self.render_mode is None:
            return None
        if self._sequence is None:
            raise ResetNeeded("reset must be called before render")
        lines = [f"token {self.mdp.state.first_position}"]
        for site, subset in zip(self.mdp.backbone.sites, self.mdp.subsets, strict=False):
            lines.append(f"{site.name:>16} " + "".join("#" if unit else "." for unit in subset[0].tolist()))
        return "\n".join(lines)


def draw_with(mdp: RoutingMDP, generator: np.random.Generator, options: dict[str, Any]) -> TokenBatch:
    """Draw sequences, or take those in the options of a reset.

    Args:
        mdp: Draws.
        generator: The only source of chance.
        options: `price`, and `tokens` with `targets`, whole numbers (num_sequences, seq_len) or (seq_len,) for one.

    Raises:
        ValueError: If an option is unknown or impossible.
    """
    unknown = set(options) - {"tokens", "targets", "price"}
    if unknown:
        raise ValueError(f"options must be among tokens, targets, price, got {', '.join(sorted(unknown))}")
    names = [name for name in ("tokens", "targets") if name in options]
    given = {name: torch.atleast_2d(torch.as_tensor(options[name])) for name in names}
    vocab_size = mdp.backbone.config.vocab_size
    for name, tokens in given.items():
        if tokens.is_floating_point() or not ((tokens >= 0) & (tokens < vocab_size)).all():
            raise ValueError(f"{name} must hold whole numbers in [0, vocab_size={vocab_size}), got {tokens}")
    return mdp.draw(generator, price=options.get("price"), **{name: tokens.long() for name, tokens in given.items()})


def step_info(step: Step, lane_prices: Tensor) -> dict[str, np.ndarray]:
    """Info of all lanes, under the names that Safety-Gymnasium and MO-Gymnasium read; float32 arrays.

    With `balance` where it is priced; it is no part of `vector_reward`.
    """
    price = _array(lane_prices)
    cost, quality = _array(step.cost), _array(step.quality)
    balance = {} if step.balance is None else {"balance": _array(step.balance)}
    return balance | {
        "cost": cost,
        "quality": quality,
        "price": price,
        "vector_reward": np.stack((quality, -cost), axis=1),
        "reward_weights": np.stack((np.ones_like(price), price), axis=1),
    }


def default_parts(backbone: Backbone | None, source: TokenSource | None) -> tuple[Backbone, TokenSource]:
    """Fill in the default backbone and the training part of the default corpus where nothing was given."""
    if backbone is not None and source is not None:
        return backbone, source
    corpus = load_corpus()
    if backbone is None:
        backbone = load_or_train(corpus, BackboneConfig(), PretrainConfig())
    return backbone, source or CorpusSource(corpus.train, backbone.config.seq_len)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy().copy()
