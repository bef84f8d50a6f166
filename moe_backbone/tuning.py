"""Which weights of a trained backbone more training may change: all, some, or few new ones that fold into them.

peft would be the library for it, but it adapts what `nn.Module.forward` computes, and this backbone hands its weights,
experts stacked in one tensor, to its kernels. So LoRA and IA3 are parametrizations (`torch.nn.utils.parametrize`) of
the weights themselves here, and `merged` writes them back: the result is a plain backbone of the same sizes and speed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from moe_backbone.checks import require, require_at_least
from moe_backbone.pretrain import PretrainConfig
from moe_backbone.transformer import MoETransformer

Method = Literal["full", "lora", "ia3", "bitfit", "norms", "top_layers"]
RATES: dict[Method, float] = {
    "full": 1e-3,
    "lora": 3e-3,
    "ia3": 1e-2,
    "bitfit": 1e-2,
    "norms": 1e-2,
    "top_layers": 1e-3,
}
"""Peak learning rates; `full` is a third of what pretraining takes."""
LOW_RANK_SCALE = 2.0
"""Factor of what LoRA adds: its alpha divided by its rank."""


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """How a trained backbone is trained on.

    Raises:
        ValueError: If a value is impossible; the message gives name, rule and actual value.
    """

    method: Method = "full"
    """What learns. `full`: every weight. `lora`: a low-rank sum for each matrix of attention and experts
    (arXiv:2106.09685). `ia3`: a factor for each key, value and inner activation (arXiv:2205.05638). `bitfit`: biases
    (arXiv:2106.10199), of which a backbone of our own has none. `norms`: the scales of the normalisations, the nearest
    to BitFit there. `top_layers`: the last layers, the last normalisation and the output head."""
    rank: int = 8
    """Rank of each sum, for `lora`."""
    top_layers: int = 1
    """Layers that learn, counted from the end, for `top_layers`."""
    distill: float = 0.0
    """Weight of staying close to the start on samples of the first text: KL(start || trained), nats a token, in place
    of their own log-likelihood (as in dark experience replay, arXiv:2004.07211); 0 for none."""
    steps: int = 300
    """Most optimiser steps; early stopping may end before."""
    sequences: int = 16
    """Sequences of a step."""
    learning_rate: float | None = None
    """Peak of the AdamW learning rate, warmed up, then a cosine to 0; None for the method's own, from 0.001 for `full`
    to 0.01 for `ia3`, and a tenth of that for a checkpoint."""
    weight_decay: float = 0.1
    """AdamW weight decay of what learns."""
    balance_weight: float = 0.01
    """Weight of the load-balance loss of the native gate; a checkpoint has its own."""
    eval_every: int = 50
    """Steps between looks at the validation documents of every corpus."""
    patience: int = 4
    """Looks without improvement of the loss, weighted by the mixture, before training stops early."""
    seed: int = 0
    """Seed of new weights and of the text drawn."""

    def __post_init__(self) -> None:
        known = get_args(Method)
        require(self.method in known, f"method must be one of {', '.join(known)}, got {self.method!r}")
        require_at_least(self, 1, "rank", "top_layers")
        require(0 <= self.distill < math.inf, f"distill must be at least 0, got {self.distill}")
        _ = self.training  # refuses impossible values of the rest

    @property
    def training(self) -> PretrainConfig:
        """The same as settings of a training run."""
        names = ("steps", "sequences", "weight_decay", "balance_weight", "eval_every", "patience", "seed")
        rate = RATES[self.method] if self.learning_rate is None else self.learning_rate
        return PretrainConfig(learning_rate=rate, **{name: getattr(self, name) for name in names})


class LowRank(nn.Module):
    """Weight plus `LOW_RANK_SCALE` * left @ right; right starts at zero, so the weight starts as it was.

    Args:
        shape: Number of matrices in the weight, each with its own sum, their rows and their columns.
        rank: Of each sum.
        heads: For queries, (num_heads, hidden_size, head_size): heads that lie side by side in one matrix; else 0.
    """

    def __init__(self, shape: Sequence[int], rank: int, heads: int = 0) -> None:
        super().__init__()
        units, inputs, outputs = shape
        self.heads = heads
        self.left = nn.Parameter(torch.randn(units, inputs, rank) * inputs**-0.5)
        self.right = nn.Parameter(torch.zeros(units, rank, outputs))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that is used, of the same shape."""
        more = LOW_RANK_SCALE * (self.left @ self.right)
        if self.heads:
            more = more[0].unflatten(1, (self.heads, -1)).transpose(0, 1)
        return weight + more.reshape(weight.shape)


class Scaled(nn.Module):
    """Weight times 1 + scale; scale starts at zero.

    Args:
        shape: Of the scale; broadcast over the weight.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(shape))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that is used, of the same shape."""
        return weight * (1 + self.scale)


def begin_tuning(backbone: MoETransformer, tuning: TuningConfig) -> None:
    """Freeze a backbone but for what the method trains, which is added where it is new.

    Raises:
        ValueError: If the backbone has nothing that the method trains.
    """
    if tuning.method in ("lora", "ia3"):
        backbone.requires_grad_(False)
        for module, name, change in _changes(backbone, tuning):
            register_parametrization(module, name, change)
        return
    top = _top(backbone, tuning.top_layers)
    owner = "the backbone has (norms is the nearest to bitfit)"
    train_only(backbone, tuning.method, norms=("norms.",), top=top, owner=owner)


def train_only(model: nn.Module, method: Method, *, norms: tuple[str, ...], top: tuple[str, ...], owner: str) -> None:
    """Freeze all weights of a model but those that a method without new ones trains.

    Args:
        model: Changed in place.
        method: `full`, `bitfit`, `norms` or `top_layers`.
        norms: Beginnings of the names of all weights of normalisations.
        top: Beginnings of the names of all weights in the last layers.
        owner: Who has the weights, for the message.

    Raises:
        ValueError: If there are none.
    """
    rules: dict[str, Callable[[str], bool]] = {
        "full": lambda name: True,
        "bitfit": lambda name: name.endswith("bias"),
        "norms": lambda name: name.startswith(norms),
        "top_layers": lambda name: name.startswith(top),
    }
    for name, weight in model.named_parameters():
        weight.requires_grad_(rules[method](name))
    learns = any(weight.requires_grad for weight in model.parameters())
    require(learns, f"method must train something that {owner}, got {method}")


def _top(backbone: MoETransformer, layers: int) -> tuple[str, ...]:
    """Beginnings of the names of all weights in the last layers and behind them."""
    depth = backbone.config.num_layers
    require(layers <= depth, f"top_layers must be at most num_layers={depth}, got {layers}")
    names = [f"{kind}.{layer}." for kind in ("attentions", "expert_layers") for layer in range(depth - layers, depth)]
    return *names, *(f"norms.{place}." for place in range(2 * (depth - layers), 2 * depth + 1)), "output_head."


def _changes(backbone: MoETransformer, tuning: TuningConfig) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Module, name of its weight, and what becomes of that."""
    low_rank, rank = tuning.method == "lora", tuning.rank
    width, heads = backbone.config.hidden_size, backbone.config.num_heads
    attention: Any
    experts: Any
    for attention in backbone.attentions:
        if low_rank:
            yield attention, "query", LowRank((1, width, width), rank, heads)
            yield attention, "key_value", LowRank((1, width, 2 * width), rank)
            yield attention, "output", LowRank((1, width, width), rank)
        else:
            yield attention, "key_value", Scaled(2 * width)
    for experts in backbone.expert_layers:
        if low_rank:
            yield experts, "gate_up", LowRank(experts.gate_up.shape, rank)
            yield experts, "down", LowRank(experts.down.shape, rank)
        else:
            yield experts, "down", Scaled(*experts.down.shape[:2], 1)
        for place, layer in enumerate(experts.shared or ()):
            if low_rank:
                yield layer, "weight", LowRank((1, *layer.weight.shape), rank)
            elif place:
                yield layer, "weight", Scaled(layer.weight.shape[1])


def merged(backbone: MoETransformer) -> MoETransformer:
    """A plain backbone, frozen and in evaluation mode, whose weights are those that a tuned one uses."""
    plain = MoETransformer(backbone.config).to(backbone.rotation.device)
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            weight.copy_(attrgetter(name)(backbone))
    plain.head_meaning = backbone.head_meaning
    return plain.requires_grad_(False).eval()


def trained_parameters(model: nn.Module) -> int:
    """Numbers that learn."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def frozen_sha256(model: nn.Module) -> str:
    """Hash of the names and bytes of all weights that do not learn."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        if not weight.requires_grad:
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
