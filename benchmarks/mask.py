"""Whether time follows the mask: a transformer at a half and a quarter of its native compute, prefill and decode.

Prefill multiplies many rows by each weight, so fewer rows are less work. Decode has few rows, and its time goes into
streaming weights from memory: a weight that is streamed for one row is streamed for eight. Work follows the mask there
only where experts outnumber the rows, so that an expert whose only row was masked is not read at all. Hence the many
experts of this model: 32 rows choose two of 128.

Head masks are drawn before the clock starts, as no gate scores them; experts are chosen from scores while it runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Measured, Row, agree, compare, interleave, milliseconds
from moe_backbone import (
    BackboneConfig,
    ComputeMeter,
    MoETransformer,
    NativeRouter,
    Router,
    SiteView,
    best_units,
    fixed_flops,
)
from moe_backbone.attention import KeyValueCache
from moe_backbone.kernels import count_rows

CONFIG = BackboneConfig(
    hidden_size=128, num_layers=2, num_heads=2, num_experts=128, top_k=2, intermediate_size=4096, seq_len=128
)
PREFILLED, DECODED, DECODE_STEPS, CHECKED = 128, 32, 8, 20
"""Sequences of a prefill and of a decode step, steps timed together, sequences of the comparison with `reference`."""
BARS = {0.5: 1 / 0.65, 0.25: 1 / 0.42}
"""Native time over routed time, by share of native compute."""
COUNT_TOLERANCE = 0.02
"""Relative, between the share asked for and the share that the kernels ran."""


class Share:
    """Router that runs a share of the native units of every site: best experts of some tokens, heads by chance.

    Args:
        share: In (0, 1].
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._generator = torch.Generator().manual_seed(0)
        self._drawn: dict[tuple[int, int], Tensor] = {}

    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units)."""
        wanted, num_tokens = self.share * view.site.native_units, len(view.features)
        if view.site.kind == "heads":
            return self._bits(view.index, num_tokens, view.site.num_units, wanted / view.site.num_units)
        most = math.ceil(wanted)
        return best_units(view.scores, most) & self._bits(view.index, num_tokens, 1, wanted / most)

    def _bits(self, index: int, num_tokens: int, width: int, share: float) -> Tensor:
        """The same at each call, exactly `share` of them True: bool (num_tokens, width)."""
        if (index, num_tokens) not in self._drawn:
            places = torch.randperm(num_tokens * width, generator=self._generator)
            self._drawn[index, num_tokens] = (places < round(share * len(places))).view(num_tokens, width)
        return self._drawn[index, num_tokens]


class Replay:
    """Router that repeats the subsets of some calls, so that near ties of a gate fall the same way in both runs."""

    def __init__(self, calls: Iterable[Sequence[Tensor]]) -> None:
        self._subsets = chain.from_iterable(calls)

    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units)."""
        return next(self._subsets)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is timed: one prefill, or some steps of a decode whose earlier tokens lie in a cache."""

    name: str
    model: MoETransformer
    tokens: Tensor
    """(num_sequences, num_tokens), int64."""
    cache: KeyValueCache | None = None
    first_position: int = 0

    @property
    def calls(self) -> Sequence[Tensor]:
        """Tokens of each call of the model."""
        return (self.tokens,) if self.cache is None else self.tokens.split(1, dim=1)

    def run(self, router: Router) -> list[tuple[Tensor, list[Tensor]]]:
        """Logits and subsets of each call."""
        if self.cache is not None:
            self.cache.length = self.first_position  # what lies behind is written anew
        return [self.model.run(tokens, router, cache=self.cache) for tokens in self.calls]

    def equals_reference(self, router: Router) -> bool:
        """Whether the fastest kernels give the logits of the reference kernels."""
        fastest = self.run(router)
        with self.model.using("reference"):
            reference = self.run(Replay(subsets for _, subsets in fastest))
        return all(agree(logits, wanted) for (logits, _), (wanted, _) in zip(fastest, reference, strict=True))

    def flops(self, router: Router) -> float:
        """Routable FLOPs of the chosen units, each of which is a row of the kernels that skip whatever they can."""
        meter, total, position = ComputeMeter(self.model.sites, CONFIG.seq_len), 0.0, self.first_position
        with self.model.using("compact"), count_rows() as counted:
            runs = self.run(router)
        for tokens, (_, subsets) in zip(self.calls, runs, strict=True):
            positions = torch.arange(position, position + tokens.shape[1]).repeat(len(tokens))
            total += sum(float(meter.flops(index, subset, positions).sum()) for index, subset in enumerate(subsets))
            position += tokens.shape[1]
        chosen = sum(int(subset.sum()) for _, subsets in runs for subset in subsets)
        assert counted.total() == chosen, f"kernels ran {counted.total()} rows for {chosen} chosen units"
        return total

    def rows_run(self, router: Router) -> dict[str, int]:
        """Rows by kind of unit that the fastest kernels run; they may run heads that were not chosen and mask them."""
        with count_rows() as counted:
            self.run(router)
        return dict(counted)


@torch.no_grad()
def rows() -> Iterator[Row]:
    """Prefill and decode at every share."""
    torch.manual_seed(0)
    model = MoETransformer(CONFIG).requires_grad_(False).eval()
    tokens = torch.randint(CONFIG.vocab_size, (PREFILLED, CONFIG.seq_len))
    prefill = Work(name="prefill", model=model, tokens=tokens)
    yield from _rows(prefill, replace(prefill, tokens=tokens[:CHECKED]))
    half, cache = CONFIG.seq_len // 2, model.new_cache()
    model.run(tokens[:DECODED, :half], NativeRouter(), cache=cache)
    decoded = tokens[:DECODED, half : half + DECODE_STEPS]
    decode = Work(name="decode", model=model, tokens=decoded, cache=cache, first_position=half)
    yield from _rows(decode, decode)


def _rows(work: Work, checked: Work) -> Iterator[Row]:
    """One row a share; outputs are compared on `checked`."""
    native = NativeRouter()
    routers = {share: Share(share) for share in BARS}
    native_equal, native_flops = checked.equals_reference(native), work.flops(native)
    equal = {share: native_equal and checked.equals_reference(router) for share, router in routers.items()}
    computes = {share: work.flops(router) / native_flops for share, router in routers.items()}
    for share, compute in computes.items():
        assert abs(compute / share - 1) < COUNT_TOLERANCE, f"{compute} of native compute ran, {share} was asked for"
    functions = [partial(work.run, native), *(partial(work.run, router) for router in routers.values())]
    native_time, *times = interleave(functions)
    for (share, router), routed_time in zip(routers.items(), times, strict=True):
        counts = {"compute": computes[share], "rows_run": work.rows_run(router), "rows_native": work.rows_run(native)}
        measure = partial(_measured, work, counts, native_time, routed_time)
        yield compare(f"mask/{work.name}-{share}", bar=BARS[share], equal=equal[share], measure=measure)


def _measured(work: Work, counts: dict[str, Any], native_time: float, routed_time: float) -> Measured:
    routable = ComputeMeter(work.model.sites, CONFIG.seq_len).native_flops
    num_calls = len(work.calls)
    return native_time / routed_time, {
        **counts,
        "time_of_native": routed_time / native_time,
        "native_ms": milliseconds(native_time / num_calls),
        "routed_ms": milliseconds(routed_time / num_calls),
        "routable_share": routable / (routable + fixed_flops(CONFIG)),
        "parameters": work.model.num_parameters,
        "num_sequences": len(work.tokens),
        "tokens_per_call": work.calls[0].numel(),
        "sizes": asdict(CONFIG),
    }
