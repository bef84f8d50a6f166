"""What a task asks for at least: answers of the commonest label, of n-grams, and of a look-up, scored as models are."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moe_backbone.tasks import Example, TaskCorpus, entity_f1

logger = logging.getLogger(__name__)

EXTRA = "pip install -c constraints.txt -e '.[cluster]'"
STRENGTHS = (1.0, 10.0, 100.0)
"""Inverse regularisation of the logistic regression; validation chooses."""
Labels = list[tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """How well a task was answered."""

    name: str
    accuracy: float
    """Share of texts, or of words."""
    f1: float | None = None
    """Micro F1 of whole entities; None where none are tagged."""


def baselines(task: TaskCorpus) -> Iterator[TaskScore]:
    """Scores on the test part of whatever needs no backbone."""
    test = task.examples["test"]
    yield score("majority", majority(task, test), test, tagging=task.tagging)
    if task.tagging:
        yield score("tag-per-word lookup", lookup(task, test), test, tagging=True)
    elif (answers := ngrams(task, test)) is not None:
        yield score("TF-IDF + logistic regression", answers, test, tagging=False)


def score(name: str, answers: Labels, examples: Sequence[Example], *, tagging: bool) -> TaskScore:
    """Accuracy of labels for examples, and F1 where they are tags of entities."""
    pairs = [
        (given, label)
        for labels, example in zip(answers, examples, strict=True)
        for given, label in zip(labels, example.labels, strict=True)
    ]
    accuracy = sum(given == label for given, label in pairs) / len(pairs)
    f1 = entity_f1([example.labels for example in examples], answers) if tagging else None
    return TaskScore(name=name, accuracy=accuracy, f1=f1)


def majority(task: TaskCorpus, examples: Sequence[Example]) -> Labels:
    """The commonest label of training, everywhere."""
    commonest = Counter(label for example in task.examples["train"] for label in example.labels).most_common(1)[0][0]
    return [(commonest,) * len(example.labels) for example in examples]


def lookup(task: TaskCorpus, examples: Sequence[Example]) -> Labels:
    """Each word's commonest tag in training; `O` for words that are not there."""
    seen: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for example in task.examples["train"]:
        for word, tag in zip(example.words, example.labels, strict=True):
            seen[word][tag] += 1
    tags = {word: counts.most_common(1)[0][0] for word, counts in seen.items()}
    return [tuple(tags.get(word, "O") for word in example.words) for example in examples]


def ngrams(task: TaskCorpus, examples: Sequence[Example]) -> Labels | None:
    """Logistic regression on TF-IDF of words and pairs of words; None, and a line in the log, without scikit-learn.

    One label against the others, which takes seconds where one model of all takes minutes; validation chooses how
    strongly the weights are held down.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.multiclass import OneVsRestClassifier
        from sklearn.pipeline import make_pipeline
    except ImportError:
        logger.warning("TF-IDF + logistic regression needs the extra cluster (%s): left out", EXTRA)
        return None
    texts = {part: [example.words[0] for example in own] for part, own in task.examples.items()}
    labels = {part: [example.labels[0] for example in own] for part, own in task.examples.items()}
    fitted = [
        make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
            OneVsRestClassifier(LogisticRegression(C=strength, solver="liblinear")),
        ).fit(texts["train"], labels["train"])
        for strength in STRENGTHS
    ]
    best = max(fitted, key=lambda model: float(model.score(texts["validation"], labels["validation"])))
    return [(str(label),) for label in best.predict([example.words[0] for example in examples])]
