"""A checkpoint of transformers is trained on, on a mixture; LoRA and IA3 are peft's."""

from __future__ import annotations

import importlib.util
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moe_backbone.checks import require
from moe_backbone.continual import Continual
from moe_backbone.corpus import Split
from moe_backbone.huggingface.loading import require_transformers
from moe_backbone.pretrain import PretrainConfig
from moe_backbone.quality import token_log_likelihood
from moe_backbone.tuning import LOW_RANK_SCALE, TuningConfig, train_only

EXTRA = "pip install -c constraints.txt -e '.[finetune]'"
RATE = 0.1
"""Factor of the learning rates of a backbone of our own: a checkpoint is larger and has seen more text."""
GATES = ("gate", "router")
"""Ends of names of linear layers that choose experts; LoRA leaves them alone."""
KEYS_VALUES = ("k_proj", "v_proj", "kv_b_proj")
INNER = ("down_proj",)


def require_peft() -> None:
    """Refuse to go on without the libraries of the extra.

    Raises:
        ValueError: Names the extra.
    """
    require_transformers()
    missing = importlib.util.find_spec("peft") is None
    require(not missing, f"methods lora and ia3 must have the extra finetune installed ({EXTRA}), got no peft")


def begin_checkpoint_tuning(model: Any, tuning: TuningConfig) -> Any:
    """Freeze a model but for what the method trains, which is added where it is new.

    Returns:
        The model, wrapped by peft for `lora` and `ia3`.

    Raises:
        ValueError: If the model has nothing that the method trains, or peft is needed and is not there.
    """
    if tuning.method in ("lora", "ia3"):
        require_peft()
        from peft import get_peft_model

        return get_peft_model(model, _low_rank(model, tuning.rank) if tuning.method == "lora" else _factors(model))
    norms = tuple(f"{name}." for name, module in model.named_modules() if "norm" in type(module).__name__.lower())
    top = _top(model, tuning.top_layers) if tuning.method == "top_layers" else ()
    train_only(model, tuning.method, norms=norms, top=top, owner="the checkpoint has")
    return model


def _low_rank(model: Any, rank: int) -> Any:
    """Every linear layer but gates and the output head, and experts that are stacked in one parameter."""
    from peft import LoraConfig

    linear = [name for name in _linear(model) if not name.endswith(GATES)]
    stacked = [name for name, weight in model.named_parameters() if weight.dim() == 3 and "experts" in name]
    scale = round(LOW_RANK_SCALE * rank)
    return LoraConfig(r=rank, lora_alpha=scale, target_modules=linear, target_parameters=stacked or None)


def _factors(model: Any) -> Any:
    """Keys, values and inner activations of dense sublayers; stacked experts are no layers that peft could scale."""
    from peft import IA3Config

    found = {name: name.rpartition(".")[2] for name in _linear(model)}
    inner = [name for name, last in found.items() if last in INNER]
    outer = [name for name, last in found.items() if last in KEYS_VALUES]
    require(bool(outer), f"method ia3 must find layers called {', '.join(KEYS_VALUES)}, got none")
    return IA3Config(target_modules=outer + inner, feedforward_modules=inner)


def _linear(model: Any) -> list[str]:
    head = model.get_output_embeddings()
    return [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and part is not head]


def _top(model: Any, layers: int) -> tuple[str, ...]:
    """Beginnings of the names of all weights in the last layers and behind them; a tied output head is no such."""
    base, inside = model.base_model, f"{model.base_model_prefix}."
    stack = getattr(base, "layers", None)
    require(isinstance(stack, nn.ModuleList), f"method top_layers must find layers in {type(base).__name__}, got none")
    depth = len(base.layers)
    require(layers <= depth, f"top_layers must be at most {depth}, got {layers}")
    last = [f"{inside}{name}." for name, _ in base.named_children() if "norm" in name]
    head, tied = model.get_output_embeddings(), model.config.get_text_config().tie_word_embeddings
    names = [] if tied else [f"{name}." for name, part in model.named_modules() if part is head]
    return *(f"{inside}layers.{layer}." for layer in range(depth - layers, depth)), *last, *names


class CheckpointContinual(Continual):
    """More training of a checkpoint on a mixture; see `Continual`.

    Args:
        mixture: Text in the checkpoint's tokens.
        start: Causal language model of transformers, in evaluation mode; it is changed.
        tuning: What learns, and how; its learning rate, if it is the method's own, is divided by ten.
        device: Where the model is.
        partial: File to go on from if it exists.
        seq_len: Tokens of a window.
        max_tokens: Test tokens of each corpus.
    """

    def _settings(self) -> PretrainConfig:
        training = self.tuning.training
        if self.tuning.learning_rate is None:
            training = replace(training, learning_rate=RATE * training.learning_rate)
        return training

    def _kept(self, start: Any) -> Any:
        return deepcopy(start)

    def _logits(self, model: Any, tokens: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
        return logits.float()

    def _adapt(self, start: Any) -> Any:
        return begin_checkpoint_tuning(start, self.tuning)

    def _loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """What predicting text has, and the checkpoint's own balance loss where it has one, by its own weight."""
        weight = getattr(self.text_config, "router_aux_loss_coef", None)
        more = {"output_router_logits": True} if weight else {}
        output = self.backbone(input_ids=tokens, use_cache=False, **more)
        loss = self._text_loss(output.logits.float(), tokens, targets)
        balance = getattr(output, "aux_loss", None)
        return loss if balance is None or not weight else loss + weight * balance

    @property
    def text_config(self) -> Any:
        """Of the checkpoint."""
        return self.backbone.config.get_text_config()

    @torch.no_grad()
    def _loss_on(self, model: Any, split: Split, max_tokens: int) -> float:
        tokens, targets, _ = split.windows(self.seq_len, max_tokens)
        losses = []
        for some, following in zip(tokens.split(16), targets.split(16), strict=True):
            logits = self._logits(model, some.to(self.device))
            losses.append(-token_log_likelihood(logits, following.to(self.device)))
        return torch.cat(losses).mean().item()

    def _merged(self) -> Any:
        model = self.backbone
        if hasattr(model, "merge_and_unload"):
            model = model.merge_and_unload()
        return model.requires_grad_(False).eval()
