from __future__ import annotations

import json
from datetime import datetime

import pytest

from evaluation.html_report import run_provenance
from evaluation.html_report.provenance import without_folders


@pytest.mark.parametrize(
    ("command", "short"),
    [
        ("python /home/me/x/evaluate_rl.py runs/one", "python evaluate_rl.py runs/one"),
        ("python a.py --corpus=/data/a.txt --corpus /data/more/", "python a.py --corpus=a.txt --corpus more"),
        ("python a.py '/my data/a b.txt' ~/secret/b.txt", "python a.py 'a b.txt' b.txt"),
        ("python a.py ../up/c.txt --share 0.5", "python a.py ../up/c.txt --share 0.5"),
    ],
)
def test_folders_of_this_machine_stay_here(command, short):
    assert without_folders(command) == short


def test_a_run_says_what_it_was(tmp_path, tiny_corpus):
    (tmp_path / "command.txt").write_text("python /home/me/train_rl.py --seed 3\n")
    (tmp_path / "versions.json").write_text(json.dumps({"torch": "2.13", "triton": None}))
    facts = run_provenance(
        tmp_path, tiny_corpus, command=["/x/evaluate_rl.py", "runs/one"], seeds=[3, 4], now=datetime(2026, 1, 2, 3, 4)
    )
    assert facts["run"] == tmp_path.name
    assert facts["page made by"] == "python evaluate_rl.py runs/one"
    assert facts["trained by"] == "python train_rl.py --seed 3"
    assert facts["made on"] == "2026-01-02 03:04"
    assert tiny_corpus.sha256 in facts["corpus"]
    assert facts["seeds"] == "3 4"
    assert facts["versions of the training run"] == "torch 2.13"
    assert str(tmp_path.parent) not in " ".join(facts.values())


def test_a_folder_without_a_run_is_no_hindrance(tmp_path, tiny_corpus):
    facts = run_provenance(tmp_path / "new", tiny_corpus, command=["evaluate_rl.py"], seeds=[])
    assert "trained by" not in facts
    assert "seeds" not in facts
