"""Where sequences come from: random windows, passes over a corpus, fixed text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from envs import CorpusSource, FixedSource
from moe_backbone.corpus import Split

SEED = 7
SEQ_LEN, NUM_WINDOWS = 4, 6
TEXT = Split(name="train", tokens=torch.arange(27, dtype=torch.uint8), document_ids=torch.zeros(27, dtype=torch.int64))
"""Each token is its own place; six windows with their next tokens fit, and two tokens are left over."""


def _passes() -> CorpusSource:
    return CorpusSource(TEXT, SEQ_LEN, order="passes")


def _starts(source: CorpusSource, generator: np.random.Generator, *counts: int) -> list[int]:
    drawn = [source.draw(count, generator) for count in counts]
    for tokens, targets in drawn:
        assert torch.equal(tokens, tokens[:, :1] + torch.arange(SEQ_LEN))
        assert torch.equal(targets, tokens + 1)
    return torch.cat([tokens[:, 0] for tokens, _ in drawn]).tolist()


def test_random_windows_are_those_of_the_split() -> None:
    """The default order draws what the split draws, from the same generator, and nothing more."""
    ours, theirs = np.random.default_rng(SEED), np.random.default_rng(SEED)
    source = CorpusSource(TEXT, SEQ_LEN)
    for _ in range(3):
        drawn: tuple[Tensor, Tensor] = source.draw(5, ours)
        assert all(torch.equal(*pair) for pair in zip(drawn, TEXT.sample(5, SEQ_LEN, theirs), strict=True))
    assert ours.bit_generator.state == theirs.bit_generator.state


def test_a_pass_takes_every_window_once_in_a_new_order() -> None:
    """However many are drawn at a time; the next pass is shuffled anew, and the same seed repeats both."""
    starts = _starts(_passes(), np.random.default_rng(SEED), 4, 4, 1, 3)
    first, second = starts[:NUM_WINDOWS], starts[NUM_WINDOWS:]
    grid = [SEQ_LEN * window for window in range(NUM_WINDOWS)]
    assert sorted(first) == sorted(second) == grid
    assert len({tuple(first), tuple(second), tuple(grid)}) == 3
    assert _starts(_passes(), np.random.default_rng(SEED), 12) == starts


def test_more_windows_than_there_are_take_several_passes() -> None:
    """Two whole passes and a half in one draw."""
    starts = _starts(_passes(), np.random.default_rng(SEED), 15)
    assert sorted(starts[:6]) == sorted(starts[6:12])
    assert len(set(starts[12:])) == 3


def test_another_generator_starts_a_new_pass() -> None:
    """So a reset with a seed repeats itself, wherever the pass before it was left."""
    source = _passes()
    first = _starts(source, np.random.default_rng(SEED), 4)
    assert _starts(source, np.random.default_rng(SEED), 4) == first


def test_fixed_source_repeats_its_sequences_in_order() -> None:
    """From the start again when they run out, whatever the generator."""
    tokens = torch.arange(6).view(3, 2)
    source = FixedSource(tokens, tokens + 1)
    drawn, targets = source.draw(5, np.random.default_rng(SEED))
    assert drawn.tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]]
    assert targets.tolist() == (drawn + 1).tolist()
    assert source.seq_len == 2


def test_unknown_order_is_refused() -> None:
    """The message gives name, rule and value."""
    with pytest.raises(ValueError, match="order must be one of random, passes, got 'sorted'"):
        CorpusSource(TEXT, SEQ_LEN, order="sorted")  # type: ignore[arg-type]
