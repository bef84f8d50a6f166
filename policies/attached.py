"""A learned router in a model of transformers: attach it, use the model as always, detach it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_backbone.checks import require
from moe_backbone.compute import ComputeMeter
from moe_backbone.sites import Router, SiteView
from policies.hub import router_folder
from policies.portable import load_router, read_sites

if TYPE_CHECKING:
    from moe_backbone.huggingface import HuggingFaceBackbone


def attach(
    model: Any,
    router: str | Path | Router,
    *,
    price: float | None = None,
    cost_limit: float | None = None,
    revision: str | None = None,
) -> RoutedModel:
    """Steer a model of transformers by a router from now on, skipping the experts that it does not choose.

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
        return RoutedModel(HuggingFaceBackbone(model, seq_len=2), router, training=training)
    given = f"price={price} and cost_limit={cost_limit}"
    require((price is None) != (cost_limit is None), f"either price or cost_limit must be given, got {given}")
    folder = router_folder(router, revision)
    kinds = {site.kind for site in read_sites(folder)}
    backbone = HuggingFaceBackbone(model, seq_len=2, heads="heads" in kinds)
    try:
        learned = load_router(folder, backbone).to(backbone.device)
        priced = learned.at_cost_limit(cost_limit) if price is None else learned.at_price(price)  # type: ignore[arg-type]
    except BaseException:
        backbone.release()
        model.train(training)
        raise
    return RoutedModel(backbone, priced, training=training)


class RoutedModel:
    """A model under a router; whatever it does not have itself is the model's.

    Args:
        backbone: The model with its routed sites.
        router: What decides.
        training: Whether the model was in training mode, where `detach` brings it back.

    Attributes:
        model: The model itself, steered as well until `detach`.
        router: What decides.
    """

    def __init__(self, backbone: HuggingFaceBackbone, router: Router, *, training: bool = False) -> None:
        self.model, self.router = backbone.model, router
        self._backbone, self._training = backbone, training
        self._meter = ComputeMeter(backbone.sites, 1)
        self.reset_compute()
        backbone.route_by(self._Counted(self))

    class _Counted:
        """The router, with what it spends added up."""

        def __init__(self, routed: RoutedModel) -> None:
            self.routed = routed
            self.compensation = getattr(routed.router, "compensation", None)

        def select(self, view: SiteView) -> torch.Tensor:
            subset = self.routed.router.select(view)
            self.routed._units[view.index] += subset.sum()
            self.routed._tokens[view.index] += len(subset)
            return subset

    def reset_compute(self) -> None:
        """Begin counting anew."""
        self._units: list[Any] = [0] * len(self._backbone.sites)
        self._tokens = [0] * len(self._backbone.sites)

    @property
    def compute(self) -> float:
        """Units run since `attach` or `reset_compute` over those of native routing, weighted by their FLOPs.

        The router's own cost is in it; heads count alike wherever their token stands.
        """
        spent = sum(
            float(units) * float(self._meter.unit_flops(index, torch.tensor(0)))
            for index, units in enumerate(self._units)
        )
        spent += max(self._tokens) * float(getattr(self.router, "overhead_flops", 0.0))
        return spent / max(1.0, max(self._tokens) * self._meter.native_flops)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own call."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """`generate` and everything else of the model."""
        return getattr(self.model, name)

    def detach(self) -> Any:
        """Leave the model as it was before `attach`, and return it."""
        self._backbone.release()
        self.model.train(self._training)
        return self.model

    def __enter__(self) -> RoutedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()
