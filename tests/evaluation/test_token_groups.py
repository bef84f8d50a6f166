from __future__ import annotations

import numpy as np
import pytest

from evaluation.token_groups import BYTE_CLASSES, WORD_PLACES, byte_classes, quintiles, word_positions


def named(grouping):
    return [grouping.names[member] for member in grouping.members]


def as_tokens(*lines):
    return np.array([list(line) for line in lines], dtype=np.int64)


def test_classes_of_a_line_of_code():
    line = b"\n  if A_1(' \xc3\x00+"
    assert named(byte_classes(as_tokens(line))) == [
        "newline",
        "indentation",
        "indentation",
        "lower-case letter",
        "lower-case letter",
        "space in a line",
        "upper-case letter",
        "underscore",
        "digit",
        "bracket",
        "quote",
        "space in a line",
        "byte beyond ASCII",
        "end of document",
        "other punctuation",
    ]


def test_a_window_knows_nothing_of_the_line_before_it():
    first, second = b"a\n\t", b"  b"
    assert named(byte_classes(as_tokens(first, second)))[2:5] == ["indentation", "space in a line", "space in a line"]


def test_every_byte_has_one_class():
    grouping = byte_classes(np.arange(256).reshape(2, 128))
    assert grouping.shares.sum() == pytest.approx(1.0)
    assert grouping.shares[grouping.names.index("digit")] == pytest.approx(10 / 256)
    assert sum(len(values) for values in BYTE_CLASSES.values()) == len(set(b"".join(BYTE_CLASSES.values())))


def test_places_in_words_and_none_carried_over():
    places = named(word_positions(as_tokens(b"a.bcdefghi", b"jk        ")))
    first, second, middle, late, outside = WORD_PLACES
    assert places[:10] == [first, outside, first, second, middle, middle, middle, late, late, late]
    assert places[10:] == [first, second, *[outside] * 8]


def test_quintiles_are_of_equal_size_in_order_and_keep_ties_apart():
    values = np.array([5.0, 1.0, 1.0, 1.0, 1.0, 1.0, 9.0, 3.0, 2.0, 4.0])
    grouping = quintiles("loss", values)
    np.testing.assert_allclose(grouping.shares, 0.2)
    np.testing.assert_allclose(grouping.means(values), [1.0, 1.0, 1.5, 3.5, 7.0])
    assert grouping.names[-1] == "hardest fifth: 5.000 to 9.000"


def test_means_weigh_back_to_the_whole():
    tokens = np.random.default_rng(0).integers(0, 256, (4, 32))
    values = np.random.default_rng(1).random(128)
    for grouping in (byte_classes(tokens), word_positions(tokens), quintiles("loss", values)):
        assert grouping.shares @ grouping.means(values) == pytest.approx(values.mean())
        assert (grouping.shares > 0).all()
