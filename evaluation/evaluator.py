"""Runs any router over held-out text and counts what it really spends."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from evaluation.intervals import DocumentSums, FloatArray
from evaluation.points import Point
from evaluation.tally import Tally
from moe_backbone import Backbone, ComputeMeter, NativeRouter, Router, token_correct, token_log_likelihood
from moe_backbone.corpus import Split
from moe_backbone.kernels import count_rows
from moe_backbone.quality import scored
from moe_backbone.tasks import TaskSplit, entity_f1, require_seqeval


class PointSpec(Protocol):
    """A router at one setting; may also have `price` (nats per native compute) and `seed`."""

    @property
    def name(self) -> str:
        """Name of the router; `learned` for the trained one."""
        ...

    @property
    def setting(self) -> dict[str, Any]:
        """What sets this point apart from others of the same router."""
        ...

    @property
    def router(self) -> Router:
        """What decides."""
        ...


class Evaluator:
    """Fixed held-out windows, scored once under native routing, to which every router is compared.

    Args:
        backbone: What computes; must be on `device`.
        split: Held-out text, or a part of a task, of which only tokens with a label are scored.
        max_tokens: Most tokens to run.
        batch_sequences: Sequences of one forward pass.
        device: Where the tokens go.
        seq_len: Tokens of a window; None for the backbone's own.
        fixed_flops: FLOPs of one token that no routing can save; None to derive them from the backbone's config.

    Attributes:
        split: The held-out text.
        sites: Routed sites of the backbone.
        num_tokens: Tokens scored.
        tokens: What is run (num_windows, seq_len), int64.
        num_documents: Documents that the scored tokens come from.
        native: The point of native routing.

    Raises:
        ValueError: If a size is impossible, or the windows hold fewer than two documents, or F1 of entities is due and
            seqeval is not installed.
    """

    def __init__(
        self,
        backbone: Backbone,
        split: Split,
        *,
        max_tokens: int = 32_768,
        batch_sequences: int = 32,
        device: torch.device | str = "cpu",
        seq_len: int | None = None,
        fixed_flops: float | None = None,
    ) -> None:
        seq_len = backbone.config.seq_len if seq_len is None else seq_len
        if max_tokens < seq_len:
            raise ValueError(f"max_tokens must be at least seq_len={seq_len}, got {max_tokens}")
        if batch_sequences < 1:
            raise ValueError(f"batch_sequences must be at least 1, got {batch_sequences}")
        self.backbone, self.split, self.sites = backbone, split, tuple(backbone.sites)
        self._device, self._batch_sequences = torch.device(device), batch_sequences
        self._meter = ComputeMeter(self.sites, seq_len)
        self._fixed_flops = backbone.fixed_flops if fixed_flops is None else fixed_flops
        self.tokens, self._targets, document_ids = split.windows(seq_len, max_tokens)
        counted = scored(self._targets)
        documents = np.unique(document_ids[counted].numpy())
        self._document_rows = np.searchsorted(documents, document_ids.numpy()).clip(max=len(documents) - 1)
        self.num_documents, self.num_tokens = len(documents), int(counted.sum())
        self._sentences = None
        if isinstance(split, TaskSplit) and split.tagging:
            require_seqeval()
            self._sentences = np.flatnonzero(np.diff(document_ids[counted].numpy())) + 1
        if self.num_documents < 2:
            raise ValueError(f"split must hold at least 2 documents for intervals, got 1 in {split.name}")
        self._native_documents: DocumentSums | None = None
        self.native = self.score("native", NativeRouter(), setting={})
        self._native_documents = self.native.documents

    def score(
        self, name: str, router: Router, *, setting: dict[str, Any], price: float = 0.0, seed: int | None = None
    ) -> Point:
        """Run `router` on all windows, skipping what it does not choose.

        Args:
            name: Name of the router.
            router: What decides; `overhead_flops`, if it has it, is its own FLOPs per token over all sites.
            setting: What sets this point apart from others of the same router; JSON values only.
            price: Price shown to the router, nats per native compute.
            seed: Seed of the router, only reported.

        Raises:
            AssertionError: If the rows that ran are not the rows that the router asked for.
        """
        tally = Tally(self._meter)
        with torch.no_grad(), _never_masked(self.backbone), count_rows() as counted:
            documents, seconds, predicted = self._run(router, price, tally)
        tally.check_rows(counted)
        overhead = float(getattr(router, "overhead_flops", 0.0))
        native, spent = self._meter.native_flops, tally.flops / tally.num_tokens + overhead
        return Point(
            router=name,
            setting=setting,
            seed=seed,
            compute=spent / native,
            router_overhead=overhead / native,
            compute_total=(self._fixed_flops + spent) / (self._fixed_flops + native),
            documents=documents,
            native_documents=documents if self._native_documents is None else self._native_documents,
            usage=tally.usage,
            units_per_token=tally.units_per_token,
            distinct_units=tally.distinct_units,
            balance=tally.balance,
            cache=tally.cache,
            f1=None if self._sentences is None else self._f1(predicted),
            seconds=seconds,
        )

    def _run(self, router: Router, price: float, tally: Tally) -> tuple[DocumentSums, float, Tensor]:
        """Scores by document, seconds of the forward passes, and the likeliest token at each scored one, int64."""
        sums = np.zeros((3, self.num_documents))
        seconds, predicted = 0.0, []
        for start in range(0, len(self.tokens), self._batch_sequences):
            rows = slice(start, start + self._batch_sequences)
            tokens, targets = self.tokens[rows].to(self._device), self._targets[rows].to(self._device)
            prices = torch.full((tokens.numel(),), price, device=self._device)
            started = self._now()
            logits, subsets = self.backbone.run(tokens, router, prices)
            seconds += self._now() - started
            tally.add(subsets, len(tokens))
            sums[0] += self._by_document(scored(targets), rows)
            sums[1] += self._by_document(token_log_likelihood(logits, targets), rows)
            sums[2] += self._by_document(token_correct(logits, targets), rows)
            if self._sentences is not None:
                predicted.append(logits.argmax(-1)[scored(targets)].cpu())
        documents = DocumentSums(tokens=sums[0], log_likelihood=sums[1], correct=sums[2])
        return documents, seconds, torch.cat(predicted) if predicted else torch.zeros(0)

    def _f1(self, predicted: Tensor) -> float:
        """F1 of the entities in scored sentences; a prediction that is no tag counts as `O`."""
        assert isinstance(self.split, TaskSplit) and self._sentences is not None
        names = self.split.label_bytes
        gold, found = (
            [[names.label(value, "O") for value in part.tolist()] for part in np.split(values.numpy(), self._sentences)]
            for values in (self._targets[scored(self._targets)], predicted)
        )
        return entity_f1(gold, found)

    def _by_document(self, values: Tensor, rows: slice) -> FloatArray:
        """Sum values (num_sequences, seq_len) of some windows over each document (num_documents,), float64."""
        sums = np.zeros(self.num_documents)
        np.add.at(sums, self._document_rows[rows], values.double().cpu().numpy())
        return sums

    def _now(self) -> float:
        """Seconds on a clock, once the device has done its work."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _never_masked(backbone: Backbone) -> AbstractContextManager[None]:
    """Skip every unit that is not chosen, also where a CPU would compute and mask it in less time."""
    if not hasattr(backbone, "using") or next(backbone.parameters()).device.type == "cuda":
        return nullcontext()
    return backbone.using("compact")
