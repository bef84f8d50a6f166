"""Checkpoints of transformers as a `Backbone`; needs the extra `huggingface`."""

from moe_backbone.huggingface.backbone import CheckpointState, HuggingFaceBackbone
from moe_backbone.huggingface.loading import load_model, load_tokenizer
from moe_backbone.huggingface.vocabulary import TokenizerVocabulary

__all__ = ["CheckpointState", "HuggingFaceBackbone", "TokenizerVocabulary", "load_model", "load_tokenizer"]
