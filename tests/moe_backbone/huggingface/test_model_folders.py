"""Every folder of transformers whose experts go through its experts interface, each as a tiny model without training.

The folders are found by what their code says, and their configurations shrunk by the names of their fields, so a new
version of transformers brings its new folders to this test by itself. Weights are random.
"""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_backbone import NativeRouter, SiteView
from moe_backbone.huggingface import HuggingFaceBackbone
from moe_backbone.kernels import count_rows

transformers = pytest.importorskip("transformers")
pytest.importorskip("greenlet")

VOCABULARY, NUM_EXPERTS, NUM_LAYERS = 128, 8, 3
NUM_SEQUENCES, SEQ_LEN = 2, 12
LEAST_FOLDERS = 55
CHANCE = 0.3
"""That a unit runs in a random subset."""
TOLERANCE = 1e-5
"""Of logits of size one half."""
SPREAD = 0.1
"""Standard deviation of random weights; with larger ones some recurrences make much of the last bit."""

NOT_COVERED = {
    "diffusion_gemma": "no causal model: it improves a canvas of random tokens, and has no logits of the given ones",
}
"""Folders that are left out, and why."""

WIDTH, HEADS, HEAD, RANK, INNER, FEW = 32, 4, 8, 16, 16, 8
SIZES: dict[str, Any] = {
    name: size
    for size, names in (
        (VOCABULARY, "vocab_size unpadded_vocab_size vocab_size_per_layer_input"),
        (WIDTH, "hidden_size d_model moe_hidden_size output_dim output_channels out_hidden_size text_hidden_size"),
        (WIDTH, "projector_hidden_size projection_hidden_dim adapter_in_dim adapter_out_dim adapter_input_size"),
        (INNER, "intermediate_size moe_intermediate_size dense_intermediate_size shared_intermediate_size mlp_dim"),
        (INNER, "shared_expert_intermediate_size shared_experts_intermediate_size router_hidden_size encoder_ffn_dim"),
        (INNER, "moe_shared_expert_intermediate_size projection_intermediate_size downsample_hidden_size"),
        (NUM_LAYERS, "num_hidden_layers"),
        (HEADS, "num_attention_heads swa_num_attention_heads linear_num_heads linear_num_value_heads"),
        (HEADS, "mamba_n_heads mamba_num_heads"),
        (2, "num_key_value_heads swa_num_key_value_heads linear_num_key_heads index_n_heads"),
        (2, "num_heads encoder_attention_heads o_groups n_groups"),
        (HEAD, "head_dim swa_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim"),
        (HEAD, "qk_nope_head_dim qk_rope_head_dim v_head_dim"),
        (RANK, "q_lora_rank kv_lora_rank index_head_dim mamba_head_dim"),
        (FEW, "o_lora_rank hc_lowrank gated_norm_rank hidden_size_per_layer_input d_rel"),
        (FEW, "mamba_d_state ssm_state_size chunk_size mamba_chunk_size block_size"),
        (FEW, "sliding_window sliding_window_size index_topk index_block_size"),
        (NUM_EXPERTS, "num_experts n_routed_experts num_local_experts moe_num_experts"),
        (2, "num_experts_per_tok moe_topk moe_k top_k_experts n_group"),
        (1, "topk_group n_shared_experts first_k_dense_replace num_dense_layers depth encoder_layers"),
        (0, "num_mtp_layers num_nextn_predict_layers"),
        (64, "max_position_embeddings image_size ngram_vocab_size_base rel_extent"),
        (4, "split_ngram_parts index_kpool"),
        (None, "pad_token_id bos_token_id eos_token_id"),
    )
    for name in names.split()
}
"""Sizes of a tiny model by the names that configurations give them."""
STAYS_NONE = {"sliding_window", "q_lora_rank", "n_group", "unpadded_vocab_size", "topk_group", "mlp_dim"}
"""What is switched off where it is None; other fields that are None stand for a size that is missing."""
EACH_HEAD_ITS_KEYS = {"kv_lora_rank", "linear_num_heads"}
"""Fields of attention in which every head has keys and values of its own."""

ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
SPARSE = ["dense", "sparse", "sparse"]
EXTRA: dict[str, dict[str, Any]] = {
    "beam": {"mlp_layer_types": SPARSE},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": SPARSE}},
    "dots3_note": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16}
    | {"swa_kv_lora_rank": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_qk_rope_head_dim": 8}
    | {"swa_v_head_dim": 8},
    "ernie4_5_vl_moe": {
        "text_config": {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}, "moe_intermediate_size": [16, 16]}
    },
    "flint": {"mlp_only_layers": [0]},
    "gemma4": {"enable_moe_block": True, "global_head_dim": HEAD},
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0, "mlp_layer_types": SPARSE}},
    "glm4v_moe": {"text_config": {"rope_parameters": ROPE | {"mrope_section": [1, 1, 0]}}},
    "jamba": {"num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "muse_spark": {"audio_config": {"patch_sizes": [2] * 3, "hidden_sizes": [8] * 3, "depths": [1] * 3}},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    "zaya": {"num_experts_per_tok": 1},
}
"""What the names of fields do not say."""


def folders() -> list[str]:
    """Folders of transformers whose models use its experts interface."""
    root = Path(transformers.__file__).parent / "models"
    return sorted(
        path.parent.name for path in root.glob("*/modeling_*.py") if "@use_experts_implementation" in path.read_text()
    )


COVERED = [folder for folder in folders() if folder not in NOT_COVERED]


def tiny_config(kind: Any, extra: dict[str, Any]) -> Any:
    """A configuration of this class with the sizes above, inner ones too."""
    fields = {field.name: field.default for field in dataclasses.fields(kind)}
    given = {
        name: size
        for name, size in SIZES.items()
        if name in fields and not (name in STAYS_NONE and fields[name] is None)
    }
    if EACH_HEAD_ITS_KEYS & fields.keys():
        given["num_key_value_heads"] = HEADS
    for name, inner in kind.sub_configs_defaults.items():
        inner_kind = transformers.CONFIG_MAPPING[inner.model_type] if inner.model_type else inner.config_class
        given[name] = tiny_config(inner_kind, extra.get(name, {}))
    return kind(**given | {name: value for name, value in extra.items() if name not in kind.sub_configs_defaults})


def model_class(folder: str) -> Any:
    """The folder's language model: over text alone if there is one."""
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    own = [kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == module.__name__]
    writers = [kind for kind in own if issubclass(kind, transformers.GenerationMixin)]
    for ending, kinds in (
        ("ForCausalLM", writers),
        ("ForConditionalGeneration", writers),
        ("ForTokenClassification", own),
    ):
        for kind in kinds:
            if kind.__name__.endswith(ending):
                return kind
    raise LookupError(folder)


def tiny_model(folder: str) -> Any:
    """The folder's model, tiny, with random weights."""
    torch.manual_seed(0)
    kind = model_class(folder)
    model = kind(tiny_config(kind.config_class, EXTRA.get(folder, {}))).eval().requires_grad_(False)
    for name, numbers in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("bias") or (numbers.dim() > 1 and isinstance(numbers, torch.nn.Parameter)):
            numbers.normal_(std=SPREAD)
        if not numbers.is_floating_point() and numbers.shape == (VOCABULARY, 2):  # a table of experts for each token
            numbers.copy_(torch.rand(VOCABULARY, NUM_EXPERTS).argsort(1)[:, :2])
    return model


def random_tokens() -> Tensor:
    """Token ids (NUM_SEQUENCES, SEQ_LEN), int64."""
    return torch.randint(VOCABULARY, (NUM_SEQUENCES, SEQ_LEN), generator=torch.Generator().manual_seed(1))


class FewUnits:
    """Router that runs few units, and none for the first token."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(2)

    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units)."""
        subset = torch.rand(view.scores.shape, generator=self.generator) < CHANCE
        subset[0] = False
        return subset


@pytest.fixture(params=COVERED)
def model(request: pytest.FixtureRequest) -> Any:
    """A tiny model of each folder."""
    return tiny_model(request.param)


@torch.no_grad()
def bare_logits(model: Any) -> Tensor:
    """What the model itself says of `random_tokens` (NUM_SEQUENCES, SEQ_LEN, vocab_size)."""
    logits: Tensor = model(input_ids=random_tokens(), use_cache=False).logits
    return logits


def test_nearly_every_folder_is_covered() -> None:
    assert len(COVERED) >= LEAST_FOLDERS
    assert set(NOT_COVERED) <= set(folders()), "a folder that is left out does not exist"


def test_expert_layers_are_found_in_running_order(model: Any) -> None:
    sites = HuggingFaceBackbone(model, seq_len=SEQ_LEN).sites
    layers = [site.layer for site in sites]
    assert len(sites) >= 2
    assert layers == sorted(set(layers))
    assert {(site.kind, site.num_units) for site in sites} == {("experts", NUM_EXPERTS)}
    assert all(1 <= site.native_units <= 2 and site.unit_flops > 0 for site in sites)


@torch.no_grad()
def test_native_routing_is_the_bare_model(model: Any) -> None:
    bare = bare_logits(model)
    logits, subsets = HuggingFaceBackbone(model, seq_len=SEQ_LEN).run(random_tokens(), NativeRouter())
    torch.testing.assert_close(logits, bare, rtol=0, atol=TOLERANCE)
    assert bare.std() > 1000 * TOLERANCE
    assert all(subset.any() for subset in subsets)


@torch.no_grad()
def test_a_run_is_the_walk_and_runs_the_chosen_rows_alone(model: Any) -> None:
    tokens, backbone = random_tokens(), HuggingFaceBackbone(model, seq_len=SEQ_LEN)
    with count_rows() as rows:
        logits, subsets = backbone.run(tokens, FewUnits())
    assert rows == {"experts": sum(int(subset.sum()) for subset in subsets)}
    state = backbone.begin(tokens)
    for index, subset in enumerate(subsets):
        assert backbone.observe(state).index == index
        state = backbone.advance(state, subset)
    assert torch.equal(backbone.finish(state), logits)
    native, _ = backbone.run(tokens, NativeRouter())
    assert (logits - native).abs().max() > 100 * TOLERANCE, "what runs must matter"


def test_release_leaves_the_model_as_it_was(model: Any) -> None:
    bare, implementations = bare_logits(model), model.get_experts_implementation()
    backbone = HuggingFaceBackbone(model, seq_len=SEQ_LEN)
    backbone.model_sites.release()
    assert torch.equal(bare_logits(model), bare)
    assert model.get_experts_implementation() == implementations
