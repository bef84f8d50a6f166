"""A machine for the GPU benchmark where there is no GPU: the CPU, with a made-up clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_rivals
from benchmarks.gpu_machine import Ceilings, Machine, Timing, Trace


class FakeMachine(Machine):
    """The CPU, on which the first function takes 1000 microseconds, the second 2000, and so on."""

    dtype = torch.float32
    ceilings = Ceilings(1e12, 1e15)
    facts = {"gpu": "none"}

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def time(self, functions: Sequence[Callable[[], object]], seconds: float = 0.5) -> list[Timing]:
        """Call each once."""
        for function in functions:
            function()
        return [Timing(1000.0 * place, 900.0 * place) for place in range(1, len(functions) + 1)]

    def record(self, function: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """Replay into the same tensor."""
        outcome = function()
        return lambda: outcome.copy_(function()), outcome

    def captured(self, function: Callable[[], object]) -> tuple[Callable[[], object], bool]:
        """As it is."""
        return function, True

    def warm_up(self, function: Callable[[], object]) -> None:
        """There is nothing to warm up."""

    def no_host_reads(self) -> AbstractContextManager[None]:
        """Nothing is watched."""
        return nullcontext()

    def trace(self, function: Callable[[], object]) -> Trace:
        """Five launches."""
        return Trace(["kernel"] * 5, 500.0, 2)

    def peak_bytes(self, function: Callable[[], object]) -> int:
        """A megabyte."""
        return 10**6

    def release(self) -> None:
        """There is nothing to release."""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    """Without rivals from outside."""
    monkeypatch.delenv(gpu_rivals.VARIABLE, raising=False)
    gpu_rivals.external.cache_clear()
    return FakeMachine()
