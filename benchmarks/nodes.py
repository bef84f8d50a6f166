"""Experts spread over nodes: what is sent and waited for, on real ranks and predicted for many nodes.

python -m benchmarks.nodes runs/NAME                      # the run's backbone, native and learned routing
python -m benchmarks.nodes runs/NAME runs/NODES           # and a router of the same backbone, trained with --env.nodes

Each placement runs on 2 and 4 processes by gloo; the output must be that of the whole model. The prediction uses the
same placements and counts: tokens, rows and bytes must then agree exactly. Seconds come from rates measured on 2 ranks
under round robin; the other placements and 4 ranks check them. With more processes than cores these take turns: what
that makes a forward pass longer is waiting.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.measure import on_ranks
from commands import ending
from moe_backbone import MoETransformer, NativeRouter, Router, ranks, token_correct
from moe_backbone.checks import require
from moe_backbone.expert_parallel import Spent, spread_experts
from moe_backbone.files import write_text_atomic
from moe_backbone.placement import RULES, Placement, Traffic, count_traffic, place_experts
from policies.baselines.fixed import TopK
from policies.baselines.randomized import RandomK
from policies.portable import load_router
from train_rl import load_run

TOLERANCE = 1e-4
"""Largest difference of a logit from the whole model's, of numbers summed in another order."""
ROUNDS = 5
NODES = 4
"""Of the comparison of routers."""
SMALL, LARGE = 16, 4096
EXCHANGES = 3
"""All-to-alls of a layer: how many rows, the rows, what became of them."""


@dataclass(frozen=True, kw_only=True)
class NodesConfig:
    """Measure and predict."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders; the first gives the backbone."""
    price: float = 0.3
    """Of the learned router that is run on real ranks."""
    sequences: int = 8
    """Test windows of each rank."""
    simulated: tuple[int, ...] = (8, 16, 64, 256, 1024)
    """Nodes that are predicted."""
    tokens_per_node: int = 64
    """Of the prediction."""
    max_tokens: int = 16_384
    """Test tokens of the comparison of routers."""
    output: Path = Path("runs/nodes.json")
    """Where the figures are kept."""
    worker: Path | None = None
    """Used by the command itself: where a rank leaves its figures."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of this machine, seconds: of a layer's experts before the first row, of a row, of a byte sent, of an exchange."""

    layer: float
    row: float
    byte: float
    exchange: float

    @classmethod
    def measured(cls, found: dict[str, Any], num_layers: int) -> Rates:
        """From a job of 2 ranks, each of which had a core: native and learned routing, round robin.

        An exchange is what is left of the waiting when rows and bytes are taken off: the messages themselves, and that
        ranks do not come to it at the same moment.
        """
        small, large = (found["exchanges"][str(rows)] for rows in (SMALL, LARGE))
        byte = max(0.0, large - small) / (4 * (LARGE - SMALL))
        cases = (found["cases"][f"{name} round_robin"] for name in ("native", "learned"))
        (many, slow, waiting), (few, fast, _) = map(summary, cases)
        rows = [float(traffic.rows.double().mean()) for traffic in (many, few)]
        row = max(0.0, slow - fast) / (rows[0] - rows[1])
        layer = max(0.0, slow - row * rows[0]) / num_layers
        busiest = float(many.rows.double().max()) - rows[0]
        left = waiting - row * busiest - byte * float(many.sent.max())
        return cls(layer=layer, row=row, byte=byte, exchange=max(small, left / (EXCHANGES * num_layers)))


def routers(config: NodesConfig, backbone: MoETransformer) -> dict[str, Router]:
    """What is run on real ranks."""
    return {"native": NativeRouter(), "learned": load_router(config.runs[0], backbone).at_price(config.price)}


def loads(subsets: Sequence[Tensor]) -> list[Tensor]:
    """Rows of each expert, for each layer."""
    return [subset.sum(0) for subset in subsets[1::2]]


@torch.no_grad()
def work(config: NodesConfig) -> None:
    """What one rank does: every placement under every router, rounds interleaved."""
    assert config.worker is not None
    ranks.join("cpu")
    _, corpus, backbone = load_run(config.runs[0], "cpu")
    assert isinstance(backbone, MoETransformer)
    size, own = ranks.world_size(), ranks.rank()
    windows = corpus.test.windows(backbone.config.seq_len, size * config.sequences * backbone.config.seq_len)[0]
    tokens = windows[own * config.sequences : (own + 1) * config.sequences]
    every = {name: backbone.run(windows, router)[1] for name, router in routers(config, backbone).items()}
    cases = []
    for name, router in routers(config, backbone).items():
        expected = backbone.run(tokens, router)[0]
        for rule in RULES:
            placements = [place_experts(rule, size, load) for load in loads(every[name])]
            spread = deepcopy(backbone)
            cases.append((name, rule, router, expected, spread, spread_experts(spread, placements)))
    found: dict[str, Any] = {}
    for _ in range(ROUNDS):
        for name, rule, router, expected, spread, runs in cases:
            for run in runs:
                run.reset()
            logits = spread.run(tokens, router)[0]
            rounds = found.setdefault(f"{name} {rule}", {"error": 0.0, "spent": []})
            rounds["error"] = max(rounds["error"], float((logits - expected).abs().max()))
            rounds["spent"].append(ranks.gather([tuple(run.spent) for run in runs]))
    exchanges = {rows: exchange_seconds(rows) for rows in (SMALL, LARGE)}
    write_text_atomic(config.worker, json.dumps({"cases": found, "exchanges": exchanges}))
    ranks.leave()


def exchange_seconds(rows: int) -> float:
    """Median time of an all-to-all of this many float32 for each rank."""
    sent, received, seconds = torch.zeros(ranks.world_size(), rows), torch.empty(ranks.world_size(), rows), []
    for _ in range(50):
        started = time.perf_counter()
        dist.all_to_all_single(received, sent)
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))


def summary(case: dict[str, Any]) -> tuple[Traffic, float, float]:
    """Traffic of a case over its sites, and its medians: seconds in experts and in all-to-all, the mean rank's."""
    rounds = np.array(case["spent"], dtype=float)  # rounds, ranks, sites, fields
    by_rank = rounds.sum(2)
    columns = [torch.tensor(by_rank[0, :, Spent._fields.index(name)]).long() for name in ("tokens", "rows", "sent")]
    computing, waiting = (np.median(by_rank[:, :, place].mean(1)) for place in (3, 4))
    return Traffic(*columns), float(computing), float(waiting)


def predict(
    subsets: Sequence[Tensor], placements: Sequence[Placement], hidden_size: int, rates: Rates
) -> tuple[Traffic, float, float, float]:
    """What nodes would do that share these tokens evenly: traffic, mean imbalance, and seconds as in `summary`."""
    num_nodes, traffics = placements[0].num_nodes, []
    generator = torch.Generator().manual_seed(0)
    computing = waiting = 0.0
    for subset, placement in zip(subsets[1::2], placements, strict=True):
        homes = torch.arange(len(subset)) * num_nodes // len(subset)
        width = int(placement.hosts.sum(1).max())
        sizes = (4 * (hidden_size + 2 * width), 4 * hidden_size)
        traffic = count_traffic(placement.destinations(subset, generator), homes, num_nodes, sizes)
        busy = rates.layer + traffic.rows.double() * rates.row
        computing += float(busy.mean())
        waiting += float(busy.max() - busy.mean()) + EXCHANGES * rates.exchange + float(traffic.sent.max()) * rates.byte
        traffics.append(traffic)
    total = Traffic(*(sum(getattr(one, name) for one in traffics) for name in ("tokens", "rows", "sent")))
    return total, float(np.mean([traffic.imbalance for traffic in traffics])), computing, waiting


@torch.no_grad()
def compare_routers(config: NodesConfig, backbone: MoETransformer, windows: Tensor, targets: Tensor) -> Table:
    """Nodes that a token is sent to and the busiest node's load, at 99 and 98 % of native accuracy."""
    curves: dict[str, list[Router]] = {
        "native": [NativeRouter()],
        "top-k": [TopK(count) for count in range(1, backbone.config.top_k + 1)],
        "random-k": [RandomK(count, seed=0) for count in range(2, 13)],
    }
    for folder in config.runs:
        router = load_router(folder, backbone)
        curves[f"learned, {folder}"] = [router.at_price(float(price)) for price in np.geomspace(0.01, 2.5, 14)]
    shown = Table(
        "router",
        *(f"{what} at {share} %" for share in (99, 98) for what in ("nodes a token", "busiest node")),
        title=f"{NODES} nodes, round robin; means over layers, at shares of native accuracy",
        title_justify="left",
    )
    native = None
    for name, settings in curves.items():
        rows = np.array([_nodes_of(backbone, router, windows, targets) for router in settings])
        if native is None:
            native = rows[0, 0]
            shown.add_row(name, f"{rows[0, 1]:.3f} (100 %)", f"{rows[0, 2]:.3f}", "", "")
            continue
        shown.add_row(name, *(cell for share in (0.99, 0.98) for cell in _at(rows, share * native)))
    return shown


def _nodes_of(backbone: MoETransformer, router: Router, windows: Tensor, targets: Tensor) -> tuple[float, float, float]:
    """Accuracy, nodes that a token is sent to, and rows of the busiest node over the mean."""
    correct, used = [], []
    for start in range(0, len(windows), 32):
        logits, subsets = backbone.run(windows[start : start + 32], router)
        correct.append(token_correct(logits, targets[start : start + 32]).double().mean())
        used.append(subsets[1::2])
    nodes, busiest = [], []
    for subset in (torch.cat(parts) for parts in zip(*used, strict=True)):
        placement = place_experts("round_robin", NODES, subset.sum(0))
        homes = torch.zeros(len(subset), dtype=torch.int64)
        traffic = count_traffic(placement.destinations(subset), homes, NODES, (0, 0))
        nodes.append(int(traffic.tokens.sum()) / len(subset))
        busiest.append(traffic.imbalance)
    return float(torch.stack(correct).mean()), float(np.mean(nodes)), float(np.mean(busiest))


def _at(rows: Any, accuracy: float) -> tuple[str, str]:
    """Linear between settings, at the last accuracy below the goal; `-` where the router never reaches it."""
    order = rows[rows[:, 0].argsort()]
    if not order[0, 0] <= accuracy <= order[-1, 0]:
        return "-", "-"
    nodes, busiest = (f"{np.interp(accuracy, order[:, 0], order[:, column]):.3f}" for column in (1, 2))
    return nodes, busiest


def run(config: NodesConfig) -> None:
    """Measure on 2 and 4 ranks, check the prediction, predict further, compare routers."""
    require(len(config.runs) > 0, "runs must name a run folder, got none")
    _, corpus, backbone = load_run(config.runs[0], "cpu")
    require(isinstance(backbone, MoETransformer), "run must be of a backbone of our own, got a checkpoint")
    assert isinstance(backbone, MoETransformer)
    words = [*map(str, config.runs), "--price", str(config.price), "--sequences", str(config.sequences)]
    measured = {size: on_ranks("benchmarks.nodes", words, size) for size in (2, 4)}
    rates = Rates.measured(measured[2], backbone.config.num_layers)
    console, predicted = Console(width=170), dict[str, Any]()
    console.print(real(config, corpus, backbone, measured, rates))
    console.print(further(config, corpus, backbone, rates, predicted))
    windows, targets, _ = corpus.test.windows(backbone.config.seq_len, config.max_tokens)
    console.print(compare_routers(config, backbone, windows, targets))
    kept = {"rates": vars(rates), "measured": measured, "predicted": predicted}
    write_text_atomic(config.output, json.dumps(kept, indent=1) + "\n")


@torch.no_grad()
def real(
    config: NodesConfig, corpus: Any, backbone: MoETransformer, measured: dict[int, dict[str, Any]], rates: Rates
) -> Table:
    """What ranks did, beside what was predicted of them.

    Raises:
        ValueError: If an output was not the whole model's.
    """
    seen = ("tokens, mean node", "busiest / mean", "KiB sent", "ms computing", "ms waiting")
    told = ("predicted: counts", "ms computing", "ms waiting")
    shown = Table("ranks, router, placement", *seen, *told, title="a forward pass on real ranks", title_justify="left")
    for size, found in measured.items():
        windows = corpus.test.windows(backbone.config.seq_len, size * config.sequences * backbone.config.seq_len)[0]
        sharing = max(1.0, size / (os.cpu_count() or 1))
        for case, rounds in found["cases"].items():
            rule = f"output of {case} must be the whole model's"
            require(rounds["error"] < TOLERANCE, f"{rule}, got one that is {rounds['error']} off")
            name, placement = case.split()
            subsets = backbone.run(windows, routers(config, backbone)[name])[1]
            placements = [place_experts(placement, size, load) for load in loads(subsets)]
            expected, _, busy, idle = predict(subsets, placements, backbone.config.hidden_size, rates)
            traffic, computing, waiting = summary(rounds)
            pairs = ((getattr(traffic, field), getattr(expected, field)) for field in ("tokens", "rows", "sent"))
            equal = "equal" if all(torch.equal(*pair) for pair in pairs) else "DIFFERENT"
            counts = (traffic.tokens.double().mean(), traffic.imbalance, traffic.sent.sum() / 1024)
            times = (f"{1e3 * seconds:.1f}" for seconds in (computing, waiting))
            hopes = (f"{1e3 * seconds:.1f}" for seconds in (busy, sharing * (busy + idle) - busy))
            cells = (f"{counts[0]:.0f}", f"{counts[1]:.3f}", f"{counts[2]:.0f}", *times)
            shown.add_row(f"{size} {case}", *cells, "drawn" if placement == "random" else equal, *hopes)
    return shown


@torch.no_grad()
def further(config: NodesConfig, corpus: Any, backbone: MoETransformer, rates: Rates, kept: dict[str, Any]) -> Table:
    """The prediction for many nodes, each with as many tokens and a core of its own."""
    shown = Table(
        "nodes", "router", "placement", "busiest / mean", "KiB sent a node", "share of time waiting",
        title=f"predicted, {config.tokens_per_node} tokens a node", title_justify="left",
    )  # fmt: skip
    for name, router in routers(config, backbone).items():
        most = max(config.simulated) * config.tokens_per_node
        windows = corpus.test.windows(backbone.config.seq_len, most)[0]
        parts = [backbone.run(windows[start : start + 32], router)[1] for start in range(0, len(windows), 32)]
        subsets = [torch.cat(site) for site in zip(*parts, strict=True)]
        for size in config.simulated:
            count = min(size * config.tokens_per_node, len(subsets[0]))
            own = [subset[:count] for subset in subsets]
            for rule in RULES:
                placements = [place_experts(rule, size, load) for load in loads(own)]
                traffic, imbalance, busy, idle = predict(own, placements, backbone.config.hidden_size, rates)
                figures = (imbalance, float(traffic.sent.double().mean()) / 1024, idle / (busy + idle))
                kept[f"{size} {name} {rule}"] = figures
                shown.add_row(str(size), name, rule, f"{figures[0]:.2f}", f"{figures[1]:.1f}", f"{figures[2]:.2f}")
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    config = tyro.cli(NodesConfig, description=__doc__, args=arguments)
    with ending():
        work(config) if config.worker is not None else run(config)


if __name__ == "__main__":
    main()
