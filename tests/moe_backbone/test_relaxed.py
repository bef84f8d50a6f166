"""Switches give the gradient of turning one unit round; compensation stands in for what is skipped."""

import pytest
import torch
from torch import Tensor

from moe_backbone import BackboneConfig, MoETransformer, NativeRouter
from moe_backbone.attention import projection_by_head
from moe_backbone.compensation import Compensation, ExpertCompensation
from moe_backbone.kernels import kept_head_attention
from moe_backbone.switched_heads import switch_kept_heads

MEANINGS = ["query", "query_key_value"]
SIZES = dict(hidden_size=16, num_layers=1, num_heads=4, num_experts=5, top_k=2, intermediate_size=8, seq_len=6)


def backbone(meaning: str = "query", **changes) -> MoETransformer:
    made = MoETransformer(BackboneConfig(**(SIZES | changes))).requires_grad_(False)
    made.head_meaning = meaning
    if made.expert_layers[0].vector is not None:
        made.expert_layers[0].vector.normal_()
    return made


def trained_compensation(made: MoETransformer) -> Compensation:
    compensation = Compensation(made.sites, made.hidden_size)
    for weight in compensation.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return compensation.requires_grad_(False)


def run(made: MoETransformer, tokens: Tensor, subsets: list[Tensor], switched: int | None = None):
    """Update of the residual stream at site `switched`, and its switch; else the final hidden state."""
    state = made.begin(tokens)
    for index, subset in enumerate(subsets):
        before = state.hidden
        if index == switched:
            switch = subset.float().requires_grad_()
            return made.advance(state, subset, switch).hidden - before, switch
        state = made.advance(state, subset)
    return state.hidden, None


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(256, (2, 6))


@pytest.fixture
def subsets() -> list[Tensor]:
    chosen = [torch.rand(12, units) < 0.5 for units in (4, 5)]
    chosen[1][0], chosen[1][1] = False, torch.arange(5) == 2  # none, and a lone expert
    return chosen


@pytest.mark.parametrize("mixing", ["renormalize", "keep", "gate_vector"])
@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize(("site", "meaning"), [(0, "query"), (0, "query_key_value"), (1, "query")])
def test_gradient_of_a_switch_is_what_turning_the_unit_round_changes(
    tokens, subsets, mixing, compensated, site, meaning
):
    made = backbone(meaning, mixing=mixing)
    made.use_compensation(trained_compensation(made) if compensated else None)
    update, switch = run(made, tokens, subsets, site)
    pull = torch.randn(2, 6, 16)
    (gradient,) = torch.autograd.grad((update * pull).sum(), switch)
    for row in (0, 1, 5, 11):
        for unit in range(switch.shape[1]):
            turned = [subset.clone() for subset in subsets]
            turned[site][row, unit] ^= True
            other, _ = run(made, tokens, turned, site)
            sign = 1 if turned[site][row, unit] else -1
            expected = sign * ((other - update) * pull).sum()
            assert gradient[row, unit].item() == pytest.approx(expected.item(), abs=2e-5)


@pytest.mark.parametrize("meaning", MEANINGS)
def test_switch_leaves_the_values_as_they_are(tokens, subsets, meaning):
    made = backbone(meaning)
    plain, _ = run(made, tokens, subsets)
    for site in (0, 1):
        state = made.begin(tokens)
        for index, subset in enumerate(subsets):
            state = made.advance(state, subset, subset.float() if index == site else None)
        assert torch.allclose(state.hidden, plain, atol=1e-6)


@pytest.mark.parametrize("mixing", ["renormalize", "keep", "gate_vector"])
@pytest.mark.parametrize("meaning", MEANINGS)
def test_degrees_of_zero_and_one_are_a_subset(tokens, subsets, mixing, meaning):
    made = backbone(meaning, mixing=mixing)
    state = made.begin(tokens)
    for subset in subsets:
        state = made.advance(state, None, subset.float())
    assert torch.allclose(state.hidden, run(made, tokens, subsets)[0], atol=1e-6)


def one_key(subset: Tensor | None, switch: Tensor, strength: float = 0.0) -> Tensor:
    """Outputs of two tokens with values 6 and 2 in one head, whose first key weighs exp(strength) for the second."""
    hidden = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    columns = [[0.0, 0.0], [2**0.5, 0.0]], [[strength, 0.0], [0.0, 0.0]], [[6.0, 0.0], [2.0, 0.0]]
    projection = torch.cat([torch.tensor(part) for part in columns], dim=1).unsqueeze(0)
    rotation, output = torch.stack((torch.ones(2, 1), torch.zeros(2, 1))), torch.eye(2).unsqueeze(0)
    return switch_kept_heads(hidden, torch.ones(1, 2, 1), subset, switch, projection, output, rotation)[0, :, 0]


def test_a_key_by_hand():
    for first, expected in ((True, [6.0, 4.0]), (False, [0.0, 2.0])):
        subset = torch.tensor([[[first], [True]]])
        switch = subset.float().requires_grad_()
        update = one_key(subset, switch)
        assert update.tolist() == expected
        assert torch.autograd.grad(update[1], switch)[0].flatten().tolist() == [2.0, expected[1]]
    half = torch.tensor([[[0.5], [1.0]]], requires_grad=True)
    update = one_key(None, half)  # weights 1/2 and 1 of values 6 and 2
    torch.testing.assert_close(update[1], torch.tensor(10 / 3))
    (gradient,) = torch.autograd.grad(update[1], half)  # (6 - 10/3) / 1.5
    torch.testing.assert_close(gradient[0, 0, 0], torch.tensor(16 / 9))


@pytest.mark.parametrize("strength", [-200.0, -30.0, 30.0, 200.0])
def test_a_key_of_any_strength_has_a_finite_gradient(strength):
    for first in (True, False):
        subset = torch.tensor([[[first], [True]]])
        switch = subset.float().requires_grad_()
        update = one_key(subset, switch, strength)
        assert update[1].item() == pytest.approx(6.0 if first and strength > 0 else 2.0, abs=1e-5)
        (gradient,) = torch.autograd.grad(update[1], switch)
        assert gradient.isfinite().all()
        if not first:
            assert gradient[0, 0, 0].item() == pytest.approx(4.0 if strength > 0 else 0.0, abs=1e-4)


def test_switched_heads_are_those_of_the_op_with_its_gradients(tokens, subsets):
    made = backbone("query_key_value", head_gate=True)
    attention, rotation = made.attentions[0], made.rotation
    (projection,) = projection_by_head(attention.query, attention.key_value)
    chosen, weights = subsets[0].unflatten(0, (2, 6)), torch.rand(2, 6, 4, requires_grad=True)
    hidden, switch = torch.randn(2, 6, 16, requires_grad=True), chosen.float()
    ways = (
        switch_kept_heads(hidden, weights, chosen, switch, projection, attention.output, rotation),
        kept_head_attention(hidden, weights, chosen, projection, attention.output, rotation, [], "reference")[0],
    )
    torch.testing.assert_close(*ways)
    pull = torch.randn(2, 6, 16)
    torch.testing.assert_close(*(torch.autograd.grad((way * pull).sum(), (hidden, weights)) for way in ways))


def test_switches_that_drop_keys_need_whole_sequences(tokens, subsets):
    made = backbone("query_key_value")
    state = made.begin(tokens, cache=made.new_cache())
    with pytest.raises(ValueError, match="cache must be None where switches drop keys"):
        made.advance(state, subsets[0], subsets[0].float())


def test_native_routing_needs_no_compensation(tokens):
    made = backbone()
    plain, _ = made.run(tokens, NativeRouter())
    router = NativeRouter()
    router.compensation = trained_compensation(made)
    assert torch.equal(made.run(tokens, router)[0], plain)
    assert made.compensation is None


def test_compensation_in_hand_worked_numbers(tokens):
    made = backbone()
    compensation = trained_compensation(made)
    state = made.begin(tokens)
    subset = torch.ones(12, 4, dtype=torch.bool)
    subset[3, 1] = subset[3, 2] = False
    plain = made.advance(state, subset).hidden
    with made.compensated(compensation):
        moved = made.advance(state, subset).hidden - plain
    expected = torch.zeros(12, 16)
    expected[3] = compensation[0].vectors[1] + compensation[0].vectors[2]
    assert torch.allclose(moved.flatten(0, 1), expected, atol=1e-6)
    experts = ExpertCompensation(made.sites[1], 2)
    experts.scale.data[:] = torch.tensor([3.0, 0.5])
    experts.vectors.data[:] = torch.tensor([[1.0, 2.0], [4.0, 5.0]])
    after = experts(torch.tensor([[0.0, 0.0], [2.0, 2.0], [2.0, 2.0], [7.0, 7.0]]), torch.tensor([0, 1, 2, 5]))
    assert after.tolist() == [[1.0, 2.0], [5.0, 6.0], [2.0, 2.0], [7.0, 7.0]]


def test_compensation_is_no_part_of_the_backbone(tokens):
    made = backbone()
    before, names = made.sha256(), set(made.state_dict())
    made.use_compensation(trained_compensation(made))
    assert made.sha256() == before
    assert set(made.state_dict()) == names


def test_cost_of_the_constants_is_counted():
    made = backbone()
    assert Compensation(made.sites, 16).flops == 2 * 4 * 16 + 2 * 16
