"""Switches give the gradient of turning one unit round; compensation stands in for what is skipped."""

import pytest
import torch
from torch import Tensor

from moe_backbone import BackboneConfig, MoETransformer, NativeRouter
from moe_backbone.compensation import Compensation, ExpertCompensation

SIZES = dict(hidden_size=16, num_layers=1, num_heads=4, num_experts=5, top_k=2, intermediate_size=8, seq_len=6)


def backbone(**changes) -> MoETransformer:
    made = MoETransformer(BackboneConfig(**(SIZES | changes))).requires_grad_(False)
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
@pytest.mark.parametrize("site", [0, 1])
def test_gradient_of_a_switch_is_what_turning_the_unit_round_changes(tokens, subsets, mixing, compensated, site):
    made = backbone(mixing=mixing)
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


def test_switch_leaves_the_values_as_they_are(tokens, subsets):
    made = backbone()
    plain, _ = run(made, tokens, subsets)
    for site in (0, 1):
        state = made.begin(tokens)
        for index, subset in enumerate(subsets):
            state = made.advance(state, subset, subset.float() if index == site else None)
        assert torch.allclose(state.hidden, plain, atol=1e-6)


@pytest.mark.parametrize("mixing", ["renormalize", "keep", "gate_vector"])
def test_degrees_of_zero_and_one_are_a_subset(tokens, subsets, mixing):
    made = backbone(mixing=mixing)
    state = made.begin(tokens)
    for subset in subsets:
        state = made.advance(state, None, subset.float())
    assert torch.allclose(state.hidden, run(made, tokens, subsets)[0], atol=1e-6)


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
