"""Every Triton kernel compiles for sm_90, on a machine without a GPU, to code that is fit to run there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
MAX_SHARED = 227 * 1024
"""Bytes of shared memory that one program can have on sm_90."""


@pytest.fixture(scope="module")
def findings() -> list[dict[str, Any]]:
    """What the gate says of each case; a process of its own, as kernels here may be decorated for the interpreter."""
    folder = Path(__file__).parent
    command = [sys.executable, str(folder / "compile_gate.py"), *map(str, sorted(folder.glob("*_compile_cases.py")))]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_every_kernel_is_compiled(findings: list[dict[str, Any]]) -> None:
    """A new kernel needs a case."""
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "moe_backbone/kernels").glob("triton_*.py"))
    kernels = {name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE)}
    assert kernels == {finding["name"].split()[-1] for finding in findings}


def test_nothing_spills(findings: list[dict[str, Any]]) -> None:
    """No thread needs a stack: its values stay in registers."""
    assert [finding for finding in findings if finding["stack"]] == []


def test_buffers_fit_in_shared_memory(findings: list[dict[str, Any]]) -> None:
    """A launch that asks for more fails on the device."""
    assert [finding for finding in findings if finding["shared"] > MAX_SHARED] == []


def test_tall_tiles_use_the_tensor_cores_of_sm_90(findings: list[dict[str, Any]]) -> None:
    """Tiles of 64 rows and more in 16 bits become wgmma instructions."""
    wanting = [finding for finding in findings if finding["wants_wgmma"]]
    assert wanting
    assert [finding for finding in wanting if not finding["wgmma"]] == []
