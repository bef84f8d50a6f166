"""A backbone in a folder comes back the same, and nothing else is taken for one."""

import json

import pytest
import torch

from moe_backbone import BackboneConfig, MoETransformer
from moe_backbone.saved import DESCRIPTION, WEIGHTS, load_saved, read_about, save_backbone

CONFIG = BackboneConfig(hidden_size=16, num_layers=1, num_heads=2, num_experts=4, top_k=2, intermediate_size=8)


@pytest.fixture
def saved(tmp_path):
    backbone = MoETransformer(CONFIG)
    save_backbone(backbone, tmp_path / "kept", {"recipe": "none"})
    return backbone, tmp_path / "kept"


def test_comes_back_to_the_bit(saved):
    backbone, folder = saved
    loaded = load_saved(folder)
    assert loaded.sha256() == backbone.sha256()
    assert not loaded.training and not any(weight.requires_grad for weight in loaded.parameters())
    assert read_about(folder) == {"recipe": "none"}


def test_refuses_a_folder_without_files(tmp_path):
    with pytest.raises(ValueError, match="backbone folder must hold readable"):
        load_saved(tmp_path)


@pytest.mark.parametrize("name", [WEIGHTS, DESCRIPTION])
def test_refuses_a_file_that_is_cut_off(saved, name):
    path = saved[1] / name
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="must hold readable"):
        load_saved(saved[1])


def test_refuses_weights_of_other_sizes(saved):
    path = saved[1] / DESCRIPTION
    description = json.loads(path.read_text())
    description["config"]["hidden_size"] = 32
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match="weights must fit"):
        load_saved(saved[1])


def test_refuses_another_format(saved):
    path = saved[1] / DESCRIPTION
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 9}))
    with pytest.raises(ValueError, match="format must be 1, got 9"):
        load_saved(saved[1])


def test_runs_as_before(saved):
    backbone, folder = saved
    tokens = torch.arange(8).unsqueeze(0)
    torch.testing.assert_close(load_saved(folder)(tokens), backbone.eval()(tokens), rtol=0, atol=1e-5)
