"""Loads a checkpoint from a folder or by its hub id; whatever is wrong with it is told in one line."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from moe_backbone.checks import require

EXTRA = "pip install -c constraints.txt -e '.[huggingface]'"


def require_transformers() -> None:
    """Refuse to go on without the libraries of the extra.

    Raises:
        ValueError: Names the extra.
    """
    missing = [name for name in ("transformers", "greenlet") if importlib.util.find_spec(name) is None]
    require(not missing, f"--checkpoint must have the extra huggingface installed ({EXTRA}), got no {missing}")


def load_model(
    path_or_id: str, *, dtype: str = "auto", device: str | None = None, device_map: str | None = None
) -> Any:
    """A causal language model in evaluation mode, its weights frozen.

    Args:
        path_or_id: Folder left by `save_pretrained`, or a hub id.
        dtype: `auto` for the checkpoint's own, or a name such as `bfloat16`.
        device: Where it goes; not with `device_map`.
        device_map: As in transformers, such as `auto`; needs accelerate.

    Raises:
        ValueError: If it cannot be loaded as one.
    """
    require_transformers()
    from transformers import AutoModelForCausalLM

    kind = dtype if dtype == "auto" else getattr(torch, dtype, None)
    require(kind == "auto" or isinstance(kind, torch.dtype), f"dtype must be auto or a dtype of torch, got {dtype!r}")
    model = _loaded("a causal language model", path_or_id, AutoModelForCausalLM, dtype=kind, device_map=device_map)
    if device_map is None and device is not None:
        model = model.to(device)
    return model.eval().requires_grad_(False)


def load_tokenizer(path_or_id: str) -> Any:
    """The checkpoint's tokenizer.

    Raises:
        ValueError: If it has none that can be loaded.
    """
    require_transformers()
    from transformers import AutoTokenizer

    tokenizer = _loaded("a tokenizer", path_or_id, AutoTokenizer)
    known = bool(tokenizer("text", add_special_tokens=False)["input_ids"]) and len(tokenizer) > 1
    require(known, f"checkpoint must hold a tokenizer with a vocabulary, got {path_or_id} without one")
    return tokenizer


def _loaded(what: str, path_or_id: str, kind: Any, **how: Any) -> Any:
    path = Path(path_or_id)
    looks_local = path.exists() or path.is_absolute() or path_or_id.startswith((".", "~"))
    require(not looks_local or path.is_dir(), f"checkpoint must be a folder or a hub id, got {path_or_id}")
    try:
        return kind.from_pretrained(path_or_id, **how)
    except Exception as error:  # whatever transformers, safetensors, hub and tokenizers raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"checkpoint must hold {what} that transformers can load, got {path_or_id}: {reason}"
        ) from None
