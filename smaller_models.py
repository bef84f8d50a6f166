"""The honest alternative to routing: smaller backbones, trained as long, under native routing.

Each is a row of the evaluation table in absolute loss, at its own compute: its routable FLOPs over those of the main
backbone. Some of them save keys, values and other fixed parts as well; `compute_total` has those on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from evaluation import Evaluator, Point
from moe_backbone import BackboneConfig, ComputeMeter, fixed_flops
from moe_backbone.compute import transformer_sites
from moe_backbone.corpus import Corpus
from moe_backbone.pretrain import PretrainConfig, load_or_train
from moe_backbone.sites import HeadMeaning

FAMILY = "smaller-native"
"""Name of the rows."""


@dataclass(frozen=True, kw_only=True)
class SmallerModel:
    """A smaller backbone and what sets it apart."""

    setting: dict[str, int]
    """Fields that differ from the main backbone's."""
    config: BackboneConfig


def smaller_models(config: BackboneConfig) -> list[SmallerModel]:
    """A half and a quarter of the experts a token or of their width; three quarters and half of the heads.

    Heads keep their size, so that fewer heads make every token narrower.

    Args:
        config: The main backbone.

    Returns:
        Distinct backbones, none as large as `config`.

    Example: top_k 4, intermediate_size 96 and 8 heads of width 16 give top_k 2 and 1, intermediate_size 48 and 24,
        hidden_size 96 with 6 heads and 64 with 4.
    """
    changes: list[dict[str, int]] = []
    for part in (2, 4):
        changes += [{"top_k": max(1, config.top_k // part)}]
        changes += [{"intermediate_size": max(1, config.intermediate_size // part)}]
    for share in (0.75, 0.5):
        num_heads = max(1, round(share * config.num_heads))
        changes += [{"num_heads": num_heads, "hidden_size": num_heads * config.head_size}]
    smaller: dict[BackboneConfig, SmallerModel] = {}
    for setting in changes:
        other = replace(config, **setting)  # type: ignore[arg-type]
        if other != config:
            smaller.setdefault(other, SmallerModel(setting=setting, config=other))
    return list(smaller.values())


def score_smaller_model(
    model: SmallerModel, evaluator: Evaluator, corpus: Corpus, pretrain: PretrainConfig, *, device: str = "cpu"
) -> Point:
    """Train a smaller backbone if it is not in the cache, and score it on the windows of `evaluator`.

    Args:
        model: From `smaller_models`.
        evaluator: Of the main backbone, whose native routing is 1.0 of compute and the native of all differences.
        corpus: What the main backbone was trained on.
        pretrain: How the main backbone was trained; the smaller one is trained the same way and as long.
        device: Where to train and score.

    Returns:
        The smaller model's native routing; its usage and units are those of its own sites.
    """
    main: BackboneConfig = evaluator.backbone.config
    meaning: HeadMeaning = evaluator.backbone.head_meaning
    backbone = load_or_train(corpus, model.config, pretrain, device=device)
    backbone.head_meaning = meaning
    own = Evaluator(backbone, evaluator.split, max_tokens=evaluator.num_tokens, device=device).native
    compute, compute_total = relative_compute(model.config, main, meaning)
    cache = None if own.cache is None else model.config.hidden_size / main.hidden_size
    return replace(
        own,
        router=FAMILY,
        setting=dict(model.setting),
        seed=pretrain.seed,
        compute=compute,
        compute_total=compute_total,
        cache=cache,
        native_documents=evaluator.native.documents,
    )


def relative_compute(
    config: BackboneConfig, main: BackboneConfig, head_meaning: HeadMeaning = "query"
) -> tuple[float, float]:
    """FLOPs of a native token of one backbone over those of another: routable ones, and all with the fixed parts."""
    routable, main_routable = (
        ComputeMeter(transformer_sites(each, head_meaning), each.seq_len).native_flops for each in (config, main)
    )
    total = routable + fixed_flops(config, head_meaning)
    main_total = main_routable + fixed_flops(main, head_meaning)
    return routable / main_routable, total / main_total
