"""Students with fewer experts a token: fine-tuned on their teacher's predictions, on the text alone, and not at all.

python -m benchmarks.distillation RUN                 # RUN: folder that train_rl.py left, whose backbone is the teacher

Every student starts from the teacher's weights and gets the same steps, batches and learning rate. Students stay in
the output folder as `save_backbone` leaves them, for `benchmarks.compression --students` and
`train_rl.py --backbone-dir`. Stopped, the command goes on from the last look at the validation text.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from rich.table import Table

from benchmarks.compression_rows import WIDTH, Row, RowFile, Scorer, own_run, rise
from evaluation import log_likelihood_difference, print_and_keep
from moe_backbone import MoETransformer
from moe_backbone.checks import require
from moe_backbone.corpus import Corpus
from moe_backbone.distill import DistillConfig, distilled
from moe_backbone.files import write_text_atomic
from moe_backbone.pretrain import PretrainConfig
from policies.baselines import TopK

logger = logging.getLogger(__name__)

KINDS = {"none": "not fine-tuned", "text": "fine-tuned on the text", "kl": "fine-tuned on the teacher"}


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Train students and hold them against each other."""

    run: tyro.conf.Positional[Path]
    """Folder of a run of `train_rl.py`; only its backbone and corpus are used."""
    output: Path | None = None
    """Where students and tables go; `distillation` in the run's folder if None."""
    top_k: tuple[int, ...] = (1, 2, 3)
    """Experts a token of the students."""
    settings: PretrainConfig = PretrainConfig(steps=150, learning_rate=1e-3, eval_every=50)
    """Of every fine-tuning; the learning rate is a third of pretraining's, as where a backbone is adapted."""
    distill: DistillConfig = DistillConfig()
    """What students learn from their teacher."""
    selection_tokens: int = 8_192
    """Validation tokens."""
    max_tokens: int = 16_384
    """Test tokens that are reported."""


def students(config: DistillationConfig, folder: Path, corpus: Corpus, teacher: MoETransformer) -> Iterator[Row]:
    """One row for each student, trained if it is not there; the teacher trained on as long on the text at the end."""
    scorer = Scorer(teacher, corpus, config.selection_tokens, config.max_tokens)
    about = {"teacher": teacher.sha256(), "corpus": corpus.sha256, "settings": repr((config.settings, config.distill))}
    rows = RowFile(folder / "rows.json", about | {"max_tokens": config.max_tokens})
    yield rows.get("teacher", {}, lambda: scorer.score("teacher", "full", None, {"k": teacher.config.top_k}))
    wanted = [(kind, k) for k in config.top_k for kind in KINDS] + [("text", teacher.config.top_k)]
    for kind, k in wanted:

        def make(kind: str = kind, k: int = k) -> Row:
            if kind == "none":
                return scorer.score(kind, "full", TopK(k=k), {"k": k})
            name = f"{kind}-{k}"
            distill = config.distill if kind == "kl" else replace(config.distill, teacher_weight=0.0)
            logger.info("student %s", name)
            student = distilled(folder / "students" / name, corpus, teacher, k, config.settings, distill)
            scorer.add(name, student, 32)
            return scorer.score(kind, name, None, {"k": k})

        yield rows.get(kind, {"k": k}, make)


def table(rows: Sequence[Row]) -> Table:
    """Students on test text, against the teacher and against the one that saw the text alone."""
    shown = Table(title="Students with fewer experts, test text; loss in nats a token, differences paired by document")
    shown.add_column("experts", justify="right")
    shown.add_column("fine-tuning")
    for name in ("FLOPs routed", "loss", "accuracy", "rise over the teacher [95 %]", "minus on the text [95 %]"):
        shown.add_column(name, justify="right")
    by_text = {row.held_out.setting["k"]: row.held_out for row in rows if row.router == "text"}
    for row in rows:
        point, k = row.held_out, row.held_out.setting["k"]
        rival = by_text.get(k)
        gap = "-"
        if rival is not None and row.router == "kl":
            found = log_likelihood_difference(rival.documents, point.documents)
            gap = f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
        cells = [f"{row.flops:.3f}", f"{point.loss:.4f}", f"{point.accuracy:.4f}", rise(point)]
        shown.add_row(
            str(k), KINDS.get(row.router, row.router), *cells, gap, end_section=row.router in ("kl", "teacher")
        )
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = tyro.cli(DistillationConfig, description=__doc__, args=arguments)
    try:
        corpus, teacher = own_run(config.run)
        most = teacher.config.top_k
        require(all(1 <= k < most for k in config.top_k), f"top_k must lie in [1, {most - 1}], got {config.top_k}")
        folder = config.output or config.run / "distillation"
        folder.mkdir(parents=True, exist_ok=True)
        rows = list(students(config, folder, corpus, teacher))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    shown = table(rows)
    print_and_keep([shown], folder / "tables.txt", width=WIDTH)
    points: list[Mapping[str, object]] = [{**row.to_json(), "flops": row.flops} for row in rows]
    write_text_atomic(folder / "distillation.json", json.dumps(points, indent=1) + "\n")
    logger.info("students and tables are in %s", folder)


if __name__ == "__main__":
    main()
