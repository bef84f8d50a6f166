"""What must hold before speed counts: accuracy, equal bits, no wait for the device, no long first call."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from benchmarks.experts import Inputs, Sizes
from benchmarks.gpu_experts import TOLERANCES
from benchmarks.gpu_heads import HeadSizes, draw_heads
from benchmarks.gpu_machine import Machine, relative_error
from benchmarks.gpu_rivals import draw
from benchmarks.measure import Row
from moe_backbone.kernels import expert_mlp, head_attention, reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EXPERT_SIZES = (
    Sizes(num_tokens=2048),
    Sizes(num_tokens=333, hidden_size=200, intermediate_size=120, num_experts=12, active=3),
    Sizes(num_tokens=257, hidden_size=512, intermediate_size=704, num_experts=128, active=8),
    Sizes(num_tokens=1),
)
HEAD_SIZES = (
    HeadSizes(num_sequences=2, num_queries=256, num_keys=256),
    HeadSizes(num_sequences=3, num_queries=67, num_keys=131, num_heads=6, head_size=48, hidden_size=200),
    HeadSizes(num_sequences=16, num_queries=1, num_keys=300),
)
REPEATED, REPEATED_HEADS = Sizes(num_tokens=2048), HeadSizes(num_sequences=4, num_queries=128, num_keys=128)
REPEATS, ROWS_PER_UNIT = 100, 256
SECONDS_OF_FIRST_CALL = 5.0
Op = Callable[..., Tensor]
Run = Callable[[object, Sequence[Tensor]], list[Tensor]]
"""Outputs of the op of a module, or of our own if None, for some inputs."""


def accuracy(machine: Machine) -> Iterator[Row]:
    """G11: errors against float64 beside those of a loop of PyTorch in the same dtype; scratch is full of NaN."""
    for dtype in DTYPES:
        experts = [_with_gaps(draw(sizes, machine.device, dtype, any_subset=True)) for sizes in EXPERT_SIZES]
        heads = [draw_heads(sizes, machine.device, dtype, share=0.5) for sizes in HEAD_SIZES]
        checks: list[tuple[str, Run, Sequence[Sequence[Tensor]]]] = [
            ("experts", _outputs("expert_mlp"), experts),
            ("experts-gradients", _gradients, experts),
            ("heads", _outputs("head_attention"), heads),
        ]
        for name, run, cases in checks:
            yield _accuracy(machine, f"accuracy/{name}-{str(dtype).removeprefix('torch.')}", run, cases, dtype)


def _accuracy(machine: Machine, name: str, run: Run, cases: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> Row:
    truths, ours, loops = [], [], []
    for inputs in cases:
        exact = [part if part.dtype == torch.bool else part.double() for part in inputs]
        truths += run(reference, exact)
        loops += run(reference, inputs)
        with _poisoned():
            ours += run(None, inputs)
    own, loop = relative_error(ours, truths), relative_error(loops, truths)
    detail = {"relative_error": own, "relative_error_of_loop": loop, "cases": len(cases)}
    return machine.row(name, loop / max(own, 1e-12), 1 / 1.25, equal=own <= TOLERANCES[dtype], **detail)


def _with_gaps(inputs: Inputs) -> Inputs:
    """An expert without tokens, and a tenth of the tokens without an expert."""
    subset = inputs.subset.clone()
    subset[:, -1] = False
    subset[1::10] = False
    return inputs._replace(subset=subset)


def _outputs(op: str) -> Run:
    def run(module: object, inputs: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return [_op(module, op)(*inputs)]

    return run


def _gradients(module: object, inputs: Sequence[Tensor]) -> list[Tensor]:
    hidden, weights, subset, gate_up, down = inputs
    trained = [part.detach().clone().requires_grad_() for part in (hidden, weights, gate_up, down)]
    output = _op(module, "expert_mlp")(*trained[:2], subset, *trained[2:])
    generator = torch.Generator(output.device).manual_seed(1)
    given = torch.randn(output.shape, generator=generator, device=output.device).bfloat16()  # the same in every dtype
    return list(torch.autograd.grad(output, trained, given.to(output.dtype)))


def _op(module: object, op: str) -> Op:
    ours: dict[str, Op] = {"expert_mlp": expert_mlp, "head_attention": head_attention}
    return partial(ours[op], backend="triton") if module is None else getattr(module, op)


@contextmanager
def _poisoned() -> Iterator[None]:
    """Empty tensors are full of NaN meanwhile."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=True)


def no_waits(machine: Machine) -> Iterator[Row]:
    """G9: neither op makes the host wait for the device, whatever the subset."""
    for name, run, masks in _repeated(machine, None):
        for mask in masks:  # compiles for every row count
            run(mask)
        error = ""
        try:
            with machine.no_host_reads():
                for mask in masks:
                    run(mask)
        except RuntimeError as raised:
            error = str(raised)
        yield machine.row(f"no-waits/{name}", float(not error), 1.0, calls=len(masks), error=error)


def equal_bits(machine: Machine) -> Iterator[Row]:
    """G10: the same bits in every run, and in every replay of one graph whose subset changes."""
    for name, run, masks in _repeated(machine, ROWS_PER_UNIT):
        results, half = [run(mask) for mask in masks], REPEATS // 2
        same = all(torch.equal(results[half], run(masks[half])) for _ in range(REPEATS))
        yield machine.row(f"equal-bits/{name}-runs", 1.0, 1.0, equal=same, runs=REPEATS)
        mask = masks[0].clone()
        replay, output = machine.record(partial(run, mask))
        same = True
        for new, result in zip(masks, results, strict=True):
            mask.copy_(new)
            replay()
            same &= torch.equal(output, result)
        yield machine.row(f"equal-bits/{name}-replays", 1.0, 1.0, equal=same, replays=len(masks))


def _repeated(
    machine: Machine, rows_per_unit: int | None
) -> Iterator[tuple[str, Callable[[Tensor], Tensor], list[Tensor]]]:
    """Each op as a function of the subset, and subsets of all shares; see `triton_experts.expert_mlp` for tiles."""
    from moe_backbone.kernels import triton_experts  # needs Triton

    experts = draw(REPEATED, machine.device, machine.dtype, any_subset=True)
    heads = draw_heads(REPEATED_HEADS, machine.device, machine.dtype, share=1.0)

    def run_experts(mask: Tensor) -> Tensor:
        return triton_experts.expert_mlp(*experts._replace(subset=mask), rows_per_unit=rows_per_unit)

    def run_heads(mask: Tensor) -> Tensor:
        return head_attention(*heads._replace(subset=mask), backend="triton")

    for name, run, whole in (("experts", run_experts, experts.subset), ("heads", run_heads, heads.subset)):
        yield name, run, _masks(whole)


def _masks(whole: Tensor) -> list[Tensor]:
    """Like `whole` in shape, from none to almost all chosen."""
    generator = torch.Generator(whole.device).manual_seed(2)
    chances = [torch.rand(whole.shape, generator=generator, device=whole.device) for _ in range(REPEATS)]
    return [chance < number / REPEATS for number, chance in enumerate(chances)]


def first_call(machine: Machine) -> Iterator[Row]:
    """G13: nothing compiled before, nothing tuned."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.gpu_first_call"]
        environment = {**os.environ, "TRITON_CACHE_DIR": folder}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    if ran.returncode:
        raise RuntimeError(f"first call must succeed in a fresh process, got: {ran.stderr[-500:]}")
    seconds = float(ran.stdout.split()[-1])
    yield machine.row("first-call/cold", SECONDS_OF_FIRST_CALL / seconds, 1.0, seconds=seconds)
