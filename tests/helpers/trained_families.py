"""Eight families of mixture-of-experts models and a dense one, tiny, really trained on real text, saved and loaded.

ROUTEGYM_TRAIN_SECONDS=60 trains each for a minute instead of `STEPS`; `pytest -rP` then shows how far outputs differ.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_backbone import Router, SiteView
from moe_backbone.sites import best_units

TEXT = ("tinyshakespeare", "input.txt")
HELD_OUT = 100_000
"""Last bytes of the text, which are not trained on."""
VOCABULARY, NUM_EXPERTS = 256, 8
STEPS, SEQUENCES, WINDOW = 45, 8, 64
LEARNING_RATE = 1e-2
LARGEST_LOSS = 3.3
"""Nats a byte that training must get below: the letters' own frequencies give 3.31, and equal chances 5.55."""
BALANCE = 0.05
"""Factor of the loss that keeps gates from sending all tokens to the same experts."""
ROUNDING = 1e-6
"""Difference of float32 outputs that counts as none, fraction of the largest logit."""

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LATENT = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12}
GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Mixing weights (num_tokens, num_experts) of a subset of that shape, from the gate's logits of that shape, and the
experts and mixing weights that the gate chose (num_tokens, top_k)."""


def kept(logits: Tensor, indices: Tensor, weights: Tensor, subset: Tensor) -> Tensor:
    """Softmax over all experts, whatever else runs."""
    return logits.float().softmax(1) * subset


def scaled(logits: Tensor, indices: Tensor, weights: Tensor, subset: Tensor) -> Tensor:
    """The same, times a factor of the configuration."""
    return 2.5 * kept(logits, indices, weights, subset)


def renormalised(logits: Tensor, indices: Tensor, weights: Tensor, subset: Tensor) -> Tensor:
    """Softmax over all experts, divided by what those that run have of it."""
    some = kept(logits, indices, weights, subset)
    return some / some.sum(1, keepdim=True).masked_fill(~subset.any(1, keepdim=True), 1)


def of_the_chosen(logits: Tensor, indices: Tensor, weights: Tensor, subset: Tensor) -> Tensor:
    """Softmax over the experts that run."""
    lowest = logits.float().masked_fill(~subset, -torch.inf)
    return lowest.masked_fill(~subset.any(1, keepdim=True), 0).softmax(1) * subset


def each_its_own(logits: Tensor, indices: Tensor, weights: Tensor, subset: Tensor) -> Tensor:
    """What the gate gave to each chosen expert, by a softmax for each of them (SparseMixer)."""
    return torch.zeros(subset.shape).scatter(1, indices, weights.float()) * subset


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture of transformers."""

    kind: str
    """Begin of its classes' names."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Where it differs from `SIZES`."""
    rule: Rule | None = None
    """How its documentation mixes experts; None without experts."""

    def build(self) -> Any:
        """The model with random weights."""
        import transformers

        config = getattr(transformers, f"{self.kind}Config")(**SIZES | self.settings)
        return getattr(transformers, f"{self.kind}ForCausalLM")(config)


def _sizes(count: str, top_k: int, **more: Any) -> dict[str, Any]:
    return {count: NUM_EXPERTS, "num_experts_per_tok": top_k, "router_aux_loss_coef": BALANCE, **more}


INNER = {"moe_intermediate_size": 32}
FAMILIES = {
    "mixtral": Family(kind="Mixtral", settings=_sizes("num_local_experts", 2), rule=renormalised),
    "olmoe": Family(kind="Olmoe", settings=_sizes("num_experts", 3, num_key_value_heads=4), rule=kept),
    "qwen2_moe": Family(
        kind="Qwen2Moe", settings=_sizes("num_experts", 3, shared_expert_intermediate_size=16, **INNER), rule=kept
    ),
    "qwen3_moe": Family(
        kind="Qwen3Moe", settings=_sizes("num_experts", 3, norm_topk_prob=True, head_dim=12, **INNER), rule=renormalised
    ),
    "deepseek_v2": Family(
        kind="DeepseekV2",
        settings=_sizes("n_routed_experts", 3, n_shared_experts=1, num_hidden_layers=3, **INNER, **LATENT, **GROUPS)
        | {"first_k_dense_replace": 1, "num_key_value_heads": 4},
        rule=scaled,
    ),
    "gpt_oss": Family(
        kind="GptOss", settings=_sizes("num_local_experts", 3, head_dim=12, sliding_window=8), rule=of_the_chosen
    ),
    "granitemoe": Family(
        kind="GraniteMoe",
        settings=_sizes("num_local_experts", 3, logits_scaling=0.5, residual_multiplier=0.7, attention_multiplier=0.2),
        rule=of_the_chosen,
    ),
    "phimoe": Family(kind="Phimoe", settings=_sizes("num_local_experts", 2), rule=each_its_own),
}
DENSE = {"qwen3": Family(kind="Qwen3", settings={"head_dim": 12, "intermediate_size": 64, "num_hidden_layers": 3})}
ALL = FAMILIES | DENSE


def real_text() -> Tensor | None:
    """Bytes of the text (num_bytes,), int64; None where $ROUTEGYM_DATA names no folder."""
    folder = os.environ.get("ROUTEGYM_DATA")
    if folder is None:
        return None
    return torch.frombuffer(bytearray(Path(folder, *TEXT).read_bytes()), dtype=torch.uint8).long()


@torch.enable_grad()  # a test may have switched it off
def train(model: Any, text: Tensor, seed: int = 0) -> float:
    """Train on random windows; mean loss of the last steps, nats a byte."""
    seconds = float(os.environ.get("ROUTEGYM_TRAIN_SECONDS", "0"))
    generator, started, losses = torch.Generator().manual_seed(seed), time.monotonic(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
    balanced = {"output_router_logits": True} if hasattr(model.config, "router_aux_loss_coef") else {}
    model.train()
    done = 0.0
    while done < 1:
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, 10 * done + 0.2) * (1.05 - done)
        starts = torch.randint(len(text) - WINDOW, (SEQUENCES, 1), generator=generator)
        tokens = text[starts + torch.arange(WINDOW)]
        output = model(input_ids=tokens, labels=tokens, **balanced)
        optimizer.zero_grad()
        output.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        balance = getattr(output, "aux_loss", None)
        losses.append(output.loss.item() - (0 if balance is None else BALANCE * balance.item()))
        done = (time.monotonic() - started) / seconds if seconds else len(losses) / STEPS
    model.eval()
    last = losses[-max(5, len(losses) // 20) :]
    return math.fsum(last) / len(last)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained model on disk."""

    name: str
    folder: Path
    loss: float
    """At the end of training, nats a byte."""
    text: Tensor = field(repr=False)
    """Bytes that it was not trained on, int64."""

    @property
    def family(self) -> Family:
        """What it is made of."""
        return ALL[self.name]

    def load(self, dtype: str = "float32") -> Any:
        """The model anew, loaded by its path."""
        from moe_backbone.huggingface import load_model

        return load_model(str(self.folder), dtype=dtype)

    def tokens(self, num_sequences: int = 4, seq_len: int = 24) -> Tensor:
        """Held-out text (num_sequences, seq_len), int64."""
        return self.text[: num_sequences * seq_len].view(num_sequences, seq_len)

    def tell(self, what: str, figure: float, bound: float) -> None:
        """Print a figure for `pytest -rP`."""
        print(f"{self.name:12} loss {self.loss:.3f}  {what}: {figure:.2e} (bound {bound:.1e})")


def trained(name: str, folder: Path, text: Tensor) -> Trained:
    """Train a family and save it."""
    torch.manual_seed(0)
    model = ALL[name].build()
    loss = train(model, text[:-HELD_OUT])
    model.save_pretrained(folder)
    return Trained(name=name, folder=folder, loss=loss, text=text[-HELD_OUT:])


@torch.no_grad()
def bare_logits(model: Any, tokens: Tensor, experts: str | None = None) -> Tensor:
    """What a model of transformers says by itself, with this implementation of experts, in float32."""
    if experts is not None:
        model.set_experts_implementation(experts)
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits.float()


def difference(one: Tensor, other: Tensor) -> float:
    """Largest difference, fraction of the largest logit."""
    return float((one - other).abs().max() / other.abs().max())


def own_difference(model: Any, tokens: Tensor, passes: Callable[[], Tensor] | None = None) -> float:
    """How far the implementations that transformers itself has of experts are apart: what rounding makes of a model."""
    run = passes or (lambda: bare_logits(model, tokens))
    logits = []
    for experts in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(experts)
        logits.append(run())
    return max(difference(one, other) for one in logits for other in logits)


def experts_and_gates(model: Any) -> list[tuple[nn.Module, nn.Module]]:
    """Modules of experts in running order, each with its gate."""
    found = []
    for name, module in model.named_modules():
        if type(module).__name__.endswith("Experts"):
            parent = model.get_submodule(name.rpartition(".")[0])
            found.append((module, parent.gate if hasattr(parent, "gate") else parent.router))
    return found


@contextmanager
def masked(model: Any, rule: Rule, subsets: Sequence[Tensor], *, all_experts: bool = False) -> Iterator[None]:
    """Let the model itself run all experts that its gates choose, or all there are, with weights of these subsets.

    Experts outside a subset are computed and weighted with zero: nothing is skipped, and nothing of ours runs.
    """
    handles, said = [], {}

    def listen(gate: nn.Module, args: Any, output: Any) -> None:
        said[gate] = output[0].reshape(-1, NUM_EXPERTS)

    def weigh(gate: nn.Module, subset: Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            hidden, indices, weights = args
            mixing = rule(said[gate], indices, weights, subset)
            if all_experts:
                indices = torch.arange(NUM_EXPERTS).expand(len(subset), -1)
            else:
                assert subset.sum() == subset.gather(1, indices).sum(), "a subset must lie in the gate's own choice"
            return hidden, indices, mixing.gather(1, indices).to(weights.dtype)

        return hook

    for (module, gate), subset in zip(experts_and_gates(model), subsets, strict=True):
        handles.append(gate.register_forward_hook(listen))
        handles.append(module.register_forward_pre_hook(weigh(gate, subset)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class SomeUnits:
    """Router that runs units by chance; the first and the last token run none.

    Args:
        native: Whether only units that the model itself would run.
        seed: Of the chances.
    """

    def __init__(self, *, native: bool, seed: int = 3) -> None:
        self.native = native
        self.generator = torch.Generator().manual_seed(seed)

    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units)."""
        subset = torch.rand(view.scores.shape, generator=self.generator) < 0.5
        if self.native:
            subset &= best_units(view.scores, view.site.native_units)
        subset[0] = subset[-1] = False
        return subset


class NothingAtSpaces:
    """Another router's choice, but nothing at all for a space.

    Args:
        router: The other one.
    """

    def __init__(self, router: Router) -> None:
        self.router = router

    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units)."""
        return self.router.select(view) & (view.tokens.reshape(-1, 1) != ord(" "))


def feature_router(backbone: Any, *, seed: int = 5) -> Any:
    """A `LinearRouter` with random weights, which chooses by features, scores and price."""
    from policies.linear_router import LinearRouter, RouterSpec

    router = LinearRouter(RouterSpec(hidden_size=backbone.hidden_size, sites=tuple(backbone.sites)))
    generator = torch.Generator().manual_seed(seed)
    router.weight.data.normal_(std=0.4, generator=generator)
    router.price_weight.data.normal_(std=0.05, generator=generator)
    router.price_weight.data[:, -1] -= 1.5  # dearer means fewer
    return router.requires_grad_(False)
