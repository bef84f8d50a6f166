"""The expert op on a GPU against those of others and against the floor, where launches, memory or arithmetic bind.

Bars are the project's own goals for an H200. All sizes are SwiGLU layers in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.experts import Inputs, Sizes
from benchmarks.gpu_machine import Machine, Timing, relative_error
from benchmarks.gpu_rivals import Prepare, Slots, draw, external, installed, slots
from benchmarks.measure import Row
from moe_backbone.kernels import expert_mlp, reference

TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}
"""Relative, in the norm of an output; see `relative_error`."""
LOWER_IS_BETTER = ("microseconds", "launches")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layer, who competes in it, and what it shall reach."""

    name: str
    sizes: Sizes
    any_subset: bool = False
    """Whether rivals must allow every subset, or as many experts for every token."""
    bars: Mapping[str, float]
    """Rival's time over ours, by rival."""
    external_bar: float = 1.0
    """The same for rivals from outside."""
    goals: Mapping[str, float] = field(default_factory=dict)
    """Figures of our own: microseconds and launches at most, fraction_of_floor and tflops at least."""


def _fine_grained(num_tokens: int, hidden_size: int = 2048, intermediate_size: int = 768) -> Sizes:
    return Sizes(
        num_tokens=num_tokens,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_experts=128,
        active=8,
    )


WIDE = Sizes(num_tokens=8192, hidden_size=1024, intermediate_size=2048)
G1 = (
    Case(
        name="small",
        sizes=Sizes(num_tokens=512),
        any_subset=True,
        bars={"grouped_mm": 3.0, "batched_mm": 3.0, "eager": 3.0},
        external_bar=2.0,
    ),
    Case(
        name="medium",
        sizes=Sizes(num_tokens=4096),
        any_subset=True,
        bars={"grouped_mm": 3.0, "eager": 3.0},
        external_bar=2.0,
    ),
    Case(name="wide", sizes=WIDE, any_subset=True, bars={"grouped_mm": 3.0, "eager": 1.0}, external_bar=2.0),
)
G4 = tuple(
    Case(
        name=str(num_tokens),
        sizes=Sizes(num_tokens=num_tokens),
        bars={"grouped_mm": 1.5, "eager": 3.0},
        external_bar=1.5,
        goals={"launches": 5, "microseconds": 25},
    )
    for num_tokens in (256, 1024, 4096)
)
G5 = tuple(
    Case(name=name, sizes=sizes, bars={"grouped_mm": 1.0}, external_bar=0.95, goals={"fraction_of_floor": 0.85})
    for name, sizes in {
        "4-rows": _fine_grained(64),
        "32-rows": _fine_grained(512),
        "8-rows-uneven": _fine_grained(128, hidden_size=2816, intermediate_size=704),
    }.items()
)
G6 = tuple(
    Case(name=f"{num_tokens // 16}-rows", sizes=_fine_grained(num_tokens), bars={"grouped_mm": 1.3}, external_bar=1.3)
    for num_tokens in (1024, 2048, 4096)
)
G7 = tuple(
    Case(
        name=f"{num_tokens // 16}-rows",
        sizes=_fine_grained(num_tokens),
        bars={"grouped_mm": 1.6, "liger": 1.2},
        external_bar=0.85,
        goals={"tflops": 450},
    )
    for num_tokens in (8192, 32768)
)
G3 = Sizes(num_tokens=16384, hidden_size=2048, intermediate_size=1024)
G3_EMPTY = Sizes(num_tokens=4096)
G8 = Sizes(num_tokens=16384, hidden_size=1024, intermediate_size=2048)


def any_subset(machine: Machine) -> Iterator[Row]:
    """G1: any subset allowed, two experts a token on average."""
    return _all(machine, "any-subset", G1)


def launch_bound(machine: Machine) -> Iterator[Row]:
    """G4: sizes at which launches cost more than work."""
    return _all(machine, "launch-bound", G4)


def memory_bound(machine: Machine) -> Iterator[Row]:
    """G5: few rows an expert, so that weights are streamed for little work."""
    return _all(machine, "memory-bound", G5)


def valley(machine: Machine) -> Iterator[Row]:
    """G6: between the two."""
    return _all(machine, "valley", G6)


def compute_bound(machine: Machine) -> Iterator[Row]:
    """G7: many rows an expert."""
    return _all(machine, "compute-bound", G7)


def follows_mask(machine: Machine) -> Iterator[Row]:
    """G3: a quarter of the experts takes about a quarter of the time, and none takes next to none."""
    layers = [_layer(machine, replace(G3, active=active)) for active in (1, 4)]
    few, many = machine.time([replay for _, replay, _ in layers])
    errors = [error for *_, error in layers]
    equal = max(errors) <= TOLERANCES[machine.dtype]
    detail = {"k1": few._asdict(), "k4": many._asdict(), "sizes": asdict(G3), "relative_errors": errors}
    yield machine.row("follows-mask/k1-of-k4", many.median / few.median, 1 / 0.35, equal=equal, **detail)
    inputs = draw(G3_EMPTY, machine.device, machine.dtype, any_subset=True)
    inputs = inputs._replace(subset=torch.zeros_like(inputs.subset))
    run = partial(expert_mlp, *inputs, backend="triton")
    (timing,) = machine.time([machine.captured(run)[0]])
    detail = {"us": timing._asdict(), "sizes": asdict(G3_EMPTY)}
    yield machine.row("follows-mask/empty", 15 / timing.median, 1.0, equal=not run().any(), **detail)


def skew(machine: Machine) -> Iterator[Row]:
    """G8: experts chosen in proportion to 1, 1/2, 1/3, ... against equally often, by time a row."""
    shares = 1 / torch.arange(1, G8.num_experts + 1, device=machine.device)
    layers = [_layer(machine, G8, shares=chosen) for chosen in (None, shares / shares.sum())]
    timings = machine.time([replay for _, replay, _ in layers])
    rows = [int(inputs.subset.sum()) for inputs, *_ in layers]
    uniform, zipf = (timing.median / count for timing, count in zip(timings, rows, strict=True))
    errors = [error for *_, error in layers]
    equal = max(errors) <= TOLERANCES[machine.dtype]
    detail = {"us": [timing._asdict() for timing in timings], "rows": rows, "relative_errors": errors}
    yield machine.row("skew/zipf", uniform / zipf, 1 / 1.25, equal=equal, sizes=asdict(G8), **detail)


def _layer(machine: Machine, sizes: Sizes, shares: Tensor | None = None) -> tuple[Inputs, Callable[[], object], float]:
    """Inputs where any subset may come, our op as a graph, and its error."""
    inputs = draw(sizes, machine.device, machine.dtype, any_subset=True, shares=shares)
    run = partial(expert_mlp, *inputs, backend="triton")
    error = relative_error([run()], [reference.expert_mlp(*inputs)])
    return inputs, machine.captured(run)[0], error


def _all(machine: Machine, subject: str, cases: Sequence[Case]) -> Iterator[Row]:
    for case in cases:
        yield from compete(machine, f"{subject}/{case.name}", case)
        machine.release()


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A layer that is ready to be timed."""

    run: Callable[[], object]
    captured: bool
    error: float
    """See `relative_error`."""
    figures: dict[str, Any]


def compete(machine: Machine, name: str, case: Case) -> Iterator[Row]:
    """One row for each rival that is here, and one for each goal; a rival that fails does not stop the others."""
    inputs = draw(case.sizes, machine.device, machine.dtype, any_subset=case.any_subset)
    given, truth = slots(inputs, any_subset=case.any_subset), reference.expert_mlp(*inputs)
    enter = partial(_enter, machine, inputs, given, truth)
    entrants, failures = {"ours": enter(_ours)}, {}
    rivals = {**installed(case.bars), **external()}
    for rival, prepare in rivals.items():
        try:
            entrants[rival] = enter(prepare)
        except Exception as error:  # foreign code
            failures[rival] = f"{type(error).__name__}: {error}"
    timings = machine.time([entrant.run for entrant in entrants.values()])
    figures = {
        entrant: _figures(machine, case, inputs, entrants[entrant], timing)
        for entrant, timing in zip(entrants, timings, strict=True)
    }
    ours, tolerance = figures["ours"], TOLERANCES[machine.dtype]
    for rival in rivals:
        bar = case.bars.get(rival, case.external_bar)
        if rival in failures:
            yield machine.row(f"{name}/{rival}", 0.0, bar, equal=False, error=failures[rival])
            continue
        equal = entrants["ours"].error <= tolerance and entrants[rival].error <= tolerance
        ratio = figures[rival]["microseconds"] / ours["microseconds"]
        yield machine.row(f"{name}/{rival}", ratio, bar, equal=equal, ours=ours, rival=figures[rival])
    for goal, limit in case.goals.items():
        ratio = limit / ours[goal] if goal in LOWER_IS_BETTER else ours[goal] / limit
        yield machine.row(f"{name}/{goal}", ratio, 1.0, equal=entrants["ours"].error <= tolerance, goal=limit, **ours)


def _ours(inputs: Inputs, given: Slots) -> Callable[[], Tensor]:
    return partial(expert_mlp, *inputs, backend="triton")


def _enter(machine: Machine, inputs: Inputs, given: Slots, truth: Tensor, prepare: Prepare) -> Entrant:
    run = torch.no_grad()(prepare(inputs, given))
    error = relative_error([run()], [truth])
    machine.warm_up(run)
    trace, peak = machine.trace(run), machine.peak_bytes(run)
    replay, captured = machine.captured(run)
    figures = {"launches": len(trace.kernels), "blocking_calls": trace.blocking, "peak_mb": peak / 1e6}
    return Entrant(run=replay, captured=captured, error=error, figures=figures)


def _figures(machine: Machine, case: Case, inputs: Inputs, entrant: Entrant, timing: Timing) -> dict[str, Any]:
    rows, active_experts = int(inputs.subset.sum()), int(inputs.subset.any(0).sum())
    flops, num_bytes = layer_work(case.sizes, inputs.subset, inputs.hidden.element_size())
    floor = machine.ceilings.floor(flops, num_bytes)
    return {
        "microseconds": timing.median,
        "least_microseconds": timing.least,
        "floor_microseconds": floor,
        "fraction_of_floor": floor / timing.median,
        "tflops": flops / timing.median / 1e6,
        "captured": entrant.captured,
        "relative_error": entrant.error,
        **entrant.figures,
        "rows": rows,
        "rows_per_active_expert": rows / max(1, active_experts),
        "sizes": asdict(case.sizes),
    }


def layer_work(sizes: Sizes, subset: Tensor, element_size: int) -> tuple[float, float]:
    """FLOPs of the chosen rows, and bytes that must move: weights once, chosen tokens once, every output once.

    Example: one of two tokens runs one expert of 3 x 2 in float16: 6 * 3 * 2 FLOPs, 2 * (3 * 3 * 2 + 3 + 6) bytes.
    """
    width, inner = sizes.hidden_size, sizes.intermediate_size
    rows, experts, tokens = (int(part) for part in (subset.sum(), subset.any(0).sum(), subset.any(1).sum()))
    elements = 3 * experts * width * inner + tokens * width + len(subset) * width
    return 6.0 * rows * width * inner, float(element_size * elements)
