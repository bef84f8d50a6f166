"""The `Backbone` protocol over any mixture-of-experts checkpoint of transformers, and dense ones by their heads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from moe_backbone.checks import require
from moe_backbone.compensation import Compensation
from moe_backbone.compute import ComputeMeter
from moe_backbone.huggingface.model_sites import ModelSites, passing
from moe_backbone.huggingface.passes import Decision, ForwardPass, routed_by
from moe_backbone.sites import HeadMeaning, Router, RoutingSite, SiteView

SAMPLED_NUMBERS = 4096
"""Numbers of each weight that the fingerprint looks at."""


@dataclass(frozen=True, kw_only=True)
class CheckpointShape:
    """What a run needs to know of a checkpoint's sizes."""

    seq_len: int
    hidden_size: int
    max_units: int
    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """Where the tokens stand: before site `site_index`, or behind the last one."""

    tokens: Tensor
    """Token ids (num_sequences, seq_len), int64."""
    price: Tensor
    """(num_sequences * seq_len,), float32."""
    features: Tensor
    """What the current site computes with (num_sequences, seq_len, hidden_size), float32; zeros after the last."""
    scores: Tensor
    """Log of the native gate (num_tokens, num_units), float32; zeros where there is none."""
    logits: Tensor | None
    """Predictions (num_sequences, seq_len, vocab_size), float32, after the last site."""
    site_index: int
    first_position: int
    """Position of the first token in its sequence; above 0 when a cache holds earlier tokens."""
    cache: Any = field(repr=False)
    history: tuple[Decision, ...] = field(repr=False)
    """What ran at the sites before."""
    walk: Any = field(repr=False)
    """The forward pass that stands here, if it has not gone on."""

    @property
    def positions(self) -> Tensor:
        """Position of each row's token in its sequence (num_sequences * seq_len,), int64."""
        num_sequences, seq_len = self.tokens.shape
        return torch.arange(self.first_position, self.first_position + seq_len, device=self.tokens.device).repeat(
            num_sequences
        )

    @property
    def earlier_keys(self) -> None:
        """Every token is a key."""
        return None


class _Walk:
    """One forward pass in a greenlet, which stops before every site until it is told what runs there."""

    def __init__(self, backbone: HuggingFaceBackbone, tokens: Tensor, price: Tensor, cache: Any) -> None:
        from greenlet import getcurrent, greenlet

        self.at = -1
        self._getcurrent = getcurrent
        asked = ForwardPass(decide=self._wait, tokens=tokens, price=price)

        def whole() -> Tensor:
            with passing(asked):
                return backbone.logits(tokens, cache)

        self._greenlet = greenlet(whole)
        self._greenlet.gr_context = copy_context()

    def _wait(self, view: SiteView) -> Decision:
        """Inside the pass: hand the view out, and come back with what runs."""
        return self._getcurrent().parent.switch(view)

    def go(self, decision: Decision | None) -> SiteView | Tensor:
        """On to the next site: its view, or the logits after the last one."""
        self._greenlet.parent = self._getcurrent()
        self.at += 1
        return self._greenlet.switch(decision) if decision is not None else self._greenlet.switch()


class HuggingFaceBackbone:
    """A causal language model of transformers whose routing comes from outside.

    Its forward pass is its own: the experts function registered with transformers asks what runs at each site. States
    are values, as `MoETransformer`'s are; to advance one twice runs the model again up to it.

    Args:
        model: In evaluation mode; its weights are never changed.
        seq_len: Tokens of a window, for training and reports.
        heads: Whether attention heads are routed too; None for only where there are no experts.
        name: What the checkpoint is called in reports.

    Attributes:
        sites: Routed sites in running order.
        config: Sizes.
        fixed_flops: FLOPs of one token that no routing can save, mean over a window: products with weights outside the
            routed experts, and attention of unrouted heads.

    Raises:
        ValueError: If nothing can be routed in the model.
    """

    head_meaning: HeadMeaning = "query"

    def __init__(self, model: Any, *, seq_len: int = 128, heads: bool | None = None, name: str = "") -> None:
        require(seq_len >= 2, f"seq_len must be at least 2, got {seq_len}")
        text = model.config.get_text_config()
        longest = getattr(text, "max_position_embeddings", None)
        require(not longest or seq_len <= longest, f"seq_len must be at most {longest} for this model, got {seq_len}")
        self.name = name or model.config.name_or_path or type(model).__name__
        training = model.training
        try:
            self.model, self.model_sites = model, ModelSites(model.eval(), heads)
        except BaseException:
            model.train(training)
            raise
        self.sites: tuple[RoutingSite, ...] = self.model_sites.sites
        self.config = CheckpointShape(
            seq_len=seq_len,
            hidden_size=self.model_sites.hidden_size,
            max_units=max(site.num_units for site in self.sites),
            vocab_size=text.vocab_size,
        )
        self.fixed_flops = fixed_flops(model, self.sites, seq_len)
        self._compensation: Compensation | None = None
        self._hash: str | None = None

    def route_by(self, router: Router | None) -> None:
        """Let a router decide in every forward pass from now on; None for native routing."""
        tokens = torch.empty(0, 0, dtype=torch.int64, device=self.device)
        default = None if router is None else ForwardPass(decide=routed_by(router), tokens=tokens)
        self.model_sites.default = default

    def release(self) -> None:
        """Leave the model as it was found; the backbone is of no use afterwards."""
        self.model_sites.release()

    @property
    def hidden_size(self) -> int:
        """Width of a token's features."""
        return self.config.hidden_size

    @property
    def device(self) -> torch.device:
        """Where tokens go."""
        return self.model.get_input_embeddings().weight.device

    def parameters(self) -> Iterator[nn.Parameter]:
        """Weights of the model; the first ones lie where tokens go."""
        yield self.model.get_input_embeddings().weight
        yield from self.model.parameters()

    @property
    def num_parameters(self) -> int:
        """Trained numbers."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def routable_share(self) -> float:
        """Fraction of a token's FLOPs that routing can save at most, under native routing."""
        routable = ComputeMeter(self.sites, self.config.seq_len).native_flops
        return routable / (routable + self.fixed_flops)

    def describe(self) -> str:
        """Sizes, and how much of the compute can be routed at most."""
        first = self.sites[0]
        units = f"{len(self.sites)} sites, {first.native_units} of {first.num_units} {first.kind} at the first"
        share = f"{self.routable_share:.0%} of a token's FLOPs can be routed, so no router can save more"
        return f"{self.num_parameters / 1e6:.1f} M parameters; {units}; {share}"

    def sha256(self) -> str:
        """Hash of names and shapes of all weights and of a sample of their numbers, the same in every float dtype."""
        if self._hash is None:
            self._hash = fingerprint(self.model)
        return self._hash

    def logits(self, tokens: Tensor, cache: Any = None) -> Tensor:
        """One forward pass under whatever decides now (num_sequences, seq_len, vocab_size), float32."""
        output = self.model(input_ids=tokens, past_key_values=cache, use_cache=cache is not None)
        return output.logits.to(tokens.device, torch.float32)

    def begin(self, tokens: Tensor, price: Tensor | None = None, cache: Any | None = None) -> CheckpointState:
        """Stand before the first site.

        Args:
            tokens: (num_sequences, seq_len), int64.
            price: (num_sequences * seq_len,) or None for zeros; only shown to the router.
            cache: From `new_cache`; grown in place.
        """
        require(tokens.dim() == 2, f"tokens must have shape (num_sequences, seq_len), got {tuple(tokens.shape)}")
        price = torch.zeros(tokens.numel(), device=tokens.device) if price is None else price
        first = 0 if cache is None else int(cache.get_seq_length())
        nothing = price.new_empty(0)
        start = CheckpointState(
            tokens=tokens,
            price=price,
            features=nothing,
            scores=nothing,
            logits=None,
            site_index=-1,
            first_position=first,
            cache=cache,
            history=(),
            walk=None,
        )
        return self._go_on(start, _Walk(self, tokens, price, cache), None)

    def _go_on(self, state: CheckpointState, walk: _Walk, decision: Decision | None) -> CheckpointState:
        reached = walk.go(decision)
        history = state.history if decision is None else (*state.history, decision)
        at: dict[str, Any] = {"site_index": state.site_index + 1, "history": history, "walk": walk}
        if isinstance(reached, Tensor):
            features = torch.zeros(*state.tokens.shape, self.hidden_size, device=state.tokens.device)
            return replace(state, logits=reached, features=features, **(at | {"walk": None}))
        features = reached.features.unflatten(0, state.tokens.shape)
        return replace(state, features=features, scores=reached.scores, **at)

    def observe(self, state: CheckpointState) -> SiteView:
        """What a router may see at the current site."""
        return SiteView(
            index=state.site_index,
            site=self.sites[state.site_index],
            features=state.features.flatten(0, 1),
            scores=state.scores,
            price=state.price,
            tokens=state.tokens,
        )

    def advance(self, state: CheckpointState, subset: Tensor, switch: Tensor | None = None) -> CheckpointState:
        """Run the current site and stand before the next; arguments as `MoETransformer.advance`.

        Raises:
            ValueError: If units shall run to a degree, or a state with a cache is advanced twice.
        """
        require(subset is not None, "subset must be given for a checkpoint, whose units run whole or not, got None")
        decision = Decision(subset=subset, switch=switch, compensation=self._compensation)
        walk = state.walk
        if walk.at != state.site_index:
            require(state.cache is None, "a state with a cache can be advanced once, got one that has gone on")
            walk = _Walk(self, state.tokens, state.price, None)
            for step in (None, *state.history):
                walk.go(step)
        return self._go_on(state, walk, decision)

    def finish(self, state: CheckpointState) -> Tensor:
        """Logits (num_sequences, seq_len, vocab_size), float32, after the last site."""
        assert state.logits is not None, "the last site has not run"
        return state.logits

    def run(
        self, tokens: Tensor, router: Router, price: Tensor | None = None, cache: Any | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Run every site under `router`; its `compensation`, if it has one, stands in for what it skips."""
        with passing(ForwardPass(decide=routed_by(router), tokens=tokens, price=price)) as routed:
            logits = self.logits(tokens, cache)
        return logits, [routed.subsets[index] for index in range(len(self.sites))]

    def new_cache(self) -> Any:
        """An empty cache for decoding."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    @property
    def compensation(self) -> Compensation | None:
        """What `advance` adds in place of skipped units."""
        return self._compensation

    @contextmanager
    def compensated(self, compensation: Compensation | None) -> Iterator[None]:
        """Add these constants in place of skipped units meanwhile."""
        before, self._compensation = self._compensation, compensation
        try:
            yield
        finally:
            self._compensation = before


def fixed_flops(model: Any, sites: Sequence[RoutingSite], seq_len: int) -> float:
    """FLOPs of one token that routing cannot save, mean over a window of `seq_len` tokens.

    Products with every weight matrix but those of routed experts and of embeddings that are looked up; and scores and
    mixtures of attention over all earlier tokens, where the heads are not sites.
    """
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    flops, seen = 0.0, set(looked_up)
    for module in model.modules():
        routed = hasattr(module, "_is_expert_parallel")
        for weight in module.parameters(recurse=False):
            if not routed and weight.dim() > 1 and id(weight) not in seen:
                flops += 2 * weight.numel()
                seen.add(id(weight))
    output = model.get_output_embeddings()
    if output is not None and id(output.weight) in looked_up:  # tied: looked up and multiplied
        flops += 2 * output.weight.numel()
    if not any(site.kind == "heads" for site in sites):
        text = model.config.get_text_config()
        layers = getattr(text, "per_layer_config", None) or [text] * text.num_hidden_layers
        flops += sum(_attention_flops_per_key(layer) for layer in layers) * (seq_len + 1) / 2
    return flops


def _attention_flops_per_key(layer: Any) -> int:
    """FLOPs of scores and mixtures of one token and one key in a layer with this configuration."""
    heads = getattr(layer, "num_attention_heads", 0)
    return heads * 4 * (getattr(layer, "head_dim", None) or layer.hidden_size // max(1, heads))


def fingerprint(model: Any) -> str:
    """Hash of names, shapes and a sample of the numbers of all weights, rounded to bfloat16.

    So it is the same whichever float dtype a checkpoint is loaded in. Weights that differ in few numbers only may
    share it.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(json.dumps([name, list(weight.shape)]).encode())
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLED_NUMBERS)]
        numbers = sample.to(torch.bfloat16).view(torch.int16) if sample.is_floating_point() else sample
        digest.update(numbers.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
