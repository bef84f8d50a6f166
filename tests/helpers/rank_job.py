"""Started by torchrun: a training run, whose ranks leave the hash of their routers in a folder.

python rank_job.py FOLDER FAULT ...words of train_rl.py
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from moe_backbone import ranks
from policies.callbacks import PeriodicSave
from train_rl import main
from training_run import Run


def say(folder: Path) -> None:
    """Before a router is written, its hash goes to `rank<N>`."""
    export = Run.export

    def saying(self: Run) -> None:
        parts = [weight.detach().numpy().tobytes() for weight in self.router.state_dict().values()]
        (folder / f"rank{ranks.rank()}").write_text(hashlib.sha256(b"".join(parts)).hexdigest())
        export(self)

    Run.export = saying  # type: ignore[method-assign]


def break_down(fault: str) -> None:
    """The second rank dies, or is interrupted, before the fourth update of a first start."""
    on_rollout_start, calls = PeriodicSave._on_rollout_start, []

    def failing(self: PeriodicSave) -> Any:
        calls.append(1)
        if len(calls) == 4 and ranks.rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), {"killed": signal.SIGKILL, "interrupted": signal.SIGINT}[fault])
        return on_rollout_start(self)

    if fault in ("killed", "interrupted"):
        PeriodicSave._on_rollout_start = failing  # type: ignore[method-assign]


if __name__ == "__main__":
    say(Path(sys.argv[1]))
    break_down(sys.argv[2])
    main(sys.argv[3:])
