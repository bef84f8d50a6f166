"""On a task only what has a label is scored, and entities are counted whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evaluation import Evaluator, Point, Scored
from evaluation.curves import compute_at_f1, f1_along
from evaluation.task_baselines import baselines, lookup, majority, score
from moe_backbone import BackboneConfig, MoETransformer
from moe_backbone.tasks import Example, TaskCorpus, load_task

SEQ_LEN = 32


class Oracle:
    """A backbone that answers what it is told, at the sites of a real one."""

    def __init__(self, inner: MoETransformer, answers: dict[bytes, torch.Tensor]) -> None:
        self.inner, self.answers = inner, answers

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def run(self, tokens, router, price=None):
        _, subsets = self.inner.run(tokens, router, price)
        targets = torch.stack([self.answers[row.numpy().tobytes()] for row in tokens]).clamp_min(0)
        return torch.nn.functional.one_hot(targets, 256).float() * 9, subsets


@pytest.fixture
def backbone() -> MoETransformer:
    """Seeded random weights, frozen."""
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_experts": 4, "top_k": 2, "intermediate_size": 8}
    return MoETransformer(BackboneConfig(**sizes, seq_len=SEQ_LEN)).requires_grad_(False).eval()


@pytest.fixture
def tags(tmp_path: Path) -> TaskCorpus:
    """Twelve documents of two sentences, the test part two of them."""
    rows = []
    for number in range(12):
        rows += ["-DOCSTART- O", "", f"{number} O", "Anna I-PER", "Smith I-PER", "left O", "", "Rome I-LOC", "is O", ""]
    path = tmp_path / "tags.conll"
    path.write_text("\n".join(rows), encoding="utf-8")
    return load_task(path, seq_len=SEQ_LEN)


def evaluate(backbone: MoETransformer, task: TaskCorpus, wrong: int | None = None) -> Evaluator:
    """The test part, answered right but for the label that stands at place `wrong` of all."""
    tokens, targets, _ = task.test.windows(SEQ_LEN, 10**6)
    answers = targets.clone()
    if wrong is not None:
        place = torch.nonzero(targets >= 0)[wrong]
        answers[tuple(place)] = ord("x")
    told = {row.numpy().tobytes(): answer for row, answer in zip(tokens, answers, strict=True)}
    return Evaluator(Oracle(backbone, told), task.test, max_tokens=10**6)  # type: ignore[arg-type]


def test_only_labels_are_scored(backbone: MoETransformer, tags: TaskCorpus) -> None:
    """All of them, each once; documents are sentences."""
    words = sum(len(example.words) for example in tags.examples["test"])
    evaluator = evaluate(backbone, tags)
    assert evaluator.num_tokens == words == evaluator.native.documents.tokens.sum()
    assert evaluator.num_documents == len(tags.examples["test"])
    assert (evaluator.native.accuracy, evaluator.native.f1) == (1.0, 1.0)
    assert evaluator.native.compute == 1.0
    assert evaluator.native.to_json()["f1"] == 1.0


def test_an_answer_that_is_no_label_is_wrong_and_outside(backbone: MoETransformer, tags: TaskCorpus) -> None:
    """One entity loses its tag, which costs accuracy one word and F1 one entity found."""
    labels = [label for example in tags.examples["test"] for label in example.labels]
    entities = len([label for label in labels if label != "O"]) - labels.count("I-PER") // 2
    point = evaluate(backbone, tags, wrong=labels.index("I-LOC")).native
    assert point.accuracy == pytest.approx(1 - 1 / len(labels))
    assert point.f1 == pytest.approx(2 * (entities - 1) / (2 * entities - 1))


def test_f1_along_a_curve(backbone: MoETransformer, tags: TaskCorpus) -> None:
    """Interpolated between settings, and where it falls short from there on."""
    native = evaluate(backbone, tags).native

    def at(compute: float, f1: float, correct: float) -> Scored:
        known = vars(native) | {"compute": compute, "f1": f1}
        documents = known["documents"]
        known["documents"] = documents.mix(documents, 0.0)
        object.__setattr__(known["documents"], "log_likelihood", documents.log_likelihood - 1 / correct)
        names = Point.__dataclass_fields__
        return Scored.on_one_text(Point(**{name: known[name] for name in names}))

    curve = [at(0.5, 0.6, 1), at(0.7, 0.8, 2), at(1.0, 0.9, 3)]
    assert f1_along([curve], [0.6]).tolist() == pytest.approx([0.7])
    assert compute_at_f1(curve, 0.7) == pytest.approx(0.6)
    assert compute_at_f1(curve, 0.5) == 0.5
    assert compute_at_f1(curve, 0.95) is None


def test_baselines_by_hand(tags: TaskCorpus) -> None:
    """The commonest tag is `O`, a word not seen is outside, and the look-up knows all others."""
    unknown = [Example(words=("Anna", "Oslo"), labels=("I-PER", "I-LOC"), document=0)]
    assert majority(tags, unknown) == [("O", "O")]
    assert lookup(tags, unknown) == [("I-PER", "O")]
    assert score("lookup", lookup(tags, unknown), unknown, tagging=True).f1 == pytest.approx(2 / 3)
    assert {found.name: found.f1 for found in baselines(tags)} == {"majority": 0.0, "tag-per-word lookup": 1.0}


def test_texts_by_ngrams(tmp_path: Path) -> None:
    """Words that tell the label are found; the majority is one of two labels."""
    pytest.importorskip("sklearn")
    rows = "".join(f"my {word} went away,{word}_lost\n" for word in ("card", "cash") for _ in range(40))
    (tmp_path / "texts.csv").write_text(f"text,label\n{rows}", encoding="utf-8")
    found = {one.name: one.accuracy for one in baselines(load_task(tmp_path / "texts.csv", seq_len=SEQ_LEN))}
    assert found["TF-IDF + logistic regression"] == 1
    assert found["majority"] < 1
