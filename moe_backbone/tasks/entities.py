"""Tags of named entities in one scheme, and their F1."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

EXTRA = "pip install -c constraints.txt -e '.[tagging]'"


def to_iob2(tags: Sequence[str]) -> list[str]:
    """Tags in which every entity begins with `B-`, from IOB1, where only one right behind its own kind does, or IOB2.

    Example: `I-PER I-PER O I-LOC B-LOC I-ORG` becomes `B-PER I-PER O B-LOC B-LOC B-ORG`.
    Source: Tjong Kim Sang and Veenstra, Representing Text Chunks, EACL 1999.
    """
    converted, before = list[str](), "O"
    for tag in tags:
        begins = tag.startswith("I-") and before[2:] != tag[2:]
        converted.append(f"B-{tag[2:]}" if begins else tag)
        before = tag
    return converted


def require_seqeval() -> None:
    """Refuse to go on without the library that counts entities.

    Raises:
        ValueError: Names the extra.
    """
    try:
        import seqeval  # noqa: F401
    except ImportError:
        raise ValueError(f"F1 of entities must have the extra tagging installed ({EXTRA}), got no seqeval") from None


def entity_f1(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> float:
    """Micro F1 of whole entities, as CoNLL counts them; 0 where none is right.

    Args:
        gold: Tags of each sentence, IOB1 or IOB2.
        predicted: Tags of the same words.

    Raises:
        ValueError: If seqeval is not installed.
    """
    require_seqeval()
    from seqeval.metrics import f1_score
    from seqeval.scheme import IOB2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no entity was predicted is what 0 says
        texts = ([to_iob2(tags) for tags in side] for side in (gold, predicted))
        return float(f1_score(*texts, mode="strict", scheme=IOB2, zero_division=0))
