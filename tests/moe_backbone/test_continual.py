"""A backbone is trained on, on a mixture: what learns does, what is frozen does not, and all ends in plain weights."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_backbone import BackboneConfig, MoETransformer
from moe_backbone.continual import Continual, continual_key, tune
from moe_backbone.mixture import Mixture, load_mixture
from moe_backbone.pretrain import PretrainConfig, load_or_train
from moe_backbone.tuning import Method, TuningConfig

SIZES = BackboneConfig(
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_experts=4,
    top_k=2,
    intermediate_size=8,
    shared_intermediate_size=8,
    seq_len=16,
)
SETTINGS = TuningConfig(steps=20, sequences=4, eval_every=5, rank=2, learning_rate=1e-2)
WORDS = "a router sends every token to few of many experts and skips what it does not need"
MATRICES = {"query", "key_value", "output", "gate_up", "down", "0.weight", "1.weight"}
"""Ends of the names of all weights but the gates, norms, embedding and output head."""
Make = Callable[..., Continual]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    """Sentences that the start knows, and the same kind in capitals, which it has not seen."""
    folder, words = tmp_path_factory.mktemp("mixture"), random.Random(0)
    for name, change in (("known", str.lower), ("new", str.upper)):
        texts = [" ".join(words.choices(WORDS.split(), k=60)) for _ in range(24)]
        lines = [json.dumps({"text": change(text)}) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return load_mixture([f"{name}={folder / name}.jsonl:1" for name in ("known", "new")], seq_len=SIZES.seq_len)


@pytest.fixture(scope="module")
def start(mixture: Mixture, tmp_path_factory: pytest.TempPathFactory) -> MoETransformer:
    """Trained for a moment."""
    settings = PretrainConfig(steps=60, sequences=8, learning_rate=1e-2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROUTEGYM_CACHE", str(tmp_path_factory.mktemp("cache")))
        return load_or_train(mixture.corpora[0], SIZES, settings)


@pytest.fixture
def make(mixture: Mixture, start: MoETransformer, tmp_path: Path) -> Make:
    """Begins a training with these settings."""

    def begin(name: str = "run", text: Mixture = mixture, **changes: object) -> Continual:
        tuning = replace(SETTINGS, **changes)  # type: ignore[arg-type]
        return Continual(text, start, tuning, "cpu", tmp_path / f"{name}.partial", max_tokens=512)

    return begin


def _changed(start: MoETransformer, tuned: MoETransformer) -> dict[str, tuple[Tensor, Tensor]]:
    """Weights that are not the same to the bit, by name: before and after."""
    before, after = start.state_dict(), tuned.state_dict()
    assert before.keys() == after.keys()
    return {name: (before[name], after[name]) for name in before if not torch.equal(before[name], after[name])}


def _end(name: str) -> str:
    return ".".join(name.split(".")[-2:]) if name.endswith("weight") else name.rpartition(".")[2]


def _may_change(method: Method, name: str) -> bool:
    last = name.startswith(("attentions.1.", "expert_layers.1.", "norms.2.", "norms.3.", "norms.4.", "output_head."))
    return {
        "full": True,
        "lora": _end(name) in MATRICES and ".gate." not in name and not name.startswith("norms."),
        "ia3": _end(name) in {"key_value", "down", "1.weight"} and not name.startswith("norms."),
        "norms": name.startswith("norms."),
        "top_layers": last,
    }[method]


@pytest.mark.parametrize("method", ["full", "lora", "ia3", "norms", "top_layers"])
def test_only_what_the_method_trains_changes(
    make: Make, start: MoETransformer, mixture: Mixture, method: Method
) -> None:
    """All of that does, and everything else is the same to the bit, in a plain backbone that is what was trained."""
    before = start.sha256()
    training = make(method=method)
    tuned, outcome = tune(training)
    assert start.sha256() == before
    names = start.state_dict().keys()
    assert set(_changed(start, tuned)) == {name for name in names if _may_change(method, name)}
    tokens, _ = mixture.corpora[1].test.windows(SIZES.seq_len, 128)[:2]
    with torch.no_grad():
        assert torch.allclose(tuned(tokens), training.backbone(tokens), atol=1e-5)
    assert not any(weight.requires_grad for weight in tuned.parameters())
    assert outcome.best_step == outcome.steps == SETTINGS.steps
    assert outcome.after["new"] < outcome.before["new"]
    frozen = (
        0
        if method == "full"
        else sum(w.numel() for name, w in start.named_parameters() if not _may_change(method, name))
    )
    assert outcome.frozen_parameters >= frozen
    assert outcome.parameters == start.num_parameters


def test_lora_adds_matrices_of_its_rank(make: Make, start: MoETransformer) -> None:
    """To each expert its own, and to all heads together one."""
    tuned, outcome = tune(make(method="lora"))
    for name, (before, after) in _changed(start, tuned).items():
        more = after - before
        if name.endswith("query"):
            more = more.transpose(0, 1).flatten(1)
        elif name.endswith("output"):
            more = more.flatten(0, 1)
        values = torch.linalg.svdvals(more)
        assert (values[..., SETTINGS.rank] < 1e-4 * values[..., 0]).all(), name
    width, inner, rank = SIZES.hidden_size, SIZES.intermediate_size, SETTINGS.rank
    attention = 2 * width + 3 * width + 2 * width
    experts = (SIZES.num_experts + 1) * (width + 2 * inner + inner + width)
    assert outcome.trained_parameters == SIZES.num_layers * rank * (attention + experts)
    assert outcome.frozen_parameters == start.num_parameters


def test_ia3_scales_keys_values_and_inner_activations(make: Make, start: MoETransformer) -> None:
    tuned, outcome = tune(make(method="ia3"))
    for name, (before, after) in _changed(start, tuned).items():
        factors = after / before
        along = 2 if name.endswith("down") else 0
        assert torch.allclose(factors, factors.mean(along, keepdim=True).expand_as(factors), atol=1e-4), name
    inner = SIZES.intermediate_size * SIZES.num_experts + SIZES.shared_intermediate_size
    assert outcome.trained_parameters == SIZES.num_layers * (2 * SIZES.hidden_size + inner)


def test_a_frozen_weight_that_changes_is_told(make: Make) -> None:
    """The hash before the first step is compared with that after the last."""
    training = make(method="norms")
    step = training._train_step

    def careless() -> None:
        step()
        training.backbone.embedding.weight.data[0, 0] += 1e-3

    training._train_step = careless  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="must stay as they were"):
        training.run()


def test_replay_keeps_what_the_domain_alone_forgets(make: Make, mixture: Mixture) -> None:
    """Both learn the domain."""
    alone = replace(mixture, first=(0.0, 1.0), last=(0.0, 1.0))
    outcomes = [tune(make(name, text, steps=40))[1] for name, text in (("alone", alone), ("replay", mixture))]
    rises = [outcome.after["known"] - outcome.before["known"] for outcome in outcomes]
    falls = [outcome.before["new"] - outcome.after["new"] for outcome in outcomes]
    assert rises[0] > 0.2
    assert rises[1] < rises[0] - 0.2
    assert min(falls) > 0.5


def test_distillation_stays_close_to_the_start_on_samples_of_the_first_text(
    make: Make, start: MoETransformer, mixture: Mixture
) -> None:
    """Its loss is the mean over samples: the weight times KL for those, the surprise for others; it keeps more."""
    training = make(distill=3.0, balance_weight=0.0)
    tokens, targets = training._draw(8)
    with torch.no_grad():
        training.backbone.output_head.weight.mul_(1.5)
        logits, reference = training.backbone(tokens), start(tokens)
        loss = training._loss(tokens, targets)
    known = (tokens >= ord("A")) & (tokens <= ord("Z"))
    samples = []
    for row, is_new in enumerate(known.any(1).tolist()):
        expected = reference[row].softmax(1)
        apart = (expected * (reference[row].log_softmax(1) - logits[row].log_softmax(1))).sum(1).mean()
        surprise = torch.nn.functional.cross_entropy(logits[row], targets[row])
        samples.append(surprise if is_new else 3 * apart)
    assert known.any(1).tolist() == (~training.replayed).tolist()
    assert 0 < sum(training.replayed) < 8
    assert loss.item() == pytest.approx(torch.stack(samples).mean().item(), rel=1e-4)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_interrupted_training_ends_like_one_that_was_not(make: Make, mixture: Mixture, method: Method) -> None:
    """With a schedule that moves, and only what learns in the file that it goes on from."""
    moving = replace(mixture, first=(0.9, 0.1), last=(0.2, 0.8))
    whole, told = tune(make("whole", moving, method=method))

    def interrupt(step: int, loss: float) -> None:
        if step == 10:
            raise KeyboardInterrupt

    stopped = make("part", moving, method=method)
    with pytest.raises(KeyboardInterrupt):
        stopped.run(interrupt)
    kept = torch.load(stopped.partial, weights_only=True)["weights"]
    assert sum(weight.numel() for weight in kept.values()) == stopped.trained_parameters
    again = make("part", moving, method=method)
    assert again.step == 10
    tuned, outcome = tune(again)
    assert tuned.sha256() == whole.sha256()
    assert outcome == told


def test_training_that_only_harms_stops_early_and_keeps_the_start(
    make: Make, start: MoETransformer, mixture: Mixture
) -> None:
    """The start is the first that the validation documents have seen."""
    known = replace(mixture, first=(1.0, 0.0), last=(1.0, 0.0))
    tuned, outcome = tune(make(text=known, learning_rate=0.5, steps=100, patience=2))
    assert tuned.sha256() == start.sha256()
    assert (outcome.best_step, outcome.steps) == (0, 2 * SETTINGS.eval_every)
    assert outcome.after == outcome.before


def test_validation_is_weighted_by_the_mixture(make: Make, mixture: Mixture) -> None:
    """Mean of the shares at both ends; texts of share 0 are measured all the same."""
    looks: list[float] = []
    training = make(text=replace(mixture, first=(0.0, 1.0), last=(0.5, 0.5)), steps=1)
    training.run(lambda step, loss: looks.append(loss))
    assert looks[-1] == pytest.approx(0.25 * training.losses["known"] + 0.75 * training.losses["new"])


def test_everything_that_shapes_the_weights_is_in_the_key(mixture: Mixture) -> None:
    keys = {
        continual_key(mixture, "start", SETTINGS),
        continual_key(mixture, "other start", SETTINGS),
        continual_key(replace(mixture, last=(0.4, 0.6)), "start", SETTINGS),
        continual_key(replace(mixture, corpora=mixture.corpora[::-1]), "start", SETTINGS),
        continual_key(mixture, "start", replace(SETTINGS, seed=1)),
    }
    assert len(keys) == 5


def test_refusals(make: Make) -> None:
    """What the backbone does not have cannot be trained."""
    with pytest.raises(ValueError, match=r"norms is the nearest to bitfit.* got bitfit"):
        make(method="bitfit")
    with pytest.raises(ValueError, match="top_layers must be at most num_layers=2, got 3"):
        make(method="top_layers", top_layers=3)
    with pytest.raises(ValueError, match=r"method must be one of full, .* got 'most'"):
        TuningConfig(method="most")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        TuningConfig(rank=0)
