"""Families whose layer is not Llama's: vLLM's own decoder layers, whole, for blocks to run.

Gemma's have norms after their modules, too; windows, RoPE of each kind of layer, norms of heads,
the scale of scores, their soft cap and sinks are in vLLM's attentions. Mixtral's, Qwen's MoE and
gpt-oss have MLPs of experts, with routers, in vLLM's MoE modules. BLOOM's have LayerNorms, and
ALiBi. What is around the layers is in `vllm_depthpar.model.causal_lm`.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.activation import get_act_fn
from vllm.model_executor.models import mixtral, qwen2_moe, qwen3_moe
from vllm.model_executor.models.bloom import BloomBlock, BloomMLP
from vllm.model_executor.models.gemma2 import Gemma2DecoderLayer, Gemma2ForCausalLM
from vllm.model_executor.models.gemma3 import Gemma3DecoderLayer, Gemma3ForCausalLM
from vllm.model_executor.models.glm4 import Glm4DecoderLayer, Glm4ForCausalLM
from vllm.model_executor.models.gpt_oss import GptOssForCausalLM, TransformerBlock
from vllm.model_executor.models.granite import GraniteDecoderLayer
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.phi3 import Phi3ForCausalLM

from vllm_depthpar.model.bloom import BloomAttention, LayerNorm
from vllm_depthpar.model.gpt_oss import GptOssAttention, GptOssMLP
from vllm_depthpar.model.members import Member
from vllm_depthpar.plan.families import FAMILIES, family_of
from vllm_depthpar.vllm_compat import forget_attention, forget_experts


class FamilyLayer(Member):
    """Before one of vLLM's classes among the bases."""

    # Whether vLLM's class is made of its whole config, or of parts of it.
    of_whole_config = False

    def __init__(
        self, vllm_config: VllmConfig, prefix: str, attends: bool = True, feeds: bool = True
    ) -> None:
        """Build the layer; arguments as `decoder_layers.DecoderLayer`'s."""
        self._build(vllm_config, prefix)
        family = family_of(vllm_config.model_config.hf_config.to_dict())
        if not attends:
            forget_attention(vllm_config, f"{prefix}.self_attn.attn")
        if not feeds:
            forget_experts(vllm_config, f"{prefix}.{family.mlp}.experts")
        self.hand_over(family, attends, feeds)

    def _build(self, vllm_config: VllmConfig, prefix: str) -> None:
        make: Any = super().__init__
        if self.of_whole_config:
            make(vllm_config, prefix)
            return
        config = vllm_config.model_config.hf_config
        make(config, vllm_config.cache_config, vllm_config.quant_config, prefix)


class Gemma2Layer(FamilyLayer, Gemma2DecoderLayer):
    """A layer of Gemma 2."""


class Gemma3Layer(FamilyLayer, Gemma3DecoderLayer):
    """A layer of Gemma 3."""


class MixtralLayer(FamilyLayer, mixtral.MixtralDecoderLayer):
    """A layer of Mixtral."""


class Qwen2MoeLayer(FamilyLayer, qwen2_moe.Qwen2MoeDecoderLayer):
    """A layer of Qwen's MoE of the second generation: experts beside one that is always taken."""


class Qwen3MoeLayer(FamilyLayer, qwen3_moe.Qwen3MoeDecoderLayer):
    """A layer of Qwen's MoE of the third generation."""

    of_whole_config = True


class Glm4Layer(FamilyLayer, Glm4DecoderLayer):
    """A layer of GLM-4, which has norms after its modules."""

    of_whole_config = True


class GraniteLayer(FamilyLayer, GraniteDecoderLayer):
    """A layer of Granite, which multiplies what its modules give."""

    def _build(self, vllm_config: VllmConfig, prefix: str) -> None:
        super()._build(vllm_config, prefix)
        self.multiplier = float(self.residual_multiplier)


class GptOssLayer(FamilyLayer, TransformerBlock):
    """A layer of gpt-oss: sinks beside the scores of attention, and experts with biases."""

    attention_cls = GptOssAttention
    mlp_cls = GptOssMLP

    def _build(self, vllm_config: VllmConfig, prefix: str) -> None:
        TransformerBlock.__init__(self, vllm_config, vllm_config.quant_config, prefix)
        self.self_attn = self.attn
        del self.attn


class BloomLayer(FamilyLayer, BloomBlock):
    """A layer of BLOOM: LayerNorms, q, k and v in one, ALiBi, and no gate.

    Relies on: `BloomMLP` calls its `gelu_impl`; its `BloomAttention`'s arguments are (positions,
    hidden_states), and neither adds the stream.
    """

    def _build(self, vllm_config: VllmConfig, prefix: str) -> None:
        nn.Module.__init__(self)
        config, quantization = vllm_config.model_config.hf_config, vllm_config.quant_config
        size, epsilon = config.hidden_size, config.layer_norm_epsilon
        self.input_layernorm = LayerNorm(size, epsilon)
        self.self_attn = BloomAttention(
            config, vllm_config.cache_config, quantization, f"{prefix}.self_attn"
        )
        self.post_attention_layernorm = LayerNorm(size, epsilon)
        self.mlp = BloomMLP(config, quantization, f"{prefix}.mlp")
        # As it was trained, and as transformers has it; vLLM's class takes the exact GELU.
        self.mlp.gelu_impl = get_act_fn("gelu_pytorch_tanh")


# By config.json's `model_type`.
LAYERS: dict[str, type[FamilyLayer]] = {
    "bloom": BloomLayer,
    "gemma2": Gemma2Layer,
    "gemma3_text": Gemma3Layer,
    "glm4": Glm4Layer,
    "gpt_oss": GptOssLayer,
    "granite": GraniteLayer,
    "mixtral": MixtralLayer,
    "qwen2_moe": Qwen2MoeLayer,
    "qwen3_moe": Qwen3MoeLayer,
}

# vLLM's models whose names are not Llama's, by `model_type`.
_MODELS: dict[str, Any] = {
    "gemma2": Gemma2ForCausalLM,
    "gemma3_text": Gemma3ForCausalLM,
    "glm4": Glm4ForCausalLM,
    "gpt_oss": GptOssForCausalLM,
    "phi3": Phi3ForCausalLM,
    "mixtral": mixtral.MixtralForCausalLM,
    "qwen2_moe": qwen2_moe.Qwen2MoeForCausalLM,
    "qwen3_moe": qwen3_moe.Qwen3MoeForCausalLM,
}
# Of these some rename, when they load, what is not called so here; or say it of no class.
_LOADED_AS_LLAMA = ("glm4", "gpt_oss")


def naming(model_type: str) -> dict[str, Any]:
    """Look up what vLLM's model of a family says of names, for a class of ours to say it, too: what
    it renames when it loads, what adapters and quantized checkpoints find packed together, and of
    which modules besides projections there may be adapters.

    But for what files have as one projection: vLLM's GLM-4 takes gate and up for two that it packs,
    so that it knows neither an adapter's `gate_up_proj` nor that of a list of what is not
    quantized.
    """
    theirs = _MODELS.get(model_type, LlamaForCausalLM)
    loaded_as = LlamaForCausalLM if model_type in _LOADED_AS_LLAMA else theirs
    # Qwen's say what is packed in a dense MLP only once there is one.
    packed = {"gate_up_proj": ["gate_proj", "up_proj"], **theirs.packed_modules_mapping}
    if FAMILIES[model_type].fused_mlp:
        packed["gate_up_proj"] = ["gate_up_proj"]
    return {
        "hf_to_vllm_mapper": loaded_as.hf_to_vllm_mapper,
        "packed_modules_mapping": packed,
        # None of Gemma's: its vocabulary is larger than vLLM's adapters of the head can be.
        "embedding_modules": theirs.embedding_modules,
    }
