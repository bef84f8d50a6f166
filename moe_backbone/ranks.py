"""The processes of a job that torchrun started, as one: who is who, means over all, one that writes.

Every function is a collective call unless it says otherwise: all ranks must come to it, in the same order. Without
torchrun there is one rank, and nothing here costs anything.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

logger = logging.getLogger(__name__)

IN_A_FILE = 30.0
"""Seconds between two lines of progress where the output is no terminal."""
Value = TypeVar("Value")
STRIDE = 1_000_003
"""Between the seeds of two ranks, so that runs whose seeds are neighbours share none."""


def join(device: str) -> str:
    """Join the job that torchrun started, if it did; the device of this rank.

    Args:
        device: `cuda` or `cpu`; CUDA ranks take the GPU of their local rank and talk by NCCL, others by gloo.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    store, number, size = next(dist.rendezvous("env://"))
    # a job that is started again shall not find the addresses of processes that have died
    store = dist.PrefixStore(f"start-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=size)
    if not is_first():
        logging.getLogger().setLevel(logging.WARNING)
    logger.info("ranks: %d, by %s", world_size(), dist.get_backend())
    return device


def leave() -> None:
    """Leave the job. No collective call."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process among all, from 0. No collective call."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are. No collective call."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the one that logs and writes. No collective call."""
    return rank() == 0


def own_seed(seed: int) -> int:
    """The seed of this rank's draws; that of the first is the seed itself. No collective call."""
    return seed + STRIDE * rank()


def bar(*args: Any, disable: bool = False, **settings: Any) -> tqdm[Any]:
    """A progress bar of tqdm, shown by the first rank; in a file, where it cannot move, twice a minute.

    No collective call.
    """
    often: dict[str, Any] = {} if sys.stderr.isatty() else {"mininterval": IN_A_FILE}
    return tqdm(*args, disable=disable or not is_first(), dynamic_ncols=True, **often, **settings)


@torch.no_grad()
def average_gradients(weights: Iterable[Tensor]) -> None:
    """Replace each weight's gradient by its mean over ranks, in one flattened all-reduce: the same bits on all.

    Args:
        weights: The same on all ranks; a missing gradient counts as zeros.
    """
    if world_size() == 1:
        return
    learned = [weight for weight in weights if weight.requires_grad]
    for weight in learned:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    flat = torch.cat([weight.grad.flatten() for weight in learned if weight.grad is not None])
    dist.all_reduce(flat)
    flat /= world_size()
    for weight, part in zip(learned, flat.split([weight.numel() for weight in learned]), strict=True):
        assert weight.grad is not None
        weight.grad.copy_(part.view_as(weight))


def average(values: Tensor) -> Tensor:
    """Mean over ranks of a tensor of any shape, floating point."""
    if world_size() == 1:
        return values
    values = values.detach().clone()
    dist.all_reduce(values)
    return values / world_size()


def any_rank(flag: bool) -> bool:
    """Whether it is so on some rank."""
    return any(gather(flag))


def gather(value: Value) -> list[Value]:
    """The values of all ranks, in order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(make: Callable[[], Value]) -> Value:
    """What the first rank makes, on every rank."""
    if world_size() == 1:
        return make()
    values: list[Any] = [make() if is_first() else None]
    dist.broadcast_object_list(values)
    made: Value = values[0]
    return made


@contextmanager
def first_alone() -> Iterator[None]:
    """The first rank runs the block before all others: what it keeps on disk they find there."""
    if not is_first():
        gather(None)
    yield
    if is_first():
        gather(None)


def own_part(states: list[Value]) -> Value | None:
    """This rank's part of a state that `gather` made; None, with a line, for a rank that was not there then.

    No collective call.
    """
    if len(states) != world_size() and is_first():
        logger.warning(
            "going on with %d ranks where there were %d: draws differ from those of a run without a break",
            *(world_size(), len(states)),
        )
    return states[rank()] if rank() < len(states) else None
