"""Checkpoints of transformers as a `Backbone`; needs the extra `huggingface`."""

from moe_backbone.huggingface.backbone import CheckpointState, HuggingFaceBackbone
from moe_backbone.huggingface.loading import load_model, load_tokenizer

__all__ = ["CheckpointState", "HuggingFaceBackbone", "load_model", "load_tokenizer"]
