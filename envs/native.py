"""What native routing predicts, run once for each text."""

from __future__ import annotations

import torch
from torch import Tensor

from envs.rollout import block_sequences
from moe_backbone import Backbone, NativeRouter


class NativeReference:
    """Logits of the native rollout; those of the texts seen first are kept.

    The first texts stay until memory is full and none is ever dropped. Passes over a corpus then find the share `c` of
    texts that fits; dropping the one used longest ago would find none of them in passes of one order, and about
    `c**2 / 2` in shuffled ones. What is kept is float32 and equals another run to the bit as long as the backbone gives
    a token the same bits in every batch.

    Args:
        backbone: Frozen, in evaluation mode.
        max_bytes: Most bytes of logits kept; 0 keeps nothing.
    """

    def __init__(self, backbone: Backbone, max_bytes: int) -> None:
        self.backbone, self.max_bytes = backbone, max_bytes
        self.device = next(backbone.parameters()).device
        self._kept: dict[bytes, Tensor] = {}

    def logits(self, tokens: Tensor) -> Tensor:
        """Predictions of native routing.

        Args:
            tokens: (num_sequences, seq_len), int64.

        Returns:
            (num_sequences, seq_len, vocab_size), float32, on the backbone's device.
        """
        if not self.max_bytes:
            return self._run(tokens)
        texts = [row.tobytes() for row in tokens.cpu().numpy()]
        new = {text: row for row, text in enumerate(texts) if text not in self._kept}
        fresh = dict(zip(new, self._run(tokens[list(new.values())]), strict=True)) if new else {}
        for text, row in fresh.items():
            if (len(self._kept) + 1) * row.nbytes > self.max_bytes:
                break
            self._kept[text] = row.clone()  # a view would keep the whole batch
        return torch.stack([fresh[text] if text in fresh else self._kept[text] for text in texts])

    def _run(self, tokens: Tensor) -> Tensor:
        tokens = to_device(tokens, self.device)
        blocks = tokens.split(block_sequences(tokens))
        return torch.cat([self.backbone.run(block, NativeRouter())[0] for block in blocks])


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device; from pinned memory to a GPU, so that the host need not wait for the copy."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
