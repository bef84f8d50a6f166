"""Rows of the compression tables: scored on two texts, their compute in bit-operations, kept as they are finished."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import DocumentSums, Evaluator, Point, Scored
from evaluation.balance import Balance
from moe_backbone import ComputeMeter, MoETransformer, Router
from moe_backbone.checks import require
from moe_backbone.compression import FULL_BITS, bit_operations
from moe_backbone.corpus import Corpus
from moe_backbone.files import write_text_atomic
from train_rl import load_run

WIDTH = 150
"""Least columns of the printed tables."""


def own_run(folder: Path) -> tuple[Corpus, MoETransformer]:
    """Corpus and backbone of a finished run.

    Raises:
        ValueError: If it is no run on a backbone of our own.
    """
    _, corpus, backbone = load_run(folder, "cpu")
    if not isinstance(backbone, MoETransformer):
        raise ValueError(f"run must be on a backbone of our own, got one on {backbone.name} in {folder}")
    return corpus, backbone


@dataclass(frozen=True, kw_only=True, eq=False)
class Row(Scored):
    """A backbone and a router; `compute` of both points is bit-operations over those of the full native model."""

    flops: float
    """Held-out routable FLOPs over native ones, the router's own included."""
    megabytes: float
    """Of the backbone's weights, without units that no held-out token uses."""


class Scorer:
    """Scores backbones and routers on validation and test text against one full native model.

    Args:
        native: The full model, to which all bit-operations are compared.
        corpus: Text.
        selection_tokens: Validation tokens.
        max_tokens: Test tokens.
    """

    def __init__(self, native: MoETransformer, corpus: Corpus, selection_tokens: int, max_tokens: int) -> None:
        self.corpus, self.tokens = corpus, (selection_tokens, max_tokens)
        self._evaluators: dict[str, tuple[MoETransformer, int, tuple[Evaluator, Evaluator]]] = {}
        self.add("full", native, FULL_BITS)
        self._full = native
        self.native = self.score("native", "full", None, {})

    def add(self, name: str, backbone: MoETransformer, bits: int) -> None:
        """Make a backbone with weights of so many bits known under a name; it is run natively at once."""
        splits = zip((self.corpus.validation, self.corpus.test), self.tokens, strict=True)
        first, second = (Evaluator(backbone, split, max_tokens=tokens) for split, tokens in splits)
        self._evaluators[name] = backbone, bits, (first, second)

    def score(self, line: str, backbone: str, router: Router | None, setting: Mapping[str, Any]) -> Row:
        """One row.

        Args:
            line: The curve that it belongs to.
            backbone: Name of a known one.
            router: What decides; None for native routing.
            setting: What sets the row apart from others of its line; JSON values.
        """
        model, bits, evaluators = self._evaluators[backbone]
        setting = {**setting, "bits": bits}
        points = [
            replace(evaluator.native, router=line, setting=setting)
            if router is None
            else evaluator.score(line, router, setting=setting)
            for evaluator in evaluators
        ]
        native = getattr(self, "native", None)
        against = points if native is None else [native.selection, native.held_out]
        return Row(
            selection=self._priced(points[0], model, bits, against[0]),
            held_out=self._priced(points[1], model, bits, against[1]),
            flops=points[1].compute * meter(model).native_flops / meter(self._full).native_flops,
            megabytes=stored_weights(points[1], model) * bits / 8e6,
        )

    def _priced(self, point: Point, model: MoETransformer, bits: int, native: Point) -> Point:
        """The point with bit-operations as its compute, paired with the full native model."""
        full = meter(self._full).native_flops
        units = [float(site.native_units) for site in self._full.sites]
        one = bit_operations(self._full.sites, units, full, self._full.fixed_flops)
        compute = token_bit_operations(point, model, bits) / one
        return replace(point, compute=compute, native_documents=native.documents)


def meter(model: MoETransformer) -> ComputeMeter:
    """Of full sequences."""
    return ComputeMeter(model.sites, model.config.seq_len)


def token_bit_operations(point: Point, model: MoETransformer, bits: int) -> float:
    """Bit-operations of a token under a router, as its point counted it.

    Keys and values of a head that no token uses are not counted: no later token attends to them.
    """
    native = meter(model).native_flops
    router = point.router_overhead * native
    dead = sum(
        site.unit_flops * unused
        for site, unused in zip(model.sites, unused_units(point), strict=True)
        if site.kind == "heads" and not site.drops_keys  # key and value cost what query and output do
    )
    routed = point.compute * native - router
    return bit_operations(
        model.sites, point.units_per_token, routed, model.fixed_flops - dead, router, weight_bits=bits
    )


def rise(point: Point) -> str:
    """Rise of the loss over the full native model, nats a token, with its interval."""
    gain = point.delta_log_likelihood
    return f"{0 - gain.mean:+.4f} [{0 - gain.high:+.4f}, {0 - gain.low:+.4f}]"


def unused_units(point: Point) -> list[int]:
    """Units of each site that no token used."""
    return [int((usage == 0).sum()) for usage in point.usage]


def stored_weights(point: Point, model: MoETransformer) -> int:
    """Weights of a model without the units that no token used."""
    config, weights = model.config, model.num_parameters
    sizes = {
        "heads": 4 * config.hidden_size * config.head_size,
        "experts": 3 * config.hidden_size * config.intermediate_size,
    }
    return weights - sum(
        sizes[site.kind] * unused for site, unused in zip(model.sites, unused_units(point), strict=True)
    )


class RowFile:
    """Rows by line and setting in a JSON file, which is written anew after each, so that a stopped table goes on.

    Args:
        path: Where it lies.
        about: What all rows depend on, JSON values; None to take rows of anything.

    Raises:
        ValueError: If the file holds rows of something else.
    """

    def __init__(self, path: Path, about: Mapping[str, Any] | None = None) -> None:
        self.path, self.about = path, about
        self.rows: dict[str, Row] = {}
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            rule = "output must be a new folder, or hold rows of the same backbone, text and router"
            require(about in (None, content["about"]), f"{rule}, got {path} of {content['about']}, not {about}")
            self.rows = {key: row_from_json(row) for key, row in content["rows"].items()}

    def get(self, line: str, setting: Mapping[str, Any], make: Callable[[], Row]) -> Row:
        """The row of this line and setting, made if it is not there."""
        key = f"{line} {json.dumps(setting, sort_keys=True)}"
        if key not in self.rows:
            self.rows[key] = make()
            rows = {name: row_to_json(row) for name, row in self.rows.items()}
            write_text_atomic(self.path, json.dumps({"about": self.about, "rows": rows}) + "\n")
        return self.rows[key]


def row_to_json(row: Row) -> dict[str, Any]:
    """JSON values that `row_from_json` reads back."""
    points = {name: _point_to_json(getattr(row, name)) for name in ("selection", "held_out")}
    return {**points, "flops": row.flops, "megabytes": row.megabytes}


def row_from_json(data: Mapping[str, Any]) -> Row:
    """Inverse of `row_to_json`."""
    return Row(
        selection=_point_from_json(data["selection"]),
        held_out=_point_from_json(data["held_out"]),
        flops=data["flops"],
        megabytes=data["megabytes"],
    )


def _point_to_json(point: Point) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(asdict(point), default=lambda array: array.tolist()))
    return values


def _point_from_json(data: Mapping[str, Any]) -> Point:
    documents = {name: _sums(data[name]) for name in ("documents", "native_documents")}
    shapes = {"usage": np.array(data["usage"], dtype=np.float64), "units_per_token": tuple(data["units_per_token"])}
    return Point(**{**data, **documents, **shapes, "balance": Balance(**data["balance"])})


def _sums(data: Mapping[str, Any]) -> DocumentSums:
    return DocumentSums(**{name: np.array(values, dtype=np.float64) for name, values in data.items()})
