"""The attention of each family, for a decoder layer that is otherwise vLLM's Llama layer.

`LlamaDecoderLayer` takes the class of its attention, and its `LlamaAttention` takes head counts,
head size, biases and each layer's window from what it is given. So one decoder layer, and with it
one kind of block, does for every family.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models import qwen3
from vllm.model_executor.models.llama import LlamaAttention

from vllm_depthpar.plan.families import Family


class Qwen2Attention(LlamaAttention):
    """With biases on q, k and v, and none on o.

    Not vLLM's class of this name: that takes hidden / heads for the size of a head, which it is not
    in a wide layer, and no window of its own.
    """

    def __init__(self, **given: Any) -> None:
        super().__init__(**{**given, "bias": True, "bias_o_proj": False})


class Qwen3Attention(LlamaAttention):
    """With an RMSNorm of every head of q and k before RoPE, by vLLM's own forward pass.

    Relies on: `LlamaAttention` has `q_size` and `kv_size`, which that reads.
    """

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.q_norm = RMSNorm(self.head_dim, eps=given["config"].rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, eps=given["config"].rms_norm_eps)

    forward = qwen3.Qwen3Attention.forward


def attention_of(family: Family) -> type[LlamaAttention]:
    """Choose the class of a family's attention."""
    if family.qk_norm:
        return Qwen3Attention
    return Qwen2Attention if family.qkv_bias else LlamaAttention


class HeadNorm(nn.Module):
    """`q_norm` or `k_norm` of a wide layer: every head has the gain of the layer that it is of.

    The gain can't be folded as those of the stream's norms are: it comes after the projection, and
    RoPE after it. It need not be. RMS is taken over one head at a time, so that heads of different
    layers don't mix in it, and a wide layer's heads are its members', one member after the other.
    Only the gain, which the heads of a layer share, has to become one for each head. Rounded as
    vLLM's norm is: first the normalized head, then its product with the gain.
    """

    def __init__(self, norm: RMSNorm, heads: int) -> None:
        """Take the place of `norm` for so many heads on this rank."""
        super().__init__()
        # Held, not inherited: what `RMSNorm` does with its own weight is vLLM's and changes.
        self.norm = RMSNorm(norm.hidden_size, norm.variance_epsilon, has_weight=False)
        self.weight = nn.Parameter(torch.ones(heads, norm.hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize x, (tokens, heads, head_dim)."""
        normalized: torch.Tensor = self.norm(x)
        return normalized * self.weight
