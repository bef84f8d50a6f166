"""What the GPU benchmark measures: kernels in Triton's interpreter on tiny sizes, with a made-up clock."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from benchmarks import gpu_checks, gpu_experts, gpu_first_call, gpu_heads, gpu_rivals
from benchmarks.experts import Sizes
from benchmarks.gpu_experts import Case
from benchmarks.gpu_heads import HeadSizes
from benchmarks.gpu_machine import Machine
from benchmarks.measure import Row

CPU = torch.device("cpu")
TINY = Sizes(num_tokens=6, hidden_size=16, intermediate_size=8, num_experts=4)
TINY_HEADS = HeadSizes(num_sequences=2, num_queries=4, num_keys=4, num_heads=2, head_size=4, hidden_size=8)


def _named(rows: Iterator[Row]) -> dict[str, Row]:
    return {row.name: row for row in rows}


@pytest.mark.parametrize("any_subset", [True, False], ids=["any subset", "fixed number"])
def test_rivals_are_timed_on_equal_outputs(machine: Machine, any_subset: bool) -> None:
    """Every rival that is here gives the reference's output, and takes a multiple of our made-up time."""
    pytest.importorskip("transformers")
    bars = {"grouped_mm": 3.0, "batched_mm": 3.0, "eager": 1.5}
    case = Case(name="tiny", sizes=TINY, any_subset=any_subset, bars=bars, goals={"launches": 5, "tflops": 450})
    rows = _named(gpu_experts.compete(machine, "case", case))
    ratios = {"case/grouped_mm": 2.0, "case/batched_mm": 3.0, "case/eager": 4.0, "case/launches": 1.0}
    assert {name: row.ratio for name, row in rows.items() if name != "case/tflops"} == ratios
    assert all(row.equal for row in rows.values())
    ours = rows["case/eager"].detail["ours"]
    work = gpu_experts.layer_work(TINY, gpu_rivals.draw(TINY, CPU, torch.float32, any_subset=any_subset).subset, 4)
    assert ours["tflops"] == pytest.approx(work[0] / 1e-3 / 1e12)
    assert rows["case/tflops"].ratio == pytest.approx(ours["tflops"] / 450)
    assert ours["fraction_of_floor"] == pytest.approx(max(work[0] / 1e15, work[1] / 1e12) / 1e-3)


RIVALS = """
def rivals():
    def prepare(inputs, slots):
        def run():
            output = inputs.hidden.new_zeros(inputs.hidden.shape)
            for slot in range(slots.ids.shape[1]):
                for token, expert in enumerate(slots.ids[:, slot].tolist()):
                    if expert < len(inputs.gate_up):
                        gate, up = (inputs.hidden[token] @ inputs.gate_up[expert]).chunk(2)
                        inner = gate * gate.sigmoid() * up
                        output[token] += slots.weights[token, slot] * (inner @ inputs.down[expert])
            return output
        return run
    return {"theirs": prepare, "wrong": lambda inputs, slots: lambda: inputs.hidden, "fails": None}
"""


def test_rivals_from_outside_are_checked_and_cannot_stop_the_others(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is right is timed, one that is wrong and one that fails have no ratio."""
    (tmp_path / "rivals.py").write_text(RIVALS, encoding="utf-8")
    monkeypatch.setenv(gpu_rivals.VARIABLE, str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "rivals", raising=False)
    case = Case(name="tiny", sizes=TINY, any_subset=True, bars={}, external_bar=1.5)
    rows = _named(gpu_experts.compete(machine, "case", case))
    gpu_rivals.external.cache_clear()
    assert {name: (row.ratio, row.equal) for name, row in rows.items()} == {
        "case/theirs": (2.0, True),
        "case/wrong": (None, False),
        "case/fails": (None, False),
    }
    assert "NoneType" in rows["case/fails"].detail["error"]


def test_a_rivals_file_that_cannot_be_read_is_a_row_that_says_why(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own figures are still taken."""
    monkeypatch.setenv(gpu_rivals.VARIABLE, str(tmp_path / "none"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "rivals", raising=False)
    rows = _named(gpu_experts.compete(machine, "case", Case(name="tiny", sizes=TINY, bars={}, goals={"launches": 4})))
    gpu_rivals.external.cache_clear()
    assert "No module named 'rivals'" in rows["case/rivals.py"].detail["error"]
    assert rows["case/launches"].ratio == 0.8


def test_a_wrong_kernel_has_no_ratio(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: our op drops a token."""
    right = gpu_experts.expert_mlp

    def wrong(*inputs: Tensor, backend: str) -> Tensor:
        return right(*inputs, backend=backend).index_fill(0, torch.tensor([0]), 0.0)

    monkeypatch.setattr(gpu_experts, "expert_mlp", wrong)
    case = Case(name="tiny", sizes=TINY, bars={"eager": 1.0}, goals={"tflops": 450})
    assert not any(row.equal for row in gpu_experts.compete(machine, "case", case))


def test_mask_and_skew(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ratios of the made-up times; skew is compared by the row."""
    for name in ("G3", "G3_EMPTY", "G8"):
        monkeypatch.setattr(gpu_experts, name, TINY)
    rows = _named(gpu_experts.follows_mask(machine)) | _named(gpu_experts.skew(machine))
    assert all(row.equal for row in rows.values())
    assert rows["follows-mask/k1-of-k4"].ratio == 2.0
    assert rows["follows-mask/empty"].ratio == 0.015
    uniform, zipf = rows["skew/zipf"].detail["rows"]
    assert rows["skew/zipf"].ratio == pytest.approx(1000 / uniform / (2000 / zipf))


@pytest.mark.parametrize("num_queries", [4, 1], ids=["prefill", "decode"])
def test_dense_attention_equals_the_kernel(machine: Machine, monkeypatch: pytest.MonkeyPatch, num_queries: int) -> None:
    """At every share."""
    sizes = HeadSizes(**{**vars(TINY_HEADS), "num_queries": num_queries})
    monkeypatch.setattr(gpu_heads, "WORK", {"work": sizes})
    rows = list(gpu_heads.heads(machine))
    assert [row.detail["share"] for row in rows] == [1.0, 0.5, 0.25]
    assert [(row.equal, row.ratio) for row in rows] == [(True, 2.0)] * 3


@pytest.fixture
def tiny_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tiny case each."""
    monkeypatch.setattr(gpu_checks, "DTYPES", (torch.float32,))
    monkeypatch.setattr(gpu_checks, "EXPERT_SIZES", (TINY,))
    monkeypatch.setattr(gpu_checks, "HEAD_SIZES", (TINY_HEADS,))
    monkeypatch.setattr(gpu_checks, "REPEATED", TINY)
    monkeypatch.setattr(gpu_checks, "REPEATED_HEADS", TINY_HEADS)
    monkeypatch.setattr(gpu_checks, "REPEATS", 2)


@pytest.mark.usefixtures("tiny_checks")
def test_accuracy_is_that_of_a_loop(machine: Machine) -> None:
    """Outputs and gradients in float32; the error is of rounding, so both errors are of one order."""
    rows = _named(gpu_checks.accuracy(machine))
    assert list(rows) == ["accuracy/experts-float32", "accuracy/experts-gradients-float32", "accuracy/heads-float32"]
    for row in rows.values():
        assert row.equal
        assert 0 < row.detail["relative_error"] < 1e-6
        assert row.ratio == pytest.approx(row.detail["relative_error_of_loop"] / row.detail["relative_error"])


@pytest.mark.usefixtures("tiny_checks")
def test_bits_and_waits(machine: Machine) -> None:
    """All hold in the interpreter; a planted wait and a planted change of bits are seen."""
    rows = [*gpu_checks.equal_bits(machine), *gpu_checks.no_waits(machine)]
    assert [row.name.split("/")[1] for row in rows] == [
        *("experts-runs", "experts-replays", "heads-runs", "heads-replays"),
        *("experts", "heads"),
    ]
    assert all(row.equal and row.ratio == 1.0 for row in rows)


@pytest.mark.usefixtures("tiny_checks")
def test_planted_faults_are_seen(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An op whose bits change from run to run, and one that makes the host wait."""
    calls = iter(range(1000))
    waiting = iter([False] * 2 + [True])

    def repeated(*_: object) -> Iterator[tuple[str, Callable[[Tensor], Tensor], list[Tensor]]]:
        yield "op", lambda mask: mask + float(next(calls)), [torch.zeros(1)] * 2

    def waits(*_: object) -> Iterator[tuple[str, Callable[[Tensor], Tensor], list[Tensor]]]:
        def run(mask: Tensor) -> Tensor:
            if next(waiting):
                raise RuntimeError("called a synchronizing CUDA operation")
            return mask

        yield "op", run, [torch.zeros(1)] * 2

    monkeypatch.setattr(gpu_checks, "_repeated", repeated)
    assert [row.equal for row in gpu_checks.equal_bits(machine)] == [False, False]
    monkeypatch.setattr(gpu_checks, "_repeated", waits)
    (row,) = gpu_checks.no_waits(machine)
    assert row.ratio == 0.0
    assert "synchronizing" in row.detail["error"]


def test_first_call_runs_in_a_fresh_process(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an empty cache of kernels; its last word is the time."""

    def run(command: list[str], env: dict[str, str], **_: object) -> SimpleNamespace:
        assert command[1:] == ["-m", gpu_first_call.__name__]
        assert list(Path(env["TRITON_CACHE_DIR"]).iterdir()) == []
        return SimpleNamespace(returncode=0, stdout="noise\n2.5\n", stderr="")

    monkeypatch.setattr(gpu_checks.subprocess, "run", run)
    (row,) = gpu_checks.first_call(machine)
    assert row.ratio == 2.0
    assert gpu_first_call.first_call(TINY, CPU, torch.float32) > 0
