"""A CUDA device as a bench: its own clock, cold caches, graphs, launches, and the two ceilings of every figure."""

from __future__ import annotations

import gc
import logging
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType

from benchmarks.measure import Row, versions
from policies.episode_graph import Outcome, record_cuda

logger = logging.getLogger(__name__)

WARM_UPS = 4
"""Calls before the first that counts: kernels compile, and tiles settle on the row counts of earlier calls."""
ROUNDS = (10, 200)
"""Fewest and most repetitions."""
COPY_BYTES, MATRIX_SIZE = 2**31, 8192
"""Sizes of the two ceilings."""
BLOCKING = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"}
"""Calls of the driver in which the host waits for the device."""


class Timing(NamedTuple):
    """Of one function, microseconds."""

    median: float
    least: float


class Ceilings(NamedTuple):
    """What this device does at best, measured in the same run."""

    bytes_per_second: float
    """Of a copy, bytes read plus bytes written."""
    flops_per_second: float
    """Of a dense product in bfloat16, random data."""

    def floor(self, flops: float, num_bytes: float) -> float:
        """Microseconds below which no version runs; launches are not counted in, as they are ours to avoid."""
        return 1e6 * max(flops / self.flops_per_second, num_bytes / self.bytes_per_second)


class Trace(NamedTuple):
    """What the profiler saw of one call."""

    kernels: list[str]
    busy: float
    """Microseconds in which the device ran kernels or copies."""
    blocking: int
    """Calls in which the host waited for the device."""


class Machine:
    """The current CUDA device.

    Attributes:
        dtype: Of speed measurements.
    """

    dtype = torch.bfloat16

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._properties: Any = torch.cuda.get_device_properties(self.device)
        self._cold = torch.empty(2 * self._properties.L2_cache_size, dtype=torch.uint8, device=self.device)

    @cached_property
    def ceilings(self) -> Ceilings:
        """Measured once."""
        source = torch.randint(256, (COPY_BYTES,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        left, right = torch.randn(2, MATRIX_SIZE, MATRIX_SIZE, device=self.device).bfloat16().unbind(0)
        copy, product = self.time([lambda: target.copy_(source), lambda: left @ right])
        return Ceilings(2e6 * COPY_BYTES / copy.median, 2e6 * MATRIX_SIZE**3 / product.median)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the figures depend on besides the code."""
        import triton

        ceilings = self.ceilings
        measured = {"copy_tb_s": ceilings.bytes_per_second / 1e12, "dense_tflops": ceilings.flops_per_second / 1e12}
        software = {"cuda": torch.version.cuda, "triton": triton.__version__}
        return {**versions(), **software, "gpu": self._properties.name, **measured}

    def row(self, name: str, ratio: float, bar: float, *, equal: bool = True, **detail: Any) -> Row:
        """A row that says what it was measured on; it has no ratio where outputs disagree."""
        detail["versions"] = self.facts
        return Row(name=name, ratio=ratio if equal else None, bar=bar, equal=equal, detail=detail)

    def time(self, functions: Sequence[Callable[[], object]], seconds: float = 0.5) -> list[Timing]:
        """Times of functions that take turns, every other round in reverse order; each starts with a cold L2 cache."""
        events = self._round(functions, range(len(functions)))
        torch.cuda.synchronize()
        first = [start.elapsed_time(stop) for start, stop in events]
        rounds = round(1e3 * seconds / max(sum(first), 1e-3))
        order, kept = list(range(len(functions))), []
        for _ in range(max(ROUNDS[0], min(ROUNDS[1], rounds))):
            kept.append(self._round(functions, order))
            order.reverse()
        torch.cuda.synchronize()
        times = [[1e3 * start.elapsed_time(stop) for start, stop in column] for column in zip(*kept, strict=True)]
        return [Timing(statistics.median(column), min(column)) for column in times]

    def _round(self, functions: Sequence[Callable[[], object]], order: Sequence[int]) -> list[tuple[Any, Any]]:
        """Events before and after each function, in the order of `functions`."""
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in functions]
        for place in order:
            self._cold.zero_()
            events[place][0].record()
            functions[place]()
            events[place][1].record()
        return events

    def captured(self, function: Callable[[], object]) -> tuple[Callable[[], object], bool]:
        """Replay of the function as a CUDA graph, or the function itself where it makes the host wait."""
        self.warm_up(function)
        try:
            with self.no_host_reads():  # asked first, as a capture that fails leaves generators unusable
                function()
            return self.record(function)[0], True
        except RuntimeError as error:
            logger.warning("timed without a graph: %s", str(error).splitlines()[0])
            torch.cuda.synchronize()
            return function, False

    def record(self, function: Callable[[], Outcome]) -> tuple[Callable[[], object], Outcome]:
        """Replay of the function as a CUDA graph, and the outcome that replaying overwrites."""
        recorded = record_cuda(function, torch.device("cuda"))
        self.release()  # what the runs before the recorded one held on their stream
        return recorded

    def warm_up(self, function: Callable[[], object]) -> None:
        """Until nothing is compiled any more."""
        for _ in range(WARM_UPS):
            function()
            torch.cuda.synchronize()

    def no_host_reads(self) -> AbstractContextManager[None]:
        """Whatever makes the host wait for the device raises RuntimeError."""
        return _sync_debug_mode("error")

    def trace(self, function: Callable[[], object]) -> Trace:
        """Profile one call."""
        events, waits = self._profile(function)
        kernels = [event.name for event in events if not event.name.startswith(("Memcpy", "Memset"))]
        idle_waits = self._profile(lambda: None)[1]
        return Trace(kernels, sum(event.time_range.elapsed_us() for event in events), waits - idle_waits)

    def _profile(self, function: Callable[[], object]) -> tuple[list[Any], int]:
        """Events on the device, and how often the host waited, with the waits of the profiler itself."""
        torch.cuda.synchronize()
        with torch.profiler.profile() as profile:
            function()
            torch.cuda.synchronize()
        events = [event for event in profile.events() if not getattr(event, "is_user_annotation", False)]
        on_device = [event for event in events if event.device_type == DeviceType.CUDA]
        return on_device, sum(event.name in BLOCKING for event in events)

    def peak_bytes(self, function: Callable[[], object]) -> int:
        """Most bytes that one call holds beside what was there before."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def release(self) -> None:
        """Give back what the last subject held."""
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def _sync_debug_mode(mode: str) -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def relative_error(outputs: Sequence[Tensor], truths: Sequence[Tensor]) -> float:
    """Root mean square over tensors of norm(output - truth) / norm(truth); infinite where there is NaN.

    Example: [2.2] against [2.0] gives 0.1; zeros against zeros give 0.
    """
    errors = []
    for output, truth in zip(outputs, truths, strict=True):
        if output.shape != truth.shape:
            return math.inf
        wrong, scale = float((output.double() - truth.double()).norm()), float(truth.double().norm())
        errors.append(0.0 if wrong == 0 else wrong / scale if scale else math.inf)
    error = math.sqrt(statistics.fmean(error**2 for error in errors))
    return error if math.isfinite(error) else math.inf
