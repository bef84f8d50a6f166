"""Fixed routers with constants in place of what they skip."""

from __future__ import annotations

import pytest
import torch

from evaluation import Evaluator
from moe_backbone import MoETransformer, NativeRouter, token_divergence
from moe_backbone.corpus import Corpus
from policies.baselines import TopK
from policies.compensated import CompensatedRouter, fit_compensation


def divergence(backbone: MoETransformer, router: object, tokens: torch.Tensor) -> float:
    native, _ = backbone.run(tokens, NativeRouter())
    return token_divergence(native, backbone.run(tokens, router)[0]).mean().item()


def test_constants_bring_a_router_closer_to_native(tiny_backbone: MoETransformer) -> None:
    train, other = torch.randint(256, (32, 16)), torch.randint(256, (32, 16))
    routers = [TopK(k=0), TopK(k=1)]
    compensation = fit_compensation(tiny_backbone, routers, train, steps=60, progress=False)
    for router in routers:
        before = divergence(tiny_backbone, router, other)
        assert divergence(tiny_backbone, CompensatedRouter(router, compensation), other) < before


def test_its_cost_is_counted(tiny_backbone: MoETransformer, tiny_corpus: Corpus) -> None:
    tokens = tiny_corpus.train.windows(16, 256)[0]
    compensation = fit_compensation(tiny_backbone, [TopK(k=1)], tokens, steps=1, progress=False)
    evaluator = Evaluator(tiny_backbone, tiny_corpus.test, max_tokens=256)
    plain = evaluator.score("top-k", TopK(k=1), setting={})
    compensated = evaluator.score("top-k+compensation", CompensatedRouter(TopK(k=1), compensation), setting={})
    added = compensation.flops / evaluator._meter.native_flops
    assert compensated.compute == pytest.approx(plain.compute + added)
    assert compensated.router_overhead == pytest.approx(added)


@pytest.mark.parametrize(("routers", "windows", "message"), [([], 1, "routers must"), ([TopK(k=1)], 0, "tokens must")])
def test_nothing_to_fit_on_is_refused(tiny_backbone: MoETransformer, routers: list, windows: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_compensation(tiny_backbone, routers, torch.zeros(windows, 16, dtype=torch.long))
