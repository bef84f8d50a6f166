"""One CUDA graph for a whole episode: the host launches it once instead of every kernel of every site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Generic, TypeVar

import torch

WARM_UPS = 3
"""Runs before the recorded one; kernels compile and libraries allocate in them."""
Outcome = TypeVar("Outcome")
Replay = Callable[[], object]


class EpisodeGraph(Generic[Outcome]):
    """Records an episode once and replays it for every newly drawn batch.

    Batches are drawn outside the graph and copied into the tensors that it reads. It is recorded anew when shapes
    change, and when the environment has begun another episode meanwhile, as its state would no longer be the recorded
    one. The outcome is the same tensors every time: it holds until the next episode. Weights must stay where they are.

    Args:
        env: `RoutingVecEnv`.
        play: Runs an episode of a batch, a frozen dataclass of tensors; reads nothing from the device.
        record: Returns what replays a run, and the outcome that replaying overwrites.
    """

    def __init__(
        self,
        env: Any,
        play: Callable[[Any], Outcome],
        record: Callable[[Callable[[], Outcome]], tuple[Replay, Outcome]] | None = None,
    ) -> None:
        self.env, self.play = env, play
        self._record = record or partial(record_cuda, device=env.mdp.device)
        self._batch: Any = None

    def __call__(self) -> Outcome:
        """Draw a batch and run its episode."""
        drawn = self.env.draw_batch()
        if self._batch is None or self.env.mdp.batch is not self._batch or not _alike(drawn, self._batch):
            batch = replace(drawn, **{name: tensor.clone() for name, tensor in vars(drawn).items()})
            self._batch = None  # until the recording has succeeded
            self._replay, self._outcome = self._record(lambda: self.play(batch))
            self._batch = batch
        for name, tensor in vars(self._batch).items():
            tensor.copy_(getattr(drawn, name))
        self._replay()
        return self._outcome


def _alike(one: Any, other: Any) -> bool:
    pairs = zip(vars(one).values(), vars(other).values(), strict=True)
    return all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)


def record_cuda(run: Callable[[], Outcome], device: torch.device) -> tuple[Replay, Outcome]:
    """Capture a run on `device` as a CUDA graph; random numbers go on from where they were, as if it had never run.

    Raises:
        RuntimeError: If the run cannot be captured, for example because it reads from the device.
    """
    with torch.cuda.device(device):
        state, stream = torch.cuda.get_rng_state(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                run()
                torch.cuda.synchronize()  # what a run leaves to the next, such as counts of rows, has arrived
        torch.cuda.set_rng_state(state)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                outcome = run()
        except RuntimeError as error:
            raise RuntimeError(
                "episode must be capturable as a CUDA graph, which a read from the device prevents; cuda_graph=False "
                f"runs it without: {error}"
            ) from error
    return graph.replay, outcome
