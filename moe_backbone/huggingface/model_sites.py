"""Finds the routed sites of a checkpoint by running it once, and stands in them while it is steered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_backbone.checks import require
from moe_backbone.huggingface.experts import ExpertSite, switch_experts
from moe_backbone.huggingface.heads import attend, switched
from moe_backbone.huggingface.passes import Decision, ForwardPass, current_pass
from moe_backbone.kernels.rows import record_rows, uncounted
from moe_backbone.sites import RoutingSite

IMPLEMENTATION = "routegym"
"""Name of our experts and attention functions among those of transformers."""
PROBE_SHAPE = (2, 24)
"""Sequences and tokens of the pass that finds the sites."""
OWNER = "_routegym_sites"
"""Attribute of a steered model's modules by which our functions find its sites; a table of them here would keep every
model in memory."""


@cache
def register() -> None:
    """Make our functions known to transformers, once."""
    from transformers import AttentionInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)
    AttentionInterface.register(IMPLEMENTATION, _attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def _experts_forward(module: nn.Module, hidden: Tensor, indices: Tensor, weights: Tensor, **_: Any) -> Tensor:
    return getattr(module, OWNER).experts_forward(module, hidden, indices, weights)


def _attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **rest: Any
) -> Any:
    return getattr(module, OWNER).attention_forward(module, query, key, value, attention_mask, **rest)


def _sdpa(*args: Any, **rest: Any) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(*args, **rest)


class ModelSites:
    """The routed sites of one model in running order, found by structure: whatever calls our functions.

    Args:
        model: A causal language model of transformers, in evaluation mode; its weights are not changed.
        heads: Whether attention heads are sites too; None for only where there are no experts.

    Attributes:
        sites: In running order; a unit's FLOPs are those of the products that are really skipped.
        default: The pass that decides where no other is under way; None for native routing.

    Raises:
        ValueError: If the model has no site, or has one that cannot be steered.
    """

    def __init__(self, model: Any, heads: bool | None = None) -> None:
        register()
        self.model = model
        self.default: ForwardPass | None = None
        self.sites: tuple[RoutingSite, ...] = ()
        self._experts: dict[nn.Module, ExpertSite] = {}
        self._index: dict[nn.Module, int] = {}
        self._handles: list[Any] = []
        self._inputs: dict[nn.Module, Tensor] = {}
        self._after: dict[nn.Module, Any] = {}
        self._width = 0
        self._probing: list[nn.Module] | None = []
        self._found: list[tuple[nn.Module, RoutingSite, int]] = []
        self._install(experts=True, heads=heads is not False)
        try:
            self._probe()
        except BaseException:
            self.release()
            raise
        has_experts = any(site.kind == "experts" for _, site, _ in self._found)
        keeps_heads = heads or (heads is None and not has_experts)
        found = [part for part in self._found if keeps_heads or part[1].kind == "experts"]
        if not found:
            self.release()
        what = "experts" if heads is False else "experts or attention heads"
        require(bool(found), f"model must have {what} that transformers lets others run, got {type(model).__name__}")
        self._width = max(width for *_, width in found)
        self.sites = tuple(site for _, site, _ in found)
        self._index = {module: index for index, (module, *_) in enumerate(found)}
        if not keeps_heads:
            self._restore_attention()
        for module, site, _ in found:
            if site.kind == "heads":
                self._handles.append(module.register_forward_hook(self._add_constants))

    @property
    def steers(self) -> bool:
        """Whether the model asks here: not after `release`, nor while another one stands on top."""
        return vars(self.model).get(OWNER) is self

    @property
    def hidden_size(self) -> int:
        """Width of the features of the widest site; those of others are filled up with zeros."""
        return self._width

    def _implementations(self) -> tuple[Any, Any]:
        model = self.model
        experts = model.get_experts_implementation() if hasattr(model, "get_experts_implementation") else None
        return experts, model.config._attn_implementation

    def _install(self, *, experts: bool, heads: bool) -> None:
        """Put our functions into the model, on top of others that may stand there."""
        self._before, self._below = self._implementations(), vars(self.model).get(OWNER)
        for module in self.model.modules():
            setattr(module, OWNER, self)
        if experts and self._before[0] is not None:
            self.model.set_experts_implementation(IMPLEMENTATION)
        if heads and self._before[1] == "sdpa":
            self.model.set_attn_implementation(IMPLEMENTATION)

    def release(self) -> None:
        """Leave the model as it was found."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._inputs = [], {}
        top = above = vars(self.model).get(OWNER)
        while above is not None and above is not self and above._below is not self:
            above = above._below
        if above is None:  # released before
            return
        if top is not self:  # others stay on top
            above._below, above._before = self._below, self._before
            return
        for module in self.model.modules():
            if self._below is None:
                delattr(module, OWNER)
            else:
                setattr(module, OWNER, self._below)
        if self._before[0] is not None:
            self.model.set_experts_implementation(self._before[0])
        self._restore_attention()

    def _restore_attention(self) -> None:
        if self.model.config._attn_implementation == IMPLEMENTATION:
            self.model.set_attn_implementation(self._before[1])

    @torch.no_grad()
    def _probe(self) -> None:
        """Run random tokens natively, and note which modules are sites and how their gates choose."""
        self._hook_gates()
        for module in self.model.modules():
            if hasattr(module, "layer_idx") and (hasattr(module, "o_proj") or hasattr(module, "num_key_value_groups")):
                self._hook_attention(module)
        generator = torch.Generator().manual_seed(0)
        config = self.model.config.get_text_config()
        tokens = torch.randint(config.vocab_size, PROBE_SHAPE, generator=generator)
        device = self.model.get_input_embeddings().weight.device
        with uncounted():
            self.model(input_ids=tokens.to(device), use_cache=False)
        self._probing = None

    def _hook_attention(self, module: nn.Module) -> None:
        self._handles.append(module.register_forward_pre_hook(self._keep_input, with_kwargs=True))

    def _keep_input(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._inputs[module] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    def _hook_gates(self) -> None:
        """Listen to whatever beside a module of experts may be their gate."""
        for parent in self.model.modules():
            for experts in parent.children():
                if not hasattr(experts, "_is_expert_parallel"):
                    continue
                for gate in parent.children():
                    if gate is not experts and not hasattr(gate, "_is_expert_parallel"):
                        self._handles.append(gate.register_forward_hook(self._listen_for(experts)))

    def _listen_for(self, experts: nn.Module) -> Any:
        def listen(gate: nn.Module, args: Any, output: Any) -> None:
            logits = output[0] if isinstance(output, tuple) else output
            count = getattr(experts, "num_experts", 0)
            # a gate may have one class more, for no expert at all
            if isinstance(logits, Tensor) and logits.is_floating_point() and logits.shape[-1] in (count, count + 1):
                self._site_of(experts).logits = logits[..., :count].detach()

        return listen

    def _site_of(self, module: nn.Module) -> ExpertSite:
        if module not in self._experts:
            self._experts[module] = ExpertSite(module)
        return self._experts[module]

    def _layer_of(self, module: nn.Module) -> int:
        """Number of the layer that a module lies in: the first number in its name."""
        name = next(name for name, other in self.model.named_modules() if other is module)
        return next((int(part) for part in name.split(".") if part.isdigit()), 0)

    def _note(self, module: nn.Module, kind: Any, width: int, **costs: Any) -> None:
        if self._probing is not None and module not in self._probing:
            self._probing.append(module)
            site = RoutingSite(kind=kind, layer=self._layer_of(module), **costs)
            self._found.append((module, site, width))

    def _decide(self, module: nn.Module, features: Tensor, scores: Tensor) -> Decision | None:
        """What the pass under way wants at a site; None for native routing."""
        index = self._index.get(module)
        current = current_pass.get() or self.default
        if index is None or current is None:
            return None
        features = F.pad(features, (0, self._width - features.shape[1]))
        return current.ask(index, self.sites[index], features, scores)

    def _constants(self, module: nn.Module, decision: Decision) -> Any:
        return None if decision.compensation is None else decision.compensation[self._index[module]]

    def experts_forward(self, module: nn.Module, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Our experts function: any subset, its skipped experts not touched.

        Args:
            module: Experts.
            hidden: Rows (num_tokens, hidden_size).
            indices: What the gate chose (num_tokens, top_k), int64.
            weights: Its mixing weights, same shape.
        """
        site, rows = self._site_of(module), hidden.reshape(-1, hidden.shape[-1])
        indices, weights = indices.reshape(len(rows), -1), weights.reshape(len(rows), -1)
        if self._probing is not None:
            site.learn_rule(indices, weights)
            top_k, flops = indices.shape[1], site.unit_flops
            costs = {"num_units": site.num_experts, "native_units": top_k, "unit_flops": flops}
            self._note(module, "experts", rows.shape[1], **costs)
        gate = site.read(indices, weights)
        decision = self._decide(module, rows, gate.scores)
        subset = gate.native if decision is None else decision.subset.to(rows.device)
        update = site.run(rows, site.weights(gate, subset), subset)
        if decision is not None:
            constants = self._constants(module, decision)
            if constants is not None:
                update = constants(update.float(), subset.sum(1)).to(update.dtype)
            if decision.switch is not None:
                update = update + switch_experts(site, rows, gate, subset, decision.switch, constants)
        return update.view_as(hidden)

    def attention_forward(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **rest: Any
    ) -> tuple[Tensor, None]:
        """Our attention function: heads that a token does not use are not attended with, arguments as transformers'."""
        num_sequences, num_heads, num_queries, _ = query.shape
        if self._probing is not None and module in self._inputs and rest.get("s_aux") is None:
            costs = {"num_units": num_heads, "native_units": num_heads, "unit_flops": 0}
            costs["unit_flops_per_key"] = 2 * (query.shape[3] + value.shape[3])
            self._note(module, "heads", self._inputs[module].shape[-1], **costs)
        features = self._inputs.pop(module, None)
        decision = None
        if features is not None:
            features = features.reshape(-1, features.shape[-1])
            decision = self._decide(module, features, features.new_zeros(len(features), num_heads))
        if decision is None:
            return self._all_heads(module, query, key, value, mask, **rest), None
        self._after[module] = decision
        subset = decision.subset.to(query.device).view(num_sequences, num_queries, num_heads)
        if torch.is_grad_enabled() or subset.all():
            mixed = self._all_heads(module, query, key, value, mask, **rest)
            switch = None if decision.switch is None else decision.switch.view_as(subset)
            return switched(mixed, subset, switch), None
        scaling = rest.get("scaling") or query.shape[3] ** -0.5
        return attend(query, key, value, mask, scaling, subset), None

    def _all_heads(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **rest: Any) -> Tensor:
        if module in self._index:
            record_rows("heads", query.shape[0] * query.shape[1] * query.shape[2])
        return _sdpa(module, query, key, value, mask, **rest)[0]

    def _add_constants(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Add the constants of skipped heads behind the output projection."""
        decision = self._after.pop(module, None)
        constants = None if decision is None else self._constants(module, decision)
        if decision is None or constants is None:
            return output
        update, *others = output if isinstance(output, tuple) else (output,)
        on: Tensor = decision.subset.float()
        if decision.switch is not None:
            on = on + decision.switch - decision.switch.detach()
        added = constants(update.flatten(0, 1).float(), on.to(update.device)).to(update.dtype).view_as(update)
        return (added, *others) if isinstance(output, tuple) else added


@contextmanager
def passing(forward_pass: ForwardPass) -> Iterator[ForwardPass]:
    """Let this pass decide meanwhile."""
    token = current_pass.set(forward_pass)
    try:
        yield forward_pass
    finally:
        current_pass.reset(token)
