"""Started by torchrun: experts over ranks, held against the whole model; the first rank prints JSON.

python expert_job.py RULE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor

from moe_backbone import BackboneConfig, MoETransformer, NativeRouter, SiteView, ranks
from moe_backbone.expert_parallel import measured_traffic, spread_experts
from moe_backbone.placement import count_traffic, place_experts

SIZES = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_experts": 5, "top_k": 2}
CONFIG = BackboneConfig(intermediate_size=16, seq_len=16, shared_intermediate_size=8, **SIZES)


class RandomSubsets:
    """Each unit with chance one half; some tokens use none."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(ranks.rank())

    def select(self, view: SiteView) -> Tensor:
        """bool (num_tokens, num_units)."""
        return torch.rand(view.scores.shape, generator=self.generator) < 0.5


@torch.no_grad()
def main(rule: str) -> None:
    """Every rank has another batch, the last one an empty one."""
    ranks.join("cpu")
    torch.manual_seed(0)
    whole, spread = MoETransformer(CONFIG).eval(), MoETransformer(CONFIG).eval()
    spread.load_state_dict(whole.state_dict())
    size = ranks.world_size()
    runs = spread_experts(spread, [place_experts(rule, size, torch.arange(5))] * 2)  # type: ignore[arg-type]
    last = ranks.rank() == size - 1 and size > 2
    tokens = torch.randint(
        CONFIG.vocab_size, (0 if last else 3 + ranks.rank(), 16), generator=RandomSubsets().generator
    )
    errors = []
    for router in (NativeRouter, RandomSubsets):
        expected, subsets = whole.run(tokens, router())
        for run in runs:
            run.reset()
        outcome, _ = spread.run(tokens, router())
        errors.append(0.0 if last else float((outcome - expected).abs().max()))
    found, homes, counted = measured_traffic(runs[0]), [], []
    for rank, subset in enumerate(ranks.gather(subsets[1])):
        homes.append(torch.full((len(subset),), rank))
        counted.append(subset)
    where = runs[0].placement.destinations(torch.cat(counted))
    expected_traffic = count_traffic(where, torch.cat(homes), size, runs[0].row_bytes(32))
    same = all(
        torch.equal(getattr(found, name), getattr(expected_traffic, name)) for name in ("tokens", "rows", "sent")
    )
    experts = [len(layer.down) for layer in spread.expert_layers]  # type: ignore[arg-type]
    outcome = ranks.gather({"errors": errors, "experts": experts})
    if ranks.is_first():
        print(json.dumps({"ranks": outcome, "same_traffic": same, "rows": found.rows.tolist()}))
    ranks.leave()


if __name__ == "__main__":
    main(sys.argv[1])
