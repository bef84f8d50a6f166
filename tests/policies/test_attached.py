"""A router in a trained model of transformers: generation, padding, batches, budgets, refusals, and no trace behind."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("greenlet")

from trained_families import ALL, FAMILIES, ROUNDING, Trained, bare_logits, difference, feature_router

import policies
from moe_backbone import ComputeMeter, NativeRouter
from moe_backbone.huggingface import HuggingFaceBackbone
from moe_backbone.kernels import count_rows
from policies.calibration import calibrate
from policies.portable import DESCRIPTION, WEIGHTS, save_router

PRICES = (0.05, 0.2, 0.8)


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, train_family: Callable[[str], Trained]) -> Trained:
    """Each family."""
    return train_family(request.param)


@pytest.fixture
def mixtral(train_family: Callable[[str], Trained]) -> Trained:
    """One family, where all go the same way."""
    return train_family("mixtral")


@pytest.fixture
def any_model(request: pytest.FixtureRequest, train_family: Callable[[str], Trained]) -> Trained:
    """Each family, and the model without experts."""
    return train_family(request.param)


def _saved(model: Trained, folder: Path, *, calibrated: bool = False) -> Path:
    """Folder of a router for this model."""
    backbone = HuggingFaceBackbone(model.load(), seq_len=24)
    router = feature_router(backbone)
    if calibrated:
        router.calibration = calibrate(router, backbone, model.tokens(), PRICES)
    save_router(router, folder, backbone)
    return folder


def _snapshot(model: Any) -> dict[str, Any]:
    """All that an attached router might leave in a model: attributes, hooks, training flags and implementations."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            found[f"{name}.{key}"] = dict(value) if isinstance(value, dict) else value
    found |= {f"config.{key}": value for key, value in vars(model.config).items()}
    found["implementations"] = model.config._experts_implementation, model.config._attn_implementation
    found["classes"] = [type(module) for module in model.modules()]
    return found


def _same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if str(one[key]) != str(other[key])] == []


def _generated(model: Any, prompt: Tensor, *, sample: bool) -> Tensor:
    torch.manual_seed(11)
    how: dict[str, Any] = {"max_new_tokens": 20, "do_sample": sample, "pad_token_id": 0}
    if sample:
        how |= {"temperature": 0.9, "top_k": 50}
    tokens: Tensor = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **how)
    return tokens


def test_native_routing_generates_what_the_bare_model_does(model: Trained) -> None:
    """Greedy and sampled with a seed, token for token, while attached and afterwards."""
    prompt, loaded = model.tokens(3, 12), model.load()
    expected = [_generated(loaded, prompt, sample=sample) for sample in (False, True)]
    routed = policies.attach(loaded, NativeRouter())
    assert all(torch.equal(_generated(routed, prompt, sample=bool(i)), expected[i]) for i in (0, 1))
    assert routed.compute == pytest.approx(1.0)
    routed.detach()
    assert all(torch.equal(_generated(loaded, prompt, sample=bool(i)), expected[i]) for i in (0, 1))
    assert not torch.equal(*expected), "sampling must matter"


@pytest.mark.parametrize("training", [False, True])
def test_detach_leaves_nothing_behind(model: Trained, training: bool) -> None:
    """Logits to the bit, hooks, attributes, implementations and the training flag, however it was attached."""
    loaded, tokens = model.load(), model.tokens(2)
    loaded.train(training)
    torch.manual_seed(0)
    bare, before = bare_logits(loaded, tokens), _snapshot(loaded)
    routed = policies.attach(loaded, NativeRouter())
    assert not loaded.training
    assert loaded.config._experts_implementation != before["implementations"][0]
    routed.generate(input_ids=tokens, max_new_tokens=3, pad_token_id=0)
    assert routed.detach() is loaded
    _same(before, _snapshot(loaded))
    torch.manual_seed(0)
    assert torch.equal(bare_logits(loaded, tokens), bare)


def test_a_refused_router_leaves_nothing_behind(mixtral: Trained, tmp_path: Path) -> None:
    """Neither does one whose files are damaged, nor one that was not calibrated."""
    folder = _saved(mixtral, tmp_path / "router")
    loaded = mixtral.load().train()
    before = _snapshot(loaded)
    with pytest.raises(ValueError, match="router must be calibrated to follow a cost_limit"):
        policies.attach(loaded, folder, cost_limit=0.5)
    _same(before, _snapshot(loaded))
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-40])
    with pytest.raises(ValueError, match="router folder must hold readable"):
        policies.attach(loaded, folder, price=0.1)
    _same(before, _snapshot(loaded))


@pytest.mark.parametrize("name", ["mixtral", "qwen3"])
@pytest.mark.parametrize("inner_first", [True, False])
def test_one_router_on_top_of_another(train_family: Callable[[str], Trained], name: str, inner_first: bool) -> None:
    """The last one decides until it is detached, then the other, in whichever order they go; of experts and heads."""
    model = train_family(name)
    loaded, tokens = model.load(), model.tokens(2)
    bare, before = bare_logits(loaded, tokens), _snapshot(loaded)
    sparse = policies.attach(loaded, feature_router(HuggingFaceBackbone(model.load())).at_price(0.6))
    steered = bare_logits(loaded, tokens)
    assert difference(steered, bare) > 0.01
    native = policies.attach(loaded, NativeRouter())
    assert difference(bare_logits(loaded, tokens), bare) <= ROUNDING
    if inner_first:
        native.detach()
        assert torch.equal(bare_logits(loaded, tokens), steered)
        native.detach()  # once more changes nothing
        assert torch.equal(bare_logits(loaded, tokens), steered)
        sparse.detach()
    else:
        sparse.detach()
        native.reset_compute()
        assert difference(bare_logits(loaded, tokens), bare) <= ROUNDING
        assert native.compute == pytest.approx(1.0)
        native.detach()
    _same(before, _snapshot(loaded))
    assert torch.equal(bare_logits(loaded, tokens), bare)


def test_a_model_under_a_router_can_be_freed(mixtral: Trained) -> None:
    """Attached for good, and then forgotten."""
    loaded = mixtral.load()
    policies.attach(loaded, NativeRouter())
    bare_logits(loaded, mixtral.tokens(1))
    alive = weakref.ref(loaded)
    del loaded
    gc.collect()
    assert alive() is None


@torch.no_grad()
@pytest.mark.parametrize("any_model", ALL, indirect=True)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_real_token(any_model: Trained, side: str) -> None:
    """Sequences of several lengths in one padded batch, and each by itself."""
    loaded, lengths = any_model.load(), (24, 17, 5)
    sequences = [any_model.tokens()[row, :length] for row, length in enumerate(lengths)]
    tokens, mask = torch.full((3, 24), 7), torch.zeros(3, 24, dtype=torch.int64)
    places = [slice(24 - length, 24) if side == "left" else slice(0, length) for length in lengths]
    for row, (sequence, place) in enumerate(zip(sequences, places, strict=True)):
        tokens[row, place], mask[row, place] = sequence, 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)

    def padded() -> list[Tensor]:
        logits = loaded(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
        return [logits[row, place] for row, place in enumerate(places)]

    def apart() -> float:
        alone = [bare_logits(loaded, sequence[None])[0] for sequence in sequences]
        return max(difference(one, other) for one, other in zip(padded(), alone, strict=True))

    bound, native = max(ROUNDING, apart()), padded()
    routed = policies.attach(loaded, feature_router(HuggingFaceBackbone(any_model.load())).at_price(0.6))
    any_model.tell(f"padding on the {side}, bare model's own {bound:.1e}", apart(), bound)
    assert apart() <= bound
    assert difference(padded()[0], native[0]) > 0.01
    assert routed.compute > 0


@torch.no_grad()
@pytest.mark.parametrize("any_model", ALL, indirect=True)
def test_batches_of_changing_size_give_the_same(any_model: Trained) -> None:
    """While attached: one sequence, five, two, a prefix, and a step with a cache in between."""
    routed = policies.attach(any_model.load(), feature_router(HuggingFaceBackbone(any_model.load())).at_price(0.6))
    tokens = any_model.tokens(5)
    whole = bare_logits(routed.model, tokens)
    for rows, length in ((slice(0, 1), 24), (slice(0, 5), 24), (slice(3, 5), 24), (slice(1, 2), 1), (slice(0, 4), 9)):
        assert difference(bare_logits(routed.model, tokens[rows, :length]), whole[rows, :length]) <= ROUNDING
        cached = routed(input_ids=tokens[:2, :6], use_cache=True)
        step = routed(input_ids=tokens[:2, 6:7], past_key_values=cached.past_key_values).logits
        assert difference(step, whole[:2, 6:7]) <= ROUNDING


@pytest.mark.parametrize("any_model", ALL, indirect=True)
def test_generation_in_a_batch_is_generation_alone(any_model: Trained) -> None:
    """Prompts of several lengths, padded on the left, greedy."""
    routed = policies.attach(any_model.load(), feature_router(HuggingFaceBackbone(any_model.load())).at_price(0.6))
    prompts = [any_model.tokens()[row, :length] for row, length in enumerate((14, 9, 3))]
    batch, mask = torch.zeros(3, 14, dtype=torch.int64), torch.zeros(3, 14, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        batch[row, 14 - len(prompt) :], mask[row, 14 - len(prompt) :] = prompt, 1
    how: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    together = routed.generate(input_ids=batch, attention_mask=mask, **how)
    for row, prompt in enumerate(prompts):
        alone = routed.generate(input_ids=prompt[None], attention_mask=torch.ones_like(prompt[None]), **how)
        assert torch.equal(together[row, 14:], alone[0, len(prompt) :])


# Routers from a folder


def test_dearer_prices_run_less_and_compute_is_what_ran(model: Trained, tmp_path: Path) -> None:
    """Counted by the kernels, with the router's own cost, also over a generation."""
    folder, prompt, loaded = _saved(model, tmp_path / "router"), model.tokens(3, 12), model.load()
    sites, spent = HuggingFaceBackbone(model.load()).sites, []
    for price in PRICES:
        with policies.attach(loaded, folder, price=price) as routed, count_rows() as rows:
            bare_logits(loaded, model.tokens())
            routed.generate(input_ids=prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
            num_tokens = model.tokens().numel() + 3 * (12 + 7)
            flops = rows["experts"] * sites[0].unit_flops + num_tokens * routed.router.overhead_flops
            assert routed.compute == pytest.approx(flops / (num_tokens * ComputeMeter(sites, 1).native_flops))
            spent.append(rows["experts"])
            routed.reset_compute()
            assert routed.compute == 0
    assert spent[0] > spent[1] > spent[2] > 0


def test_a_budget_is_kept_on_the_calibration_text(model: Trained, tmp_path: Path) -> None:
    """To the last unit at calibrated prices, and between them in between; one that no price keeps is refused."""
    folder, loaded = _saved(model, tmp_path / "router", calibrated=True), model.load()
    computes = json.loads((folder / DESCRIPTION).read_text())["calibration"]["computes"]
    for limit in computes:
        with policies.attach(loaded, folder, cost_limit=limit) as routed:
            bare_logits(loaded, model.tokens())
            assert routed.compute == pytest.approx(limit)
    low, high = computes[-1], computes[0]
    with policies.attach(loaded, folder, cost_limit=(low + high) / 2) as routed:
        bare_logits(loaded, model.tokens())
        assert low < routed.compute < high
    with pytest.raises(ValueError, match="cost_limit must be at least"):
        policies.attach(loaded, folder, cost_limit=low / 2)


@pytest.mark.parametrize("given", [{}, {"price": 0.1, "cost_limit": 0.5}], ids=["neither", "both"])
def test_price_or_budget_must_be_given(mixtral: Trained, tmp_path: Path, given: dict[str, float]) -> None:
    folder = _saved(mixtral, tmp_path / "router")
    with pytest.raises(ValueError, match="either price or cost_limit must be given, got price="):
        policies.attach(mixtral.load(), folder, **given)


def test_a_router_object_has_its_price_already(mixtral: Trained) -> None:
    with pytest.raises(ValueError, match="price and cost_limit must be left out"):
        policies.attach(mixtral.load(), NativeRouter(), price=0.1)


def test_another_model_is_refused_by_name(
    mixtral: Trained, train_family: Callable[[str], Trained], tmp_path: Path
) -> None:
    """Of another shape, and of the same shape with other weights: one line that names both."""
    folder, other = _saved(mixtral, tmp_path / "router"), train_family("gpt_oss")
    twin = mixtral.load()
    twin.save_pretrained(tmp_path / "twin")
    twin = Trained(name="mixtral", folder=tmp_path / "twin", loss=0.0, text=mixtral.text).load()
    twin.model.embed_tokens.weight.data.mul_(1.5)
    for wrong in (other.load(), twin):
        with pytest.raises(ValueError) as caught:
            policies.attach(wrong, folder, price=0.1)
        message = str(caught.value)
        assert "\n" not in message
        assert str(mixtral.folder) in message
        assert wrong.config.name_or_path in message
        assert wrong.config.name_or_path != str(mixtral.folder)


@pytest.mark.parametrize("name", [WEIGHTS, DESCRIPTION])
@pytest.mark.parametrize("damage", ["missing", "cut off", "empty"])
def test_damaged_files_are_refused_in_one_line(mixtral: Trained, tmp_path: Path, name: str, damage: str) -> None:
    folder = _saved(mixtral, tmp_path / "router")
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage != "missing":
        (folder / name).write_bytes(content[:-50] if damage == "cut off" else b"")
    with pytest.raises(ValueError, match="router folder must hold readable") as caught:
        policies.attach(mixtral.load(), folder, price=0.1)
    assert "\n" not in str(caught.value)


def test_something_else_than_a_model_or_a_folder_is_refused(mixtral: Trained, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model must be one of transformers, got Linear"):
        policies.attach(torch.nn.Linear(2, 2), NativeRouter())
    with pytest.raises(ValueError, match="router must be a folder or a hub id"):
        policies.attach(mixtral.load(), tmp_path / "nowhere", price=0.1)


def test_padding_is_not_counted(mixtral: Trained) -> None:
    """A prompt costs the same share of native compute alone and behind padding."""
    tokens = mixtral.tokens()[:2, :9]
    pads, model = torch.zeros(2, 7, dtype=torch.int64), mixtral.load()
    with policies.attach(model, feature_router(HuggingFaceBackbone(model, seq_len=24)).at_price(0.2)) as routed:
        routed(input_ids=tokens)
        alone = routed.compute
        routed.reset_compute()
        mask = torch.cat((pads, torch.ones_like(tokens)), dim=1)
        routed(input_ids=torch.cat((pads, tokens), dim=1), attention_mask=mask)
        assert routed.compute == pytest.approx(alone)


def test_a_router_that_does_not_steer_says_so(mixtral: Trained) -> None:
    """Neither below another one nor after it was detached does it pass for the model."""
    model = mixtral.load()
    below, above = policies.attach(model, NativeRouter()), policies.attach(model, NativeRouter())
    for use in (lambda: below(input_ids=mixtral.tokens()), lambda: below.generate):
        with pytest.raises(ValueError, match="router must be attached, and the last one attached to its model"):
            use()
    above.detach()
    assert callable(below.generate)
    below.detach()
    with pytest.raises(ValueError, match="router must be attached"):
        below(input_ids=mixtral.tokens())
