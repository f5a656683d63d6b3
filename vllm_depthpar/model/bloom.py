"""The parts of BLOOM's layers: vLLM's, called and loaded as other families' are.

vLLM loads them by its whole model.
"""

from __future__ import annotations

import torch
from torch import nn
from vllm.model_executor.models import bloom
from vllm.model_executor.models.utils import AutoWeightsLoader

from vllm_depthpar.model.decoder_layers import Weights


class LayerNorm(nn.LayerNorm):
    """A LayerNorm that is called as vLLM's RMSNorm is."""

    def forward(
        self, x: torch.Tensor, stream: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Normalize x, (tokens, hidden); or x + stream, and return that sum, too."""
        if stream is None:
            return super().forward(x)
        stream = stream + x
        return super().forward(stream), stream


class BloomAttention(bloom.BloomAttention):
    """BLOOM's, which loads q, k and v: files have them head by head."""

    def load_weights(self, weights: Weights) -> set[str]:
        """Load ("query_key_value.weight", (3 hidden, hidden)), its bias, and those of `dense`."""
        heads = self.total_num_heads
        return AutoWeightsLoader(self).load_weights(
            (name, _by_kind(tensor, heads) if name.startswith("query_key_value.") else tensor)
            for name, tensor in weights
        )


def _by_kind(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Put the rows of all heads' q first, then those of k and of v."""
    return tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
