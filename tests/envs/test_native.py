"""Native results that are kept change how often the backbone runs, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from envs import CorpusSource, EnvConfig, RoutingEnv, RoutingMDP, RoutingVectorEnv, TokenSource
from envs.native import NativeReference
from moe_backbone import MoETransformer, NativeRouter
from moe_backbone.corpus import Split
from moe_backbone.sites import Router

SEED = 7
SEQ_LEN, VOCAB, NUM_WINDOWS, NUM_SEQUENCES = 8, 32, 4, 2
NUM_SITES = 4
LOGIT_BYTES = SEQ_LEN * VOCAB * 4
"""Of one window."""
CACHED = EnvConfig(native_cache_mb=1)


@pytest.fixture
def passes() -> CorpusSource:
    """Passes over four windows of random text."""
    tokens = torch.randint(VOCAB, (NUM_WINDOWS * SEQ_LEN + 1,)).byte()
    return CorpusSource(Split(name="train", tokens=tokens, document_ids=tokens.long()), SEQ_LEN, order="passes")


@pytest.fixture
def native_runs(backbone: MoETransformer, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Tokens of every native run, in order; each sequence runs alone, so a token has the same bits in every batch."""
    runs: list[Tensor] = []
    run = backbone.run

    def counted(tokens: Tensor, router: Router) -> tuple[Tensor, list[Tensor]]:
        runs.append(tokens)
        return torch.cat([run(row.unsqueeze(0), router)[0] for row in tokens]), []

    monkeypatch.setattr(backbone, "run", counted)
    return runs


def _walk(env: Any, num_resets: int) -> list[Any]:
    """Everything the door hands out over some episodes of drawn actions."""
    env.action_space.seed(SEED)
    results = []
    for episode in range(num_resets):
        results.append(env.reset(seed=SEED if episode == 0 else None))
        results += [env.step(env.action_space.sample()) for _ in range(NUM_SITES)]
    return results


@pytest.mark.parametrize("door", ["single", "vector"])
def test_rewards_are_the_same_with_and_without(
    backbone: MoETransformer, passes: CorpusSource, native_runs: list[Tensor], door: str
) -> None:
    """To the bit, over three passes, the last two of which run nothing natively."""

    def make(config: EnvConfig) -> Any:
        if door == "single":
            return RoutingEnv(backbone, passes, config)
        return RoutingVectorEnv(NUM_SEQUENCES * SEQ_LEN, backbone, passes, config)

    resets = 3 * NUM_WINDOWS * SEQ_LEN if door == "single" else 3 * NUM_WINDOWS // NUM_SEQUENCES
    plain = _walk(make(EnvConfig()), resets)
    without = len(native_runs)
    cached = _walk(make(CACHED), resets)
    np.testing.assert_equal(cached, plain)
    assert sum(len(tokens) for tokens in native_runs[without:]) == NUM_WINDOWS
    assert sum(len(tokens) for tokens in native_runs[:without]) >= 3 * NUM_WINDOWS


def test_only_new_texts_run(backbone: MoETransformer, native_runs: list[Tensor]) -> None:
    """Known ones do not, nor one text twice; results lie in the order of the question, as if all had run."""
    texts = torch.randint(VOCAB, (3, SEQ_LEN))
    reference = NativeReference(backbone, 3 * LOGIT_BYTES)
    reference.logits(texts[:1])
    mixed = texts[[2, 0, 1, 2, 1]]
    logits = reference.logits(mixed)
    assert [tokens.tolist() for tokens in native_runs] == [texts[:1].tolist(), texts[[2, 1]].tolist()]
    assert torch.equal(logits, backbone.run(mixed, NativeRouter())[0])


def test_the_first_texts_stay_until_memory_is_full(backbone: MoETransformer, native_runs: list[Tensor]) -> None:
    """Room for two of four windows: each pass over all runs the other two again, never all four."""
    texts = torch.randint(VOCAB, (NUM_WINDOWS, SEQ_LEN))
    reference = NativeReference(backbone, 3 * LOGIT_BYTES - 1)
    for _ in range(3):
        for text in texts:
            reference.logits(text.unsqueeze(0))
    assert [tokens.tolist() for tokens in native_runs] == [[text.tolist()] for text in (*texts, *texts[2:], *texts[2:])]


def test_nothing_is_kept_by_default(backbone: MoETransformer, source: TokenSource, native_runs: list[Tensor]) -> None:
    """Random windows hardly ever come again, so the default holds no memory for them."""
    mdp = RoutingMDP(backbone, source, EnvConfig())
    for _ in range(2):
        mdp.draw(np.random.default_rng(SEED))
    assert len(native_runs) == 2
    with pytest.raises(ValueError, match="native_cache_mb must be at least 0, got -1"):
        EnvConfig(native_cache_mb=-1)


def test_what_is_kept_cannot_be_changed_from_outside(backbone: MoETransformer) -> None:
    """A caller that writes into the result does not reach the memory."""
    texts = torch.randint(VOCAB, (2, SEQ_LEN))
    reference = NativeReference(backbone, 2 * LOGIT_BYTES)
    expected = reference.logits(texts).clone()
    reference.logits(texts).zero_()
    assert torch.equal(reference.logits(texts), expected)
