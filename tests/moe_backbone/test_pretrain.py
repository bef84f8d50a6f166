"""Training on first use: repeatable, resumable, cached; random routing that leaves some sequences native."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_backbone import BackboneConfig, MoETransformer, SiteView
from moe_backbone import pretrain as pretrain_module
from moe_backbone.corpus import Corpus
from moe_backbone.pretrain import (
    PretrainConfig,
    Pretraining,
    backbone_key,
    cache_folder,
    learning_rate_factor,
    load_or_train,
    native_loss,
)
from moe_backbone.pretrain_config import shaping
from moe_backbone.random_routing import RandomRouting

SETTINGS = PretrainConfig(steps=20, sequences=4, eval_every=5, random_routing=0.5, random_from=0.25)
FIRST_RANDOM_STEP = 5
INTERRUPTED_AT = 13
LAST_LOOK = 10
"""Last multiple of `eval_every` before the interruption."""


def _same_weights(one: MoETransformer, other: MoETransformer) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.fixture
def steps_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the training steps that ran, in order."""
    steps: list[int] = []
    train_step = Pretraining._train_step

    def recorded(self: Pretraining) -> None:
        steps.append(self.step)
        train_step(self)

    monkeypatch.setattr(Pretraining, "_train_step", recorded)
    return steps


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call to have the next training interrupted before step `INTERRUPTED_AT`, once."""

    def arm() -> None:
        train_step = Pretraining._train_step

        def interrupted(self: Pretraining) -> None:
            if self.step == INTERRUPTED_AT:
                monkeypatch.setattr(Pretraining, "_train_step", train_step)
                raise KeyboardInterrupt
            train_step(self)

        monkeypatch.setattr(Pretraining, "_train_step", interrupted)

    return arm


def test_same_seed_trains_the_same_weights(
    tiny_corpus: Corpus, tiny_config: BackboneConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two trainings from scratch agree to the bit whatever was drawn before them; another seed does not."""
    one = load_or_train(tiny_corpus, tiny_config, SETTINGS)
    monkeypatch.setenv("ROUTEGYM_CACHE", str(tmp_path / "other"))
    torch.rand(7)
    assert _same_weights(load_or_train(tiny_corpus, tiny_config, SETTINGS), one)
    assert not _same_weights(load_or_train(tiny_corpus, tiny_config, replace(SETTINGS, seed=1)), one)


def test_training_lowers_the_loss_on_held_out_text(tiny_corpus: Corpus, tiny_config: BackboneConfig) -> None:
    """A few steps beat random weights and the uniform guess by far."""
    torch.manual_seed(SETTINGS.seed)
    before = native_loss(MoETransformer(tiny_config), tiny_corpus.test, max_tokens=1024, device="cpu")
    settings = PretrainConfig(steps=30, sequences=8, learning_rate=1e-2)
    trained = load_or_train(tiny_corpus, tiny_config, settings)
    after = native_loss(trained, tiny_corpus.test, max_tokens=1024, device="cpu")
    assert after < min(before, math.log(256)) - 2


def test_trained_backbone_is_frozen_and_in_evaluation_mode(tiny_corpus: Corpus, tiny_config: BackboneConfig) -> None:
    """Nobody trains it further by accident, fresh or from the cache."""
    for _ in range(2):
        backbone = load_or_train(tiny_corpus, tiny_config, SETTINGS)
        assert not backbone.training
        assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_interrupted_training_goes_on_to_the_same_weights(
    tiny_corpus: Corpus,
    tiny_config: BackboneConfig,
    interrupt: Callable[[], None],
    steps_run: list[int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Stopped between two looks and started again, it repeats from the last look and ends as if never stopped."""
    expected = load_or_train(tiny_corpus, tiny_config, SETTINGS)
    cache = tmp_path / "other"
    monkeypatch.setenv("ROUTEGYM_CACHE", str(cache))
    interrupt()
    with pytest.raises(KeyboardInterrupt):
        load_or_train(tiny_corpus, tiny_config, SETTINGS)
    assert {path.suffix for path in cache.glob("[!.]*")} == {".partial"}
    steps_run.clear()
    assert _same_weights(load_or_train(tiny_corpus, tiny_config, SETTINGS), expected)
    assert steps_run == list(range(LAST_LOOK, SETTINGS.steps))
    assert [path.suffix for path in cache.glob("[!.]*")] == [".safetensors"]


def test_second_call_loads_without_training(
    tiny_corpus: Corpus, tiny_config: BackboneConfig, steps_run: list[int], cache: Path
) -> None:
    """The cache holds one file, and what is read from it is what was trained."""
    trained = load_or_train(tiny_corpus, tiny_config, SETTINGS)
    assert steps_run == list(range(SETTINGS.steps))
    assert _same_weights(load_or_train(tiny_corpus, tiny_config, SETTINGS), trained)
    assert len(steps_run) == SETTINGS.steps
    assert [path.name for path in cache.glob("[!.]*")] == [
        f"backbone-{backbone_key(tiny_corpus, tiny_config, SETTINGS)}.safetensors"
    ]


@pytest.mark.parametrize("damage", [b"", b"not a tensor file", "cut"])
def test_damaged_backbone_is_refused_and_left_alone(
    tiny_corpus: Corpus, tiny_config: BackboneConfig, cache: Path, damage: bytes | str
) -> None:
    """One line that names the file and the way out; training anew by itself would hide that a disk is failing."""
    load_or_train(tiny_corpus, tiny_config, SETTINGS)
    (path,) = cache.glob("[!.]*")
    content = path.read_bytes()[:-100] if isinstance(damage, str) else damage
    path.write_bytes(content)
    rule = r"backbone must be whole \(delete it to make it anew\), got .*backbone-"
    with pytest.raises(ValueError, match=rule) as error:
        load_or_train(tiny_corpus, tiny_config, SETTINGS)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == content


def test_damaged_checkpoint_of_pretraining_is_refused(
    tiny_corpus: Corpus, tiny_config: BackboneConfig, interrupt: Callable[[], None], cache: Path
) -> None:
    """As the trained backbone is."""
    interrupt()
    with pytest.raises(KeyboardInterrupt):
        load_or_train(tiny_corpus, tiny_config, SETTINGS)
    for path in cache.glob("*.partial"):
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="interrupted training must be whole"):
        load_or_train(tiny_corpus, tiny_config, SETTINGS)


def test_every_setting_is_part_of_the_key(tiny_corpus: Corpus, tiny_config: BackboneConfig) -> None:
    """Other text, another architecture, another training or another recipe is another backbone."""
    keys = [
        backbone_key(tiny_corpus, tiny_config, SETTINGS),
        backbone_key(replace(tiny_corpus, sha256="other"), tiny_config, SETTINGS),
        backbone_key(tiny_corpus, replace(tiny_config, top_k=1), SETTINGS),
        backbone_key(tiny_corpus, replace(tiny_config, mixing="keep"), SETTINGS),
        backbone_key(tiny_corpus, tiny_config, replace(SETTINGS, seed=1)),
        backbone_key(tiny_corpus, tiny_config, replace(SETTINGS, random_routing=0.4)),
    ]
    assert len(set(keys)) == len(keys)
    assert backbone_key(replace(tiny_corpus, name="renamed"), tiny_config, SETTINGS) == keys[0]


def test_recipe_version_is_part_of_the_key(
    tiny_corpus: Corpus, tiny_config: BackboneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backbones of an older recipe are not taken for new ones."""
    before = backbone_key(tiny_corpus, tiny_config, SETTINGS)
    monkeypatch.setattr(pretrain_module, "RECIPE_VERSION", pretrain_module.RECIPE_VERSION + 1)
    assert backbone_key(tiny_corpus, tiny_config, SETTINGS) != before


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path) -> None:
    """$ROUTEGYM_CACHE first, then $XDG_CACHE_HOME."""
    assert cache_folder() == cache
    monkeypatch.delenv("ROUTEGYM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "routegym"


def test_early_stopping_restores_the_best_weights(
    tiny_corpus: Corpus, tiny_config: BackboneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two looks without gain end the training, and the weights of the best look come back."""
    losses = iter([3.0, 2.0, 2.5, 2.1])
    monkeypatch.setattr(pretrain_module, "native_loss", lambda *_, **__: next(losses))
    settings = replace(SETTINGS, steps=100, patience=2)
    training = Pretraining(tiny_corpus, tiny_config, settings, "cpu", tmp_path / "run.partial")
    looks: dict[int, Tensor] = {}

    def report(step: int, _: float) -> None:
        looks[step] = training.backbone.output_head.weight.detach().clone()

    backbone = training.run(report)
    assert list(looks) == [5, 10, 15, 20]
    assert torch.equal(backbone.output_head.weight, looks[10])
    assert not torch.equal(looks[20], looks[10])


def test_diverged_training_is_an_error(
    tiny_corpus: Corpus, tiny_config: BackboneConfig, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """A loss that is no number is never cached."""
    monkeypatch.setattr(pretrain_module, "native_loss", lambda *_, **__: float("nan"))
    with pytest.raises(ValueError, match="validation loss must be finite, got nan at step 5: lower learning_rate"):
        load_or_train(tiny_corpus, tiny_config, SETTINGS)
    assert not list(cache.glob("*.safetensors"))


def test_balance_weight_reaches_the_gates(tiny_corpus: Corpus, tiny_config: BackboneConfig) -> None:
    """The coefficient changes what is trained, and a strong one spreads the rows more evenly."""

    def busiest_share(balance_weight: float) -> float:
        settings = PretrainConfig(
            steps=30, sequences=4, learning_rate=1e-2, balance_weight=balance_weight, random_routing=0.0
        )
        backbone = load_or_train(tiny_corpus, tiny_config, settings)
        tokens, _, _ = tiny_corpus.test.windows(tiny_config.seq_len, 1024)
        subsets = backbone.run(tokens, pretrain_module.NativeRouter())[1][1::2]
        return sum((subset.float().mean(0).max() / tiny_config.top_k).item() for subset in subsets) / len(subsets)

    assert busiest_share(1.0) < busiest_share(0.0)


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 0.25), (4, 1.0), (52, 0.5), (100, 0.0)], ids=["start", "peak", "middle", "end"]
)
def test_learning_rate_warms_up_and_falls_to_zero(step: int, factor: float) -> None:
    """The docstring's example, for 100 steps."""
    assert learning_rate_factor(step, 100) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 24, 26])
def test_learning_rate_of_short_runs_is_positive_and_at_most_one(steps: int) -> None:
    """No division by zero, and no step without effect."""
    assert all(0 < learning_rate_factor(step, steps) <= 1 for step in range(steps))


def test_optimizer_follows_the_learning_rate(tiny_corpus: Corpus, tiny_config: BackboneConfig, tmp_path: Path) -> None:
    """The last step runs at its own share of the peak."""
    training = Pretraining(tiny_corpus, tiny_config, SETTINGS, "cpu", tmp_path / "run.partial")
    training.run()
    expected = SETTINGS.learning_rate * learning_rate_factor(SETTINGS.steps - 1, SETTINGS.steps)
    assert [group["lr"] for group in training.optimizer.param_groups] == [pytest.approx(expected)]


def test_random_routing_starts_where_it_is_told_to(
    tiny_corpus: Corpus, tiny_config: BackboneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random routing from a quarter of the training on leaves the steps before it native."""
    random_steps: list[int] = []
    training = Pretraining(tiny_corpus, tiny_config, SETTINGS, "cpu", cache_folder() / "run.partial")
    select = RandomRouting.select

    def recorded(self: RandomRouting, view: SiteView) -> Tensor:
        if view.index == 0:
            random_steps.append(training.step)
        return select(self, view)

    monkeypatch.setattr(RandomRouting, "select", recorded)
    training.run()
    assert random_steps == list(range(FIRST_RANDOM_STEP, SETTINGS.steps))


def test_random_routing_that_grows_reaches_its_share_at_the_end(
    tiny_corpus: Corpus, tiny_config: BackboneConfig
) -> None:
    """From nothing before a quarter of 20 steps, in equal parts, to all of it."""
    settings = replace(SETTINGS, random_schedule="linear")
    training = Pretraining(tiny_corpus, tiny_config, settings, "cpu", cache_folder() / "run.partial")
    shares = []
    for training.step in range(settings.steps):
        shares.append(training._random_share())
    assert shares[:FIRST_RANDOM_STEP] == [0.0] * FIRST_RANDOM_STEP
    assert shares[FIRST_RANDOM_STEP:] == pytest.approx([0.5 * part / 15 for part in range(1, 16)])


def test_consistency_runs_half_of_the_texts_twice(
    tiny_corpus: Corpus, tiny_config: BackboneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many sequences a step as without it, and only where routing is random."""
    batches: list[Tensor] = []
    run = MoETransformer.run

    def recorded(self: MoETransformer, tokens: Tensor, *rest: object) -> object:
        if torch.is_grad_enabled():
            batches.append(tokens)
        return run(self, tokens, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(MoETransformer, "run", recorded)
    settings = replace(SETTINGS, consistency=1.0)
    Pretraining(tiny_corpus, tiny_config, settings, "cpu", cache_folder() / "run.partial").run()
    assert [len(batch) for batch in batches] == [SETTINGS.sequences] * SETTINGS.steps
    twice = [torch.equal(*batch.chunk(2)) for batch in batches]
    assert twice == [step >= FIRST_RANDOM_STEP for step in range(SETTINGS.steps)]


def test_settings_that_came_later_leave_old_backbones_found(tiny_corpus: Corpus, tiny_config: BackboneConfig) -> None:
    """At their defaults they are no part of the key; elsewhere they are."""
    keys = {backbone_key(tiny_corpus, tiny_config, replace(SETTINGS, consistency=weight)) for weight in (0.0, 1.0)}
    assert len(keys) == 2
    assert "consistency" not in shaping(SETTINGS)
    assert set(shaping(replace(SETTINGS, consistency=1.0))) - set(shaping(SETTINGS)) == {"consistency"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"random_units": ()}, "random_units must name what is drawn, got none"),
        ({"random_units": ("layers",)}, "random_units must be some of heads, .*, got 'layers'"),
        ({"random_units": ("heads", "sequence_heads")}, "one of heads and sequence_heads, got both"),
        ({"random_schedule": "cosine"}, "random_schedule must be one of constant, linear, got 'cosine'"),
        ({"consistency": -1.0}, "consistency must be at least 0, got -1.0"),
    ],
)
def test_refuses_what_cannot_be_drawn(changes: dict[str, object], message: str) -> None:
    """Name, rule, actual value."""
    with pytest.raises(ValueError, match=message):
        PretrainConfig(**changes)  # type: ignore[arg-type]
