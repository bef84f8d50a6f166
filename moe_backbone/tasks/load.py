"""A task from its files: which rows train, validate and test, and the three as token streams."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from moe_backbone.checks import require
from moe_backbone.corpus import Corpus
from moe_backbone.tasks.readers import Example, read_conll, read_csv
from moe_backbone.tasks.split import LabelBytes, encode

logger = logging.getLogger(__name__)

PARTS = {"train": "train", "validation": "valid|dev", "test": "test"}
"""How the name of a part's file begins, in a folder."""
SUFFIXES = (".csv", ".conll", ".txt")
VALIDATION_SHARE, TEST_SHARE = 0.1, 0.2
"""Of what there is, where the files themselves hold nothing out."""
SPLIT_SEED = 0
WHOLE_DOCUMENTS = 3
"""From so many on, whole ones are held out, however large: names come again within a document, not in the next one."""


@dataclass(frozen=True, kw_only=True)
class TaskCorpus(Corpus):
    """A task as a corpus whose parts are `TaskSplit`s.

    Attributes:
        examples: Of each part, in the order of its stream.
        label_bytes: Byte values of all labels.
        tagging: Whether words are tagged; else texts are classified.
        lookahead: Words that are read behind a word before its label is asked for.
    """

    examples: Mapping[str, tuple[Example, ...]]
    label_bytes: LabelBytes
    tagging: bool
    lookahead: int

    @property
    def kind(self) -> str:
        """What a reader calls it."""
        return "token tagging" if self.tagging else "text classification"


def load_task(path: Path, *, seq_len: int = 256, lookahead: int = 0) -> TaskCorpus:
    """Read a task.

    A folder holds `train*` and may hold `valid*` or `dev*` and `test*`, each `.csv` to classify texts or `.conll` or
    `.txt` to tag words. What it does not hold out is held out of the training file, or of the one file that is named:
    documents drawn with a fixed seed, or of one or two documents the last sentences of each.

    Args:
        path: Folder or file.
        seq_len: Tokens of a window; what is longer is cut, which the log says.
        lookahead: Words that are read behind a word before its label is asked for; tagging only.

    Raises:
        ValueError: If a file or a row of it cannot be used, or a part is empty.
    """
    files = _files(path)
    tagging = _is_tagging(files)
    read = read_conll if tagging else read_csv
    parts = _held_out({part: read(file) for part, file in files.items()})
    for part in PARTS:
        require(bool(parts.get(part)), f"task must hold examples to {part}, got none in {path}")
    require(0 <= lookahead < seq_len // 2, f"lookahead must lie in [0, seq_len / 2), got {lookahead}")
    lookahead = lookahead if tagging else 0
    everything = [example for part in PARTS for example in parts[part]]
    labels = LabelBytes.choose(
        [label for example in everything for label in example.labels],
        [word for example in everything for word in example.words],
    )
    shuffled = {part: _shuffled(parts[part]) for part in PARTS}
    splits = {}
    for part, examples in shuffled.items():
        splits[part], cut = encode(part, examples, labels, seq_len=seq_len, lookahead=lookahead, tagging=tagging)
        if cut:
            what = "sentences cut into several" if tagging else "texts without their beginning"
            logger.info("task %s: %d of %d %s to fit %d bytes, %s", path.name, cut, len(examples), what, seq_len, part)
    _tell_known(path.name, shuffled)
    content = json.dumps([seq_len, lookahead, {part: [astuple(one) for one in shuffled[part]] for part in PARTS}])
    return TaskCorpus(
        name=path.resolve().name,
        sha256=hashlib.sha256(content.encode()).hexdigest(),
        **splits,
        examples=shuffled,
        label_bytes=labels,
        tagging=tagging,
        lookahead=lookahead,
    )


def _tell_known(name: str, parts: Mapping[str, Sequence[Example]]) -> None:
    """Say how many test examples occur in training, to the letter."""
    known = {example.words for example in parts["train"]}
    if again := sum(example.words in known for example in parts["test"]):
        logger.info("task %s: %d test examples also occur in training; they are kept", name, again)


def _files(path: Path) -> dict[str, Path]:
    """File of each part; the only one there is stands for training."""
    if not path.is_dir():
        return {"train": path}
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    files: dict[str, Path] = {}
    for part, begin in PARTS.items():
        named = [file for file in found if re.match(begin, file.name.lower())]
        require(len(named) <= 1, f"task folder must hold one file to {part}, got {', '.join(map(str, named))}")
        if named:
            files[part] = named[0]
    rule = f"task folder must hold a file train*{', train*'.join(SUFFIXES)}"
    require("train" in files, f"{rule}, or be one file, got {path}")
    logger.info("task %s: %s", path.name, ", ".join(f"{part} {file.name}" for part, file in files.items()))
    return files


def _is_tagging(files: Mapping[str, Path]) -> bool:
    """Whether the files hold columns of words and tags; else CSV."""
    kinds = {file.suffix.lower() == ".csv" for file in files.values()}
    require(len(kinds) == 1, f"task files must be all CSV or all columns, got {', '.join(map(str, files.values()))}")
    return not kinds.pop()


def _held_out(parts: dict[str, list[Example]]) -> dict[str, list[Example]]:
    """The parts, with those that are missing taken out of training, test first."""
    for part, share in (("test", TEST_SHARE), ("validation", VALIDATION_SHARE)):
        if part not in parts:
            parts["train"], parts[part] = _cut(parts["train"], share)
    return parts


def _cut(examples: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """What stays and what is held out, about `share` of it, by whole documents where there are `WHOLE_DOCUMENTS`."""
    documents = sorted({example.document for example in examples})
    if len(documents) < WHOLE_DOCUMENTS:
        kept, out = list[Example](), list[Example]()
        for document in documents:
            own = [example for example in examples if example.document == document]
            first = len(own) - round(share * len(own))
            kept, out = kept + own[:first], out + own[first:]
        return kept, out
    drawn = np.random.default_rng(SPLIT_SEED).permutation(documents)[: max(1, round(share * len(documents)))]
    held = set(map(int, drawn))
    return [one for one in examples if one.document not in held], [one for one in examples if one.document in held]


def _shuffled(examples: Sequence[Example]) -> tuple[Example, ...]:
    """Neighbours in a file are alike, and a window holds neighbours: in a shuffled order none tells another's label."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(examples))
    return tuple(examples[int(place)] for place in order)
