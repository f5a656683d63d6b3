"""The decoder layers that blocks are made of: a layer of the checkpoint, or halves of it, as it is.

vLLM's own, but for who calls their parts and who reduces: that is `vllm_depthpar.model.blocks`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedConfig
from vllm.config import VllmConfig
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.model_executor.models.utils import AutoWeightsLoader

from vllm_depthpar.model.attention import attention_of
from vllm_depthpar.model.members import Member
from vllm_depthpar.plan.families import family_of
from vllm_depthpar.vllm_compat import member_of_this_rank, narrowed_tensor_parallel

Weights = Iterable[tuple[str, torch.Tensor]]


class DecoderLayer(Member, LlamaDecoderLayer):
    """A layer of a family that is Llama's but for its attention."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        prefix: str,
        config: PreTrainedConfig | None = None,
        attends: bool = True,
        feeds: bool = True,
    ) -> None:
        """Build the layer.

        Args:
            config: of the layer (the model's).
            attends, feeds: whether it has an attention and an MLP; without, it has no weights and
                no KV cache of that half, and no norm before it.
        """
        family = family_of(vllm_config.model_config.hf_config.to_dict())
        attention = attention_of(family) if attends else _Absent
        super().__init__(vllm_config, prefix, config, attn_layer_type=attention)
        self.hand_over(family, attends, feeds)


class _Absent(nn.Module):
    """In place of an attention that is not there."""

    def __init__(self, **_: object) -> None:
        super().__init__()


class DealtDecoderLayer(DecoderLayer):
    """A block of m layers where m divides TP: each rank holds a shard of one member only.

    The ranks are dealt out to the members in contiguous groups of TP / m, which is the paper's
    placement. On its rank a member is an ordinary decoder layer with its own norms, nothing is
    folded, and any quantization works; the all-reduce over all ranks sums shards and members.
    """

    def __init__(self, vllm_config: VllmConfig, prefix: str, members: tuple[int, ...]) -> None:
        """Build this rank's member.

        Args:
            members: the layers of the checkpoint in the block.
        """
        self.ways = len(members)
        self.member = member_of_this_rank(self.ways)
        # Its KV cache has one name on all ranks, the block's; its weights are of its own layer.
        self._names = prefix, f"{prefix.rpartition('.')[0]}.{members[self.member]}"
        with narrowed_tensor_parallel(self.ways):
            super().__init__(vllm_config, prefix)

    def get_quant_config(self, vllm_config: VllmConfig) -> QuantizationConfig | None:
        """Return vLLM's, which finds the layers that a checkpoint quantizes, and how, by name."""
        config = super().get_quant_config(vllm_config)
        if config is None:
            return None
        block, layer = self._names
        of_block, method_of = copy.copy(config), config.get_quant_method

        def get_quant_method(module: nn.Module, prefix: str) -> object:
            return method_of(module, layer + prefix.removeprefix(block))

        of_block.get_quant_method = get_quant_method
        return of_block

    def load_weights(self, weights: Weights) -> set[str]:
        """Load this rank's member from ("member.parameter", full tensor) pairs."""
        mine = f"{self.member}."
        with narrowed_tensor_parallel(self.ways):
            return AutoWeightsLoader(self).load_weights(
                (name.removeprefix(mine), tensor)
                for name, tensor in weights
                if name.startswith(mine)
            )
