"""A checkpoint at half of its routed compute against the model itself, on this CPU: prefill and generation.

python -m benchmarks.run --only checkpoint
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import policies
from benchmarks.measure import Row, agree, compare, interleave, milliseconds
from moe_backbone.compute import ComputeMeter
from moe_backbone.huggingface import HuggingFaceBackbone
from moe_backbone.sites import NativeRouter, SiteView, best_units

SHARE, BAR = 0.70, 1 / 0.75
"""Routed share of a token's FLOPs, and how much faster half of it must be."""
NATIVE = ("grouped_mm", "eager")
"""The model's own experts functions; the faster one counts."""
PREFILL, PROMPT, NEW_TOKENS = (8, 128), (1, 32), 32


class Share:
    """The best half of the native experts of every token."""

    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units)."""
        return best_units(view.scores, view.site.native_units // 2)


def wide_olmoe() -> Any:
    """OLMoE-shaped with random weights, wide enough that products and not calls take the time."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    config: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 4}
    config |= {"num_attention_heads": 16, "num_experts": 16, "num_experts_per_tok": 8, "vocab_size": 4096}
    config |= {"eos_token_id": None, "pad_token_id": 0, "bos_token_id": None}
    return OlmoeForCausalLM(OlmoeConfig(**config)).eval().requires_grad_(False)


def rows() -> Iterator[Row]:
    """Prefill and generation at half of the routed compute."""
    bare, routed = wide_olmoe(), wide_olmoe()
    share = facts(bare)
    generator = torch.Generator().manual_seed(1)
    tokens, prompt = (torch.randint(1, 4096, shape, generator=generator) for shape in (PREFILL, PROMPT))
    with torch.no_grad():
        equal = native_agrees(bare, routed, tokens) and half_agrees(bare, routed, tokens)
        with policies.attach(routed, Share()) as half:
            jobs: dict[str, Callable[[Any], Any]] = {
                "prefill": lambda model: model(input_ids=tokens, use_cache=False),
                "generate": lambda model: model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False),
            }
            for name, job in jobs.items():
                measure = partial(_measure, bare, half, job, share)
                yield compare(f"checkpoint/{name} at half", bar=BAR, equal=equal, measure=measure)


def _measure(bare: Any, half: Any, job: Callable[[Any], Any], detail: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    def native(implementation: str) -> None:
        bare.set_experts_implementation(implementation)
        job(bare)

    *natives, ours = interleave([*(partial(native, name) for name in NATIVE), lambda: job(half)], seconds=20.0)
    times = {f"{name}_ms": milliseconds(seconds) for name, seconds in zip(NATIVE, natives, strict=True)}
    fraction = {"half_ms": milliseconds(ours), "compute": round(half.compute, 4), "of_native": ours / min(natives)}
    return min(natives) / ours, {**detail, **times, **fraction}


def facts(model: Any) -> dict[str, Any]:
    """Shares of the compute that explain a ratio."""
    backbone = HuggingFaceBackbone(model, seq_len=PREFILL[1])
    backbone.release()
    native = ComputeMeter(backbone.sites, PREFILL[1]).native_flops
    flops = {"native_mflops_per_token": round((native + backbone.fixed_flops) / 1e6, 2)}
    return {**flops, "routed_share": round(backbone.routable_share, 3), "distinct_experts": model.config.num_experts}


def native_agrees(bare: Any, routed: Any, tokens: Tensor) -> bool:
    """Whether our experts function under native routing gives the model's own logits."""
    with policies.attach(routed, NativeRouter()) as native:
        return agree(native(input_ids=tokens).logits, bare(input_ids=tokens).logits)


def half_agrees(bare: Any, routed: Any, tokens: Tensor) -> bool:
    """Whether skipping half of the experts equals giving them no weight in the model itself."""

    def without_weight(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, indices, weights = args
        last = weights.topk(weights.shape[1] // 2, dim=1).values[:, -1:]
        return hidden, indices, weights * (weights >= last)

    modules = [module for module in bare.modules() if hasattr(module, "_is_expert_parallel")]
    handles = [module.register_forward_pre_hook(without_weight) for module in modules]
    masked = bare(input_ids=tokens).logits
    for handle in handles:
        handle.remove()
    with policies.attach(routed, Share()) as half:
        return agree(half(input_ids=tokens).logits, masked)
