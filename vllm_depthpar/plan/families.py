"""The families of models that can be restructured, and what of them is not Llama's.

All have Llama's decoder layer: RMSNorm, attention with RoPE and grouped KV heads, RMSNorm, SwiGLU.
A family differs in its biases, in norms of queries and keys, and in windows of attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_depthpar.errors import UserError, shortened
from vllm_depthpar.plan import ladder_checkpoint


@dataclass(frozen=True)
class Family:
    """What of a family's decoder layer is not Llama's.

    Attributes:
        architectures: what config.json may name; the first is transformers' class.
        qkv_bias: q, k and v have biases and o has none, whatever config.json says.
        qk_norm: every head of q and k goes through an RMSNorm before RoPE.
        refused: keys of config.json that make another model of it.
    """

    architectures: tuple[str, ...]
    qkv_bias: bool = False
    qk_norm: bool = False
    refused: tuple[str, ...] = ()


_LLAMA = Family(
    ("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel", ladder_checkpoint.ARCHITECTURE)
)
_MISTRAL_VARIANTS = ("ada_rms_norm_t_cond", "llama_4_scaling")
# By config.json's `model_type`.
FAMILIES = {
    "llama": _LLAMA,
    ladder_checkpoint.MODEL_TYPE: _LLAMA,
    "mistral": Family(("MistralForCausalLM",), refused=_MISTRAL_VARIANTS),
    # What transformers makes of a Mistral with `layer_types`.
    "ministral": Family(("MinistralForCausalLM",), refused=_MISTRAL_VARIANTS),
    "qwen2": Family(
        ("Qwen2ForCausalLM",), qkv_bias=True, refused=("dual_chunk_attention_config", "qk_norm")
    ),
    "qwen3": Family(("Qwen3ForCausalLM",), qk_norm=True, refused=("dual_chunk_attention_config",)),
}


def family_of(config: Mapping[str, Any]) -> Family:
    """Find the family of a checkpoint.

    Args:
        config: its config.json, parsed.

    Raises:
        UserError: it is of none, or a variant that can't be restructured.
    """
    kind = config.get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        allowed = ", ".join(map(repr, FAMILIES))
        raise UserError(f"model_type {kind!r} is not supported; allowed: {allowed}")
    for key in family.refused:
        if config.get(key):
            raise UserError(
                f"config.json's key {key!r} is not supported; allowed: {kind} models without it"
            )
    _check_rotary(config, kind)
    return family


# How config.json may say which share of a head RoPE turns, at the top or among RoPE's parameters.
_ROTARY_SHARE = ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction")


def _check_rotary(config: Mapping[str, Any], kind: object) -> None:
    # transformers' classes of these families turn the whole head, or fail; vLLM's turn the share
    # that is named. Nobody can say which of the two a checkpoint was trained with.
    for place in (config, config.get("rope_parameters"), config.get("rope_scaling")):
        for key in _ROTARY_SHARE:
            if isinstance(place, Mapping) and place.get(key) not in (None, 1):
                raise UserError(
                    f"config.json's key {key!r} is {shortened(place[key])}: transformers turns "
                    f"whole heads of a {kind}, vLLM that share of them; allowed: 1"
                )


def windows(config: Mapping[str, Any]) -> list[int | None]:
    """How many tokens the attention of each layer sees, its own included; None: all before it.

    Args:
        config: a parsed config.json, or transformers' reading of one.
    """
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    # Qwen's keys: whether there are windows, and from which layer on.
    if not config.get("use_sliding_window", "max_window_layers" not in config):
        window = None
    begin = config.get("max_window_layers", 0)
    if kinds is None:
        return [window if layer >= begin else None for layer in range(config["num_hidden_layers"])]
    return [window if kind == "sliding_attention" else None for kind in kinds]
