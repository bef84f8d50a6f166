"""The expert op on a CPU against transformers' grouped_mm, and against the loop that everybody writes first."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import cycle
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Measured, Row, agree, compare, interleave, milliseconds
from moe_backbone.kernels import expert_mlp
from moe_backbone.sites import best_units

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of one expert layer."""

    num_tokens: int
    hidden_size: int = 256
    intermediate_size: int = 512
    num_experts: int = 16
    active: int = 2
    """Experts of a token, on average or exactly."""


class Inputs(NamedTuple):
    """Arguments of `expert_mlp`."""

    hidden: Tensor
    weights: Tensor
    subset: Tensor
    gate_up: Tensor
    down: Tensor


BATCHES = 8
"""Different tokens and subsets that are timed in turn."""
LOOP_SIZES = (
    Sizes(num_tokens=2048),
    Sizes(num_tokens=256),
    Sizes(num_tokens=32),
    Sizes(num_tokens=4096, hidden_size=128, intermediate_size=96, active=4),
    Sizes(num_tokens=1),
)


@torch.no_grad()
def rows() -> Iterator[Row]:
    """Any subset allowed, always the same number of experts, and the plain loop at its best size."""
    if importlib.util.find_spec("transformers") is None:
        logger.warning("experts/any-subset and experts/fixed-k left out, they need: pip install -e '.[bench]'")
    else:
        yield _against_grouped_mm("experts/any-subset", 4.0, any_subset=True)
        yield _against_grouped_mm("experts/fixed-k", 1.15, any_subset=False)
    yield _against_plain_loop()


def draw(
    sizes: Sizes,
    *,
    any_subset: bool,
    batches: int = BATCHES,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    shares: Tensor | None = None,
) -> list[Inputs]:
    """Random batches for the same experts; several, as a library may be fast only for numbers of rows it has seen.

    Args:
        sizes: Of the layer.
        any_subset: Whether each expert is chosen by chance, or exactly `sizes.active` for each token.
        batches: How many.
        device: Where they are drawn.
        dtype: Of tokens and weights.
        shares: Of each expert among the chosen, for any subset (num_experts,); equal if None.
    """
    generator = torch.Generator(device).manual_seed(0)
    tokens, width, inner, experts = sizes.num_tokens, sizes.hidden_size, sizes.intermediate_size, sizes.num_experts
    options: dict[str, Any] = {"generator": generator, "device": device}
    gate_up = torch.randn(experts, width, 2 * inner, dtype=dtype, **options) * width**-0.5
    down = torch.randn(experts, inner, width, dtype=dtype, **options) * inner**-0.5
    wanted = sizes.active / experts if shares is None else sizes.active * shares
    drawn = []
    for _ in range(batches):
        chances = torch.rand(tokens, experts, **options)
        subset = chances < wanted if any_subset else best_units(chances, sizes.active)
        hidden = torch.randn(tokens, width, dtype=dtype, **options)
        weights = (torch.rand(tokens, experts, **options) + 0.1).to(dtype)
        drawn.append(Inputs(hidden, weights, subset, gate_up, down))
    return drawn


def _in_turn(calls: Sequence[Callable[[], Tensor]]) -> Callable[[], Tensor]:
    """Another of the calls each time."""
    turns = cycle(calls)
    return lambda: next(turns)()


def _against_grouped_mm(name: str, bar: float, *, any_subset: bool) -> Row:
    """Ratio to the form that takes any subset as it is; in `detail` those to forms that first look at the subset."""
    sizes = Sizes(num_tokens=2048)
    batches = draw(sizes, any_subset=any_subset)
    most = max(int(inputs.subset.sum(1).max()) for inputs in batches)
    forms: dict[str, list[Callable[[], Tensor]]] = {"ours": [partial(expert_mlp, *inputs) for inputs in batches]}
    if any_subset:
        forms["padded"] = [_grouped_mm(inputs, sizes.num_experts) for inputs in batches]
        forms["pairs"] = [_grouped_mm_of_pairs(inputs) for inputs in batches]
    forms["trimmed"] = [_grouped_mm(inputs, most) for inputs in batches]

    def measure() -> Measured:
        times = dict(zip(forms, interleave([_in_turn(calls) for calls in forms.values()]), strict=True))
        detail: dict[str, Any] = {"sizes": asdict(sizes), "rows": int(batches[0].subset.sum()), "columns_trimmed": most}
        detail |= {f"{form}_ms": milliseconds(seconds) for form, seconds in times.items()}
        ratios = {form: times[form] / times["ours"] for form in times if form != "ours"}
        detail |= {f"ratio_{form}": ratio for form, ratio in ratios.items()}
        return ratios["padded" if any_subset else "trimmed"], detail

    equal = all(
        agree(call(), own()) for calls in forms.values() for own, call in zip(forms["ours"], calls, strict=True)
    )
    return compare(name, bar=bar, equal=equal, measure=measure)


def _grouped_mm(inputs: Inputs, columns: int) -> Callable[[], Tensor]:
    """The same experts as transformers runs them; its form of weights and choice is made before the clock starts.

    Each token has `columns` ids, the chosen experts first; the rest hold the id `num_experts` and weigh nothing. Where
    any subset is allowed and nobody looks how large it is, there must be a column for each expert. Its masks for such
    ids stay off: they only cost it time.
    """
    order = inputs.subset.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :columns]
    chosen = inputs.subset.gather(1, order)
    ids, weights = order.where(chosen, len(inputs.down)), inputs.weights.gather(1, order) * chosen
    return partial(_forward(), transformers_layer(inputs), inputs.hidden, ids, weights)


def _grouped_mm_of_pairs(inputs: Inputs) -> Callable[[], Tensor]:
    """Each chosen (token, expert) pair as a token of its own with one expert, summed up behind it."""
    tokens, experts = inputs.subset.nonzero().unbind(1)
    weights = inputs.weights[tokens, experts].unsqueeze(1)
    forward, layer = _forward(), transformers_layer(inputs)

    def run() -> Tensor:
        rows = forward(layer, inputs.hidden.index_select(0, tokens), experts.unsqueeze(1), weights)
        return torch.zeros_like(inputs.hidden).index_add_(0, tokens, rows)

    return run


def _forward() -> Callable[..., Tensor]:
    from transformers.integrations.moe import grouped_mm_experts_forward

    return grouped_mm_experts_forward


def transformers_layer(inputs: Inputs, *, masks_empty: bool = False) -> Any:
    """What the functions of transformers read of a module; `masks_empty`: whether they mask ids that mean no expert."""

    def gated(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    return SimpleNamespace(
        num_experts=len(inputs.down),
        gate_up_proj=_transposed(inputs.gate_up),
        down_proj=_transposed(inputs.down),
        act_fn=F.silu,
        has_gate=True,
        has_bias=False,
        has_post_expert_norm=False,
        is_transposed=False,
        _is_expert_parallel=masks_empty,
        _apply_gate=gated,
    )


@lru_cache(maxsize=2)  # the two weights of one layer: more would keep every layer's memory
def _transposed(weight: Tensor) -> Tensor:
    """The layout that transformers has, once for all batches."""
    return weight.mT.contiguous()


def plain_loop(hidden: Tensor, weights: Tensor, subset: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Expert after expert; shapes as in `reference.expert_mlp`."""
    update = torch.zeros_like(hidden)
    for expert in range(len(gate_up)):
        tokens = subset[:, expert].nonzero().squeeze(1)
        if not len(tokens):
            continue
        gate, up = (hidden[tokens] @ gate_up[expert]).chunk(2, dim=1)
        update.index_add_(0, tokens, (F.silu(gate) * up) @ down[expert] * weights[tokens, expert, None])
    return update


def _against_plain_loop() -> Row:
    """The least of the ratios of all sizes."""
    problems = [draw(sizes, any_subset=False) for sizes in LOOP_SIZES]

    def side(op: Callable[..., Tensor], batches: list[Inputs]) -> Callable[[], Tensor]:
        return _in_turn([partial(op, *inputs) for inputs in batches])

    def measure() -> Measured:
        ratios, cases = [], []
        for sizes, batches in zip(LOOP_SIZES, problems, strict=True):
            own, other = interleave((side(expert_mlp, batches), side(plain_loop, batches)), seconds=2.0)
            times = {"ours_ms": milliseconds(own), "loop_ms": milliseconds(other)}
            ratios.append(other / own)
            cases.append({"ratio": ratios[-1], **times, "sizes": asdict(sizes)})
        return min(ratios), {"cases": cases}

    equal = all(agree(expert_mlp(*inputs), plain_loop(*inputs)) for batches in problems for inputs in batches)
    return compare("experts/plain-loop", bar=0.95, equal=equal, measure=measure)
