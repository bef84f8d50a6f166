"""A learned router in a model of transformers: attach it, use the model as always, detach it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_backbone.checks import require
from moe_backbone.compute import ComputeMeter
from moe_backbone.sites import Router, SiteView
from policies.hub import router_folder
from policies.portable import load_router, read_sites

if TYPE_CHECKING:
    from moe_backbone.huggingface import HuggingFaceBackbone

SEQ_LEN = 128
"""Window whose mean token says what a head costs in `RoutedModel.compute`."""


def attach(
    model: Any,
    router: str | Path | Router,
    *,
    price: float | None = None,
    cost_limit: float | None = None,
    revision: str | None = None,
) -> RoutedModel:
    """Steer a model of transformers by a router from now on, skipping the experts that it does not choose.

    The model is put into evaluation mode. Of several routers attached to one model the last steers it until it is
    detached.

    Args:
        model: Causal language model; its weights are not changed.
        router: Folder with `router.json` and `router.safetensors`, the hub id of one, or any `Router`.
        price: What one unit of compute costs, nats per native compute; for a router from a folder.
        cost_limit: Budget instead: fraction of the native compute of all routed units.
        revision: Branch, tag or commit of a hub id.

    Returns:
        The model under the router, to be called as the model itself.

    Raises:
        ValueError: If the router was made for another model, or its files are damaged, or neither or both of price and
            cost limit are given.

    Example: `attach(model, "runs/mine", price=0.1).generate(**inputs)`.
    """
    from moe_backbone.huggingface import HuggingFaceBackbone

    model_name = type(model).__name__
    require(hasattr(model, "get_input_embeddings"), f"model must be one of transformers, got {model_name}")
    training = model.training
    if not isinstance(router, str | Path):
        require(price is None and cost_limit is None, "price and cost_limit must be left out for a router of one price")
        return RoutedModel(HuggingFaceBackbone(model, seq_len=_window(model)), router, training=training)
    given = f"price={price} and cost_limit={cost_limit}"
    require((price is None) != (cost_limit is None), f"either price or cost_limit must be given, got {given}")
    folder = router_folder(router, revision)
    kinds = {site.kind for site in read_sites(folder)}
    backbone = HuggingFaceBackbone(model, seq_len=_window(model), heads=True if "heads" in kinds else None)
    try:
        learned = load_router(folder, backbone).to(backbone.device)
        priced = learned.at_cost_limit(cost_limit) if price is None else learned.at_price(price)  # type: ignore[arg-type]
    except BaseException:
        backbone.release()
        model.train(training)
        raise
    return RoutedModel(backbone, priced, training=training)


def _window(model: Any) -> int:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(SEQ_LEN, longest or SEQ_LEN)


class RoutedModel:
    """A model under a router; whatever it does not have itself is the model's.

    Args:
        backbone: The model with its routed sites.
        router: What decides.
        training: Whether the model was in training mode, where `detach` brings it back.

    Attributes:
        model: The model itself, steered as well until `detach`.
        router: What decides.

    Raises:
        ValueError: On use after `detach`, or under a router that was attached to the same model later.
    """

    def __init__(self, backbone: HuggingFaceBackbone, router: Router, *, training: bool = False) -> None:
        self._backbone, self._training = backbone, training
        self.model, self.router = backbone.model, router
        self.compensation = getattr(router, "compensation", None)
        self._meter = ComputeMeter(backbone.sites, backbone.config.seq_len)
        self._mask: Any = None
        self._handle = self.model.register_forward_pre_hook(self._look, with_kwargs=True)
        self.reset_compute()
        backbone.route_by(self)

    def _look(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Keep which tokens of the coming pass are padding."""
        self._mask = kwargs.get("attention_mask")

    def select(self, view: SiteView) -> Tensor:
        """Choose as the router does, and add up what it spends."""
        subset = self.router.select(view)
        real = self._real(subset)
        self._units[view.index] += subset[real].sum()
        self._tokens[view.index] += real.sum()
        return subset

    def _real(self, subset: Tensor) -> Tensor:
        """Tokens that are no padding, as far as the pass was told (num_tokens,), bool."""
        mask, num_tokens = self._mask, len(subset)
        if isinstance(mask, Tensor) and mask.dim() == 2 and num_tokens % len(mask) == 0:
            new = num_tokens // len(mask)
            if new <= mask.shape[1]:
                return mask[:, mask.shape[1] - new :].flatten().bool().to(subset.device)
        return torch.ones(num_tokens, dtype=torch.bool, device=subset.device)

    def reset_compute(self) -> None:
        """Begin counting anew."""
        self._units: list[Any] = [0] * len(self._backbone.sites)
        self._tokens: list[Any] = [0] * len(self._backbone.sites)

    @property
    def compute(self) -> float:
        """Units run since `attach` or `reset_compute` over those of native routing, weighted by their FLOPs.

        The router's own cost is in it, padding is not. Heads count as those of the mean token of a window of `SEQ_LEN`.
        """
        mean = torch.tensor((self._meter.seq_len - 1) / 2)
        flops = [float(self._meter.unit_flops(index, mean)) for index in range(len(self._units))]
        tokens = max(float(count) for count in self._tokens)
        spent = sum(float(units) * cost for units, cost in zip(self._units, flops, strict=True))
        spent += tokens * float(getattr(self.router, "overhead_flops", 0.0))
        return spent / max(1.0, tokens * self._meter.native_flops)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own call."""
        return self._steered(self.model)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """`generate` and everything else of the model."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._steered(self.__dict__["model"]), name)

    def _steered(self, model: Any) -> Any:
        """The model, if this router is the one that steers it."""
        steers = self._backbone.model_sites.steers
        require(steers, "router must be attached, and the last one attached to its model, got one that is not")
        return model

    def __repr__(self) -> str:
        return f"RoutedModel({self._backbone.name}, {type(self.router).__name__}, compute={self.compute:.3f})"

    def detach(self) -> Any:
        """Leave the model as it was before `attach`, and return it."""
        self._handle.remove()
        self._backbone.release()
        self.model.train(self._training)
        return self.model

    def __enter__(self) -> RoutedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()
