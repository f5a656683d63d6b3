"""Gemma 2 and 3: vLLM's own decoder layers, which have norms after their modules, too.

Windows, RoPE of each kind of layer, norms of heads, the scale of scores and their soft cap are in
vLLM's attentions. What is around the layers is in `vllm_depthpar.model.causal_lm`.
"""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models.gemma2 import Gemma2DecoderLayer
from vllm.model_executor.models.gemma3 import Gemma3DecoderLayer

from vllm_depthpar.model.members import Member
from vllm_depthpar.plan.families import family_of
from vllm_depthpar.vllm_compat import forget_attention


class _Layer(Member):
    """Before one of vLLM's classes among the bases."""

    def __init__(
        self, vllm_config: VllmConfig, prefix: str, attends: bool = True, feeds: bool = True
    ) -> None:
        """Build the layer; arguments as `decoder_layers.DecoderLayer`'s."""
        config: Any = vllm_config.model_config.hf_config
        make: Any = super().__init__
        make(config, vllm_config.cache_config, vllm_config.quant_config, prefix)
        if not attends:
            forget_attention(vllm_config, f"{prefix}.self_attn.attn")
        self.hand_over(family_of(config.to_dict()), attends, feeds)


class Gemma2Layer(_Layer, Gemma2DecoderLayer):
    """A layer of Gemma 2."""


class Gemma3Layer(_Layer, Gemma3DecoderLayer):
    """A layer of Gemma 3."""


# By config.json's `model_type`.
LAYERS: dict[str, type[_Layer]] = {"gemma2": Gemma2Layer, "gemma3_text": Gemma3Layer}
