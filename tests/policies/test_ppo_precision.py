"""PPO in 16 bits: what is lowered, what stays float32, and that it learns and resumes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from envs.planted import planted_backbone
from moe_backbone import MoETransformer
from policies.routing_ppo import RoutingPPO
from train_rl import main
from training_config import PPOConfig


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_rollouts_are_lowered_and_their_numbers_are_not(make_model: Callable[..., Any], precision: Any) -> None:
    """The environment runs in 16 bits, native routing too; what PPO computes with is float32."""
    ran = []

    class Watched(MoETransformer):
        def finish(self, state: Any) -> torch.Tensor:
            ran.append(torch.is_autocast_enabled("cpu"))
            return super().finish(state)

    backbone = planted_backbone()
    backbone.__class__ = Watched
    model = make_model(backbone=backbone, precision=precision)
    episode = model.collect()
    assert ran == [False, True, True]  # SB3's reset, whose episode is not learned from; native; routed
    assert {part.dtype for part in episode} == {torch.float32, torch.bool}
    assert not torch.is_autocast_enabled("cpu")
    model.train()
    figures = model.logger.name_to_value
    assert abs(figures["train/approx_kl"]) < 1e-3  # of the first look at what was just drawn: nothing has moved yet
    assert all(weight.dtype == torch.float32 for weight in model.router.parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_learns_about_what_full_precision_learns(make_model: Callable[..., Any], precision: Any) -> None:
    """Weights after an update point the same way."""
    moved = []
    for chosen in ("fp32", precision):
        model = make_model(precision=chosen)
        before = model.router_weights()
        for _ in range(3):
            model.one_update()
        moved.append(model.router_weights() - before)
    assert torch.cosine_similarity(*moved, dim=0) > 0.5
    assert not torch.equal(*moved)


def test_gae_takes_bf16_and_refuses_fp16(make_model: Callable[..., Any]) -> None:
    """Its update scales no loss."""
    make_model(advantage="gae", precision="bf16").learn(64)
    with pytest.raises(ValueError, match="precision must be 'fp32' or 'bf16' for gae"):
        make_model(advantage="gae", precision="fp16")
    with pytest.raises(ValueError, match="precision must be fp32 or bf16 for advantage gae, got fp16"):
        PPOConfig(advantage="gae", precision="fp16")
    with pytest.raises(ValueError, match="precision must be one of"):
        PPOConfig(precision="half")  # type: ignore[arg-type]


def test_interrupted_run_in_16_bits_ends_like_one_that_was_not(
    tiny_run: Any, shared_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale of the loss goes on where it was."""
    words = {"ppo__precision": "fp16", "evaluation__routers": "top-k"}
    main(tiny_run.words(tmp_path / "whole", **words))
    train, calls = RoutingPPO.train, []

    def stopping(self: RoutingPPO) -> None:
        calls.append(self.scaler.get_scale())
        if len(calls) == 2:
            raise KeyboardInterrupt
        train(self)

    with monkeypatch.context() as patch:
        patch.setattr(RoutingPPO, "train", stopping)
        with pytest.raises(SystemExit):
            main(tiny_run.words(tmp_path / "run", **words))
    main(["--resume", str(tmp_path / "run")])
    assert tiny_run.same_weights(tmp_path / "run", tmp_path / "whole")
