"""The comparison with nanoGPT: the same cut of the text, and as many active parameters."""

from pathlib import Path

import torch

from benchmarks.nanogpt import CPU, GPU, LOOKED_AT, active_parameters, read_split


def test_active_parameters_by_hand() -> None:
    """The docstring's example; and no setting has more than the dense model."""
    assert active_parameters(CPU.backbone) == (786_432, 786_432)
    ours, dense = active_parameters(GPU.backbone)
    assert 0.99 * dense < ours <= dense


def test_cuts_where_nanogpt_cuts(tmp_path: Path) -> None:
    """The first 90 % train, the rest is scored, and what chooses weights lies in training text."""
    text = "".join(chr(97 + place % 26) for place in range(100_001))
    (tmp_path / "input.txt").write_text(text)
    corpus = read_split(tmp_path / "input.txt")
    assert bytes(corpus.train.tokens.tolist()).decode() == text[:90_000]
    assert bytes(corpus.test.tokens.tolist()).decode() == text[90_000:]
    assert torch.equal(corpus.validation.tokens, corpus.train.tokens[-LOOKED_AT:])
