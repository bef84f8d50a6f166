"""Corpora are drawn sample by sample, by ratios that may move, or by size."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_backbone.mixture import load_mixture, parse_part

SEQ_LEN = 16
LETTERS, DIGITS = range(ord("a"), ord("z") + 1), range(ord("0"), ord("9") + 1)


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    """Twenty documents of letters, and twenty of digits, which are a quarter as long; no window mixes them up."""
    folders = tmp_path / "letters", tmp_path / "digits"
    generator = np.random.default_rng(0)
    for folder, symbols, length in zip(folders, (LETTERS, DIGITS), (800, 200), strict=True):
        folder.mkdir()
        for number in range(20):
            text = bytes(generator.choice(symbols, size=length - 1).tolist())
            (folder / f"{number}.txt").write_bytes(text)
    return folders


def _digit_share(tokens: torch.Tensor) -> float:
    digits = ((tokens >= DIGITS.start) & (tokens < DIGITS.stop)).any(1)
    letters = ((tokens >= LETTERS.start) & (tokens < LETTERS.stop)).any(1)
    assert not (digits & letters).any(), "a sample has one corpus"
    return digits.float().mean().item()


def test_every_sample_draws_its_corpus_by_the_ratios_of_the_step(texts: tuple[Path, Path]) -> None:
    """Of any scale, and moving linearly from the first step to the last; targets are the next tokens."""
    mixture = load_mixture([f"letters={texts[0]}:9..1", f"digits={texts[1]}:1..3"], seq_len=SEQ_LEN)
    generator = np.random.default_rng(0)
    for progress, expected in ((0.0, 0.1), (0.5, 0.425), (1.0, 0.75)):
        tokens, targets, drawn = mixture.sample(4000, SEQ_LEN, progress, generator)
        assert tokens.shape == targets.shape == (4000, SEQ_LEN)
        assert torch.equal(tokens[:, 1:], targets[:, :-1])
        assert mixture.shares(progress) == pytest.approx([1 - expected, expected])
        assert _digit_share(tokens) == pytest.approx(expected, abs=0.03)
        assert drawn.float().mean().item() == pytest.approx(_digit_share(tokens))


def test_a_corpus_of_ratio_0_is_never_drawn(texts: tuple[Path, Path]) -> None:
    mixture = load_mixture([f"letters={texts[0]}:0", f"digits={texts[1]}:2"], seq_len=SEQ_LEN)
    tokens, _, _ = mixture.sample(500, SEQ_LEN, 0.3, np.random.default_rng(1))
    assert _digit_share(tokens) == 1


def test_the_draw_goes_on_where_its_generator_stands(texts: tuple[Path, Path]) -> None:
    mixture = load_mixture([f"letters={texts[0]}:1", f"digits={texts[1]}:1"], seq_len=SEQ_LEN)
    one, other = np.random.default_rng(5), np.random.default_rng(0)
    mixture.sample(8, SEQ_LEN, 0.0, one)
    other.bit_generator.state = one.bit_generator.state
    assert torch.equal(mixture.sample(8, SEQ_LEN, 0.5, one)[0], mixture.sample(8, SEQ_LEN, 0.5, other)[0])


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.2), (2.0, 1 / 3), (1e9, 0.5)])
def test_without_ratios_size_and_temperature_decide(
    texts: tuple[Path, Path], temperature: float, expected: float
) -> None:
    """One part in four is a fifth; its square root is a third; hot enough, all are alike."""
    words = [f"letters={texts[0]}", f"digits={texts[1]}"]
    mixture = load_mixture(words, temperature=temperature, seq_len=SEQ_LEN)
    assert mixture.first == mixture.last
    assert mixture.first[1] == pytest.approx(expected, abs=0.01)


def test_a_part_may_have_several_paths_or_be_the_standard_library(texts: tuple[Path, Path]) -> None:
    assert parse_part(f"both={texts[0]},{texts[1]}:0.5").paths == texts
    assert parse_part("general=:0.25").paths == ()
    assert parse_part("general=:0.25").ratio == (0.25, 0.25)
    assert parse_part("general=").ratio is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "mix must name at least one corpus, got none"),
        (["PATH"], "mix must be of NAME=PATH:RATIO, NAME=PATH:START..END or NAME=PATH, got"),
        (["=PATH:1"], "mix must be of NAME=PATH:RATIO"),
        (["a=nowhere:1"], "mix must name files or folders that exist, got nowhere for a"),
        (["a=PATH:much"], "mix must have a number or START..END behind the colon, got 'much' for a"),
        (["a=PATH:-1"], "mix must have ratios of at least 0, got -1 for a"),
        (["a=PATH:nan"], "mix must have ratios of at least 0, got nan for a"),
        (["a=PATH:1", "a=PATH:2"], "mix must name every corpus once, got a more often"),
        (["a=PATH:1", "b=PATH"], "mix must give a ratio to every corpus or to none, got none for b"),
        (["a=PATH:1..0", "b=PATH:2..0"], "mix must have a positive ratio at each end"),
    ],
)
def test_refusals(texts: tuple[Path, Path], words: list[str], message: str) -> None:
    """One clear line for what is wrong."""
    with pytest.raises(ValueError, match=re.escape(message)):
        load_mixture([word.replace("PATH", str(texts[0])) for word in words], seq_len=SEQ_LEN)


def test_a_temperature_beside_ratios_or_below_0_is_refused(texts: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match=r"temperature must be 1 where ratios are given, got 2.0"):
        load_mixture([f"a={texts[0]}:1"], temperature=2.0, seq_len=SEQ_LEN)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        load_mixture([f"a={texts[0]}"], temperature=0, seq_len=SEQ_LEN)
