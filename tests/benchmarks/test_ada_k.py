"""Ada-K's ablations: every variant has its row, and says so where a compute is out of its reach."""

from __future__ import annotations

import re
from io import StringIO

from rich.console import Console

from benchmarks.ada_k import VARIANTS, AblationConfig, ablate
from moe_backbone import MoETransformer
from moe_backbone.corpus import Corpus


def test_table_has_a_row_for_every_variant(tiny_backbone: MoETransformer, tiny_corpus: Corpus) -> None:
    """Mean and range over two seeds at a compute that all reach; heads are native, so a tenth is out of reach."""
    config = AblationConfig(
        seeds=(0, 1), cost_weights=(0.0, 1.0), computes=(2.0, 0.1), updates=2, warm_updates=1, max_tokens=64
    )
    text = StringIO()
    Console(width=200, file=text).print(ablate(config, tiny_corpus, tiny_backbone))
    lines = text.getvalue().splitlines()
    for name in VARIANTS:
        (row,) = [line for line in lines if name in line]
        mean, low, high = (float(number) for number in re.findall(r"\d\.\d{4}", row))
        assert low <= mean <= high
        assert "not reached" in row
    assert sum("native, at 1" in line for line in lines) == 1
