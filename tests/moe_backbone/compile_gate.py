"""Compile kernels for sm_90 without a GPU: `python compile_gate.py CASES.py ...` prints a JSON list of findings.

Each file of cases has `compile_cases()`: a list of `CompileCase`. Run it in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import __file__ as nvidia_backend
from triton.runtime.jit import JITFunction

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}
CUOBJDUMP = Path(nvidia_backend).parent / "bin" / "cuobjdump"


class CompileCase(NamedTuple):
    """One kernel with one set of constants."""

    name: str
    kernel: JITFunction
    signature: dict[str, str]
    """Argument name to type: `*bf16`, `i32`, `constexpr`, ..."""
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    wants_wgmma: bool


def recorded_cases(name: str, launch: Callable[[], object], wants_wgmma: Callable[[str], bool]) -> list[CompileCase]:
    """Cases of all kernels that `launch` would run; it gets tensors on the meta device, so that nothing is computed.

    Args:
        name: Put before the name of each kernel.
        launch: Calls product code.
        wants_wgmma: Whether the kernel of this name must use the tensor cores of sm_90.
    """
    cases = []

    def record(kernel: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: Any) -> None:
        options = {key: kwargs.pop(key, None) for key in ("num_warps", "num_stages")}
        values = kernel.signature.bind(*args, **kwargs).arguments
        constant = {param.name for param in kernel.params if param.is_constexpr}
        signature = {key: "constexpr" if key in constant else _type(value) for key, value in values.items()}
        constexprs = {key: value for key, value in values.items() if key in constant}
        title = f"{name} {kernel.__name__}"
        warps, stages = options["num_warps"] or 4, options["num_stages"] or 3
        cases.append(CompileCase(title, kernel, signature, constexprs, warps, stages, wants_wgmma(kernel.__name__)))

    with _run_replaced(record):
        launch()
    return cases


@contextmanager
def _run_replaced(record: Callable[..., None]) -> Iterator[None]:
    original, JITFunction.run = JITFunction.run, record
    try:
        yield
    finally:
        JITFunction.run = original


def _type(value: object) -> str:
    return TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"


def compile_case(case: CompileCase) -> dict[str, Any]:
    """Findings: name, bytes of shared memory, registers of a thread, bytes of its stack, wgmma wanted and found."""
    pointers = [index for index, kind in enumerate(case.signature.values()) if kind.startswith("*")]
    source = triton.compiler.ASTSource(
        case.kernel,
        case.signature,
        {(list(case.signature).index(key),): value for key, value in case.constexprs.items()},
        {(index,): [["tt.divisibility", 16]] for index in pointers},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=TARGET, options=options)
    registers, stack = _resources(compiled.asm["cubin"])
    return {
        "name": case.name,
        "shared": compiled.metadata.shared,
        "registers": registers,
        "stack": stack,
        "wants_wgmma": case.wants_wgmma,
        "wgmma": "wgmma.mma_async" in compiled.asm["ptx"],
    }


def _resources(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(\w+):(\d+)", usage))
    return int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"])


def main(files: list[str]) -> None:
    """Print the findings of all cases; equal launches are compiled once, on all cores."""
    cases: dict[str, CompileCase] = {}
    for file in files:
        for case in runpy.run_path(file)["compile_cases"]():
            cases.setdefault(str(case[1:]), case)
    distinct.extend(cases.values())
    with multiprocessing.get_context("fork").Pool(min(len(distinct), os.cpu_count() or 1)) as pool:
        print(json.dumps(pool.map(_compile_numbered, range(len(distinct)), chunksize=1)))


distinct: list[CompileCase] = []
"""Filled before the workers fork, as kernels cannot be sent to them."""


def _compile_numbered(number: int) -> dict[str, Any]:
    return compile_case(distinct[number])


if __name__ == "__main__":
    main(sys.argv[1:])
