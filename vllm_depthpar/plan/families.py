"""The families of models that can be restructured, and what of them is not Llama's.

All have Llama's decoder layer: RMSNorm, attention with RoPE and grouped KV heads, RMSNorm, a gated
MLP. A family differs in its biases, in norms of queries and keys, in windows of attention, in norms
of what attention and MLP give, and in MLPs that are many experts. BLOOM's has LayerNorms, ALiBi and
an MLP without a gate in the same places.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_depthpar.errors import UserError, shortened
from vllm_depthpar.plan import ladder_checkpoint

# The norms of a layer's halves: before the module, and after it, of what it gives.
_LLAMA_NORMS = {"attention": ("input_layernorm",), "mlp": ("post_attention_layernorm",)}
_GEMMA_NORMS = {
    "attention": ("input_layernorm", "post_attention_layernorm"),
    "mlp": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
}


@dataclass(frozen=True)
class Experts:
    """What MLPs of experts, of which a router chooses some for each token, are called.

    Attributes:
        module: the MLP, in a layer of the checkpoint.
        projections: gate, up and down of an expert.
        counts: the keys of config.json that may have the number of experts: transformers writes one
            and reads all.
        size: the key with the intermediate size of one.
        shared: the key with the intermediate size of one more, which every token goes through; ""
            if there is none.
        stacked: files have all experts of an MLP in one tensor, (experts, in, out), gate and up of
            a neuron side by side; they and the router, `router`, have biases (gpt-oss).
    """

    module: str = "mlp"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    counts: tuple[str, ...] = ("num_experts", "num_local_experts")
    size: str = "moe_intermediate_size"
    shared: str = ""
    stacked: bool = False


@dataclass(frozen=True, eq=False)
class Family:
    """What of a family's decoder layer is not Llama's.

    Attributes:
        architectures: what config.json may name; the first is transformers' class.
        qkv_bias: q, k and v have biases and o has none, whatever config.json says.
        qk_norm: every head of q and k goes through an RMSNorm before RoPE.
        norms: the names of the norms of each half: of what it reads, and, where `norms_after`, of
            what it gives, before that is added to the stream.
        activation: of the MLP's gate.
        full_every: one layer in so many sees all tokens and the others a window, where config.json
            has no `layer_types`; 0: they are alike.
        caps_scores: attention scores are soft-capped, by `attn_logit_softcapping`.
        experts: what MLPs of experts are called, if it has any.
        fused_qkv: q, k and v are one projection in the checkpoint, `qkv_proj`.
        fused_mlp: gate and up are, `gate_up_proj`.
        turns_shares: its attention turns the share of each head that config.json names.
        output_bias: o has a bias where q, k and v have.
        gemma: the embedding is scaled by the root of its size, and norms multiply by one more than
            their gains.
        multipliers: config.json says by what the embedding, scores, logits and what every module
            gives are multiplied (Granite).
        sinks: every head of attention has a score that no token has.
        defaults: what is meant by keys that config.json leaves out, where it is not Llama's.
        refused: keys of config.json that make another model of it.
        fixed: what vLLM's class makes of keys, whatever config.json says.
        yarn: so it does of RoPE: YaRN, by the parameters `_YARN`.
        gated: its MLP has a gate; without one, its intermediate size is four times the hidden one.
        layer_norms: its norms are LayerNorms, with biases.
        norms_embedding: one more norm is of what is looked up in the embedding.
        alibi: positions are ALiBi's, not RoPE's.
        by_heads: files have q, k and v in one tensor, head by head.
        projections: what a layer's are called, by Llama's names, where otherwise.
        names: where files name tensors otherwise than Llama's: what they are here, by patterns.
        keys: so config.json its keys: Llama's, by those that it may have.
    """

    architectures: tuple[str, ...]
    qkv_bias: bool = False
    qk_norm: bool = False
    norms: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _LLAMA_NORMS)
    activation: str = "silu"
    full_every: int = 0
    caps_scores: bool = False
    experts: Experts | None = None
    fused_qkv: bool = False
    fused_mlp: bool = False
    turns_shares: bool = False
    output_bias: bool = True
    gemma: bool = False
    multipliers: bool = False
    sinks: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    yarn: bool = False
    gated: bool = True
    layer_norms: bool = False
    norms_embedding: bool = False
    alibi: bool = False
    by_heads: bool = False
    projections: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def norms_after(self) -> bool:
        """Whether what an attention or an MLP gives goes through a norm before it is added."""
        return len(self.norms["attention"]) > 1

    @property
    def is_whole(self) -> bool:
        """Whether its layers side by side are held whole: for their norms, or because nobody has
        taught this package to fold them."""
        return self.norms_after or self.fused_qkv or self.fused_mlp or self.multipliers

    @property
    def mlp(self) -> str:
        """The name of the MLP in a layer of the checkpoint."""
        return "mlp" if self.experts is None else self.experts.module

    def half_of(self, tensor: str) -> str:
        """Say which half of a layer a tensor belongs to, by its name in the layer."""
        module = tensor.partition(".")[0]
        return "attention" if module in ("self_attn", *self.norms["attention"]) else "mlp"

    def projection(self, name: str) -> str:
        """Say what a projection is called in its module, by Llama's name for it."""
        return self.projections.get(name, name)

    def name_of(self, tensor: str) -> str:
        """Say what a tensor is called here, by its name in the checkpoint's files."""
        for pattern, name in self.names.items():
            tensor = re.sub(pattern, name, tensor)
        return tensor


# GLM's, of which the two with Llama's names are where they are in Llama's.
_GLM_NORMS = {
    "attention": ("input_layernorm", "post_self_attn_layernorm"),
    "mlp": ("post_attention_layernorm", "post_mlp_layernorm"),
}
_BLOOM_KEYS = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embed": "hidden_size",
}
# Published BLOOMs have no prefix.
_BLOOM_NAMES = {
    r"^(?:transformer\.)?word_embeddings\.": "model.embed_tokens.",
    r"^(?:transformer\.)?word_embeddings_layernorm\.": "model.embed_tokens.norm.",
    r"^(?:transformer\.)?h\.(\d+)\.self_attention\.": r"model.layers.\1.self_attn.",
    r"^(?:transformer\.)?h\.": "model.layers.",
    r"^(?:transformer\.)?ln_f\.": "model.norm.",
}
_SLIDING = "sliding_attention"
_LLAMA = Family(
    ("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel", ladder_checkpoint.ARCHITECTURE)
)
_GEMMA_DEFAULTS = {
    "head_dim": 256,
    "num_key_value_heads": 4,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
# What vLLM's classes of these take no notice of, and transformers' do.
_MOE_REFUSED = ("use_sliding_window", "dual_chunk_attention_config")
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
    # The language models of Qwen2.5-VL and Qwen3-VL, which are those of the two before them.
    "qwen2_5_vl_text": Family(
        ("Qwen2ForCausalLM",), qkv_bias=True, refused=("use_sliding_window", "head_dim")
    ),
    "qwen3_vl_text": Family(("Qwen3ForCausalLM",), qk_norm=True),
    "mixtral": Family(
        ("MixtralForCausalLM",),
        experts=Experts("block_sparse_moe", ("w1", "w3", "w2"), size="intermediate_size"),
        defaults={"num_key_value_heads": 8},
        refused=("sliding_window", "attention_bias"),
    ),
    "qwen2_moe": Family(
        ("Qwen2MoeForCausalLM",),
        qkv_bias=True,
        experts=Experts(shared="shared_expert_intermediate_size"),
        refused=("head_dim", "qk_norm", *_MOE_REFUSED),
    ),
    "qwen3_moe": Family(
        ("Qwen3MoeForCausalLM",),
        qk_norm=True,
        experts=Experts(),
        refused=("attention_bias", "shared_expert_intermediate_size", *_MOE_REFUSED),
    ),
    "gpt_oss": Family(
        ("GptOssForCausalLM",),
        full_every=2,
        sinks=True,
        experts=Experts(size="intermediate_size", stacked=True),
        defaults={
            "head_dim": 64,
            "num_key_value_heads": 8,
            "sliding_window": 128,
            "attention_bias": True,
        },
        # Published ones are MXFP4, for which vLLM's CPU build asks for AMX.
        refused=("quantization_config",),
        fixed={
            "attention_bias": True,
            "rms_norm_eps": 1e-5,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
        },
        yarn=True,
    ),
    "phi3": Family(("Phi3ForCausalLM",), fused_qkv=True, fused_mlp=True, turns_shares=True),
    "glm4": Family(
        ("Glm4ForCausalLM",),
        norms=_GLM_NORMS,
        fused_mlp=True,
        turns_shares=True,
        output_bias=False,
    ),
    "granite": Family(
        ("GraniteForCausalLM",), multipliers=True, refused=("layer_types", "sliding_window")
    ),
    "gemma2": Family(
        ("Gemma2ForCausalLM",),
        gemma=True,
        norms=_GEMMA_NORMS,
        activation="gelu_pytorch_tanh",
        full_every=2,
        caps_scores=True,
        defaults=_GEMMA_DEFAULTS,
        refused=("use_bidirectional_attention", "sliding_window_pattern"),
    ),
    "gemma3_text": Family(
        ("Gemma3ForCausalLM",),
        gemma=True,
        qk_norm=True,
        norms=_GEMMA_NORMS,
        activation="gelu_pytorch_tanh",
        full_every=6,
        defaults=_GEMMA_DEFAULTS,
        refused=("use_bidirectional_attention",),
    ),
    "bloom": Family(
        ("BloomForCausalLM",),
        gated=False,
        layer_norms=True,
        norms_embedding=True,
        alibi=True,
        fused_qkv=True,
        by_heads=True,
        projections={
            "qkv_proj": "query_key_value",
            "o_proj": "dense",
            "up_proj": "dense_h_to_4h",
            "down_proj": "dense_4h_to_h",
        },
        names=_BLOOM_NAMES,
        keys=_BLOOM_KEYS,
        defaults={"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        # The first reads another stream; with the second transformers leaves biases out.
        refused=(
            "apply_residual_connection_post_layernorm",
            "slow_but_exact",
            "quantization_config",
        ),
    ),
}


# What of others is missing here, by their `model_type`.
_STATES = "three of four of its layers have linear attention, whose state no block keeps"
_MISSING = dict.fromkeys(
    ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), _STATES
)


def lacking(kind: object) -> str:
    """Say after a colon what is missing to serve models of a `model_type`; "" if nobody knows."""
    return f": {_MISSING[str(kind)]}" if str(kind) in _MISSING else ""


def with_llamas_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Name what a parsed config.json says as Llama's does, beside what it names so already."""
    keys = FAMILIES.get(str(config.get("model_type")), _LLAMA).keys
    return {llamas: config[key] for key, llamas in keys.items() if key in config} | dict(config)


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
        raise UserError(f"model_type {kind!r} is not supported{lacking(kind)}; allowed: {allowed}")
    for key in family.refused:
        if config.get(key):
            raise UserError(
                f"config.json's key {key!r} is not supported; allowed: {kind} models without it"
            )
    for key, value in family.fixed.items():
        if config.get(key, value) != value:
            raise UserError(
                f"config.json's key {key!r} is {shortened(config[key])}; allowed: {value}, which "
                f"vLLM takes for granted of a {kind}"
            )
    if family.yarn:
        _check_yarn(config)
    if not family.turns_shares:
        _check_rotary(config, kind)
    return family


# What has to be there, of a RoPE that vLLM takes for YaRN; and what may be.
_YARN = {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
_YARN_TOO = {"rope_type", "type", "rope_theta", "truncate"}


def _check_yarn(config: Mapping[str, Any]) -> None:
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if not rope or not isinstance(rope, Mapping):  # what is no mapping is refused elsewhere
            continue
        kind = rope.get("rope_type", rope.get("type"))
        if kind != "yarn" or not _YARN <= rope.keys() <= _YARN | _YARN_TOO:
            raise UserError(
                f"config.json's key {key!r} is {shortened(rope)}; allowed: 'yarn' with "
                f"{', '.join(sorted(_YARN))}, and perhaps truncate"
            )


# How config.json may say which share of a head RoPE turns, at the top or among RoPE's parameters.
_ROTARY_SHARE = ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction")


def _check_rotary(config: Mapping[str, Any], kind: object) -> None:
    # transformers' classes of these families turn the whole head, or fail; vLLM's turn the share
    # that is named. Nobody can say which of the two a checkpoint was trained with.
    rope = config.get("rope_parameters")
    of_kinds = rope.values() if isinstance(rope, Mapping) else ()
    for place in (config, rope, *of_kinds, config.get("rope_scaling")):
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
    family = family_of({"model_type": "llama", **config})
    config = {**family.defaults, **with_llamas_keys(config)}
    layers, kinds = range(config["num_hidden_layers"]), config.get("layer_types")
    if kinds is None and family.full_every:
        every = config.get("sliding_window_pattern") or family.full_every
        kinds = [_SLIDING if (layer + 1) % every else "full_attention" for layer in layers]
    window = config.get("sliding_window") or None
    # Qwen's keys: whether there are windows, and from which layer on.
    if not config.get("use_sliding_window", "max_window_layers" not in config):
        window = None
    begin = config.get("max_window_layers", 0)
    if kinds is None:
        return [window if layer >= begin else None for layer in layers]
    return [window if kind == _SLIDING else None for kind in kinds]


def sparse_layers(config: Mapping[str, Any]) -> frozenset[int]:
    """List the layers whose MLP is many experts; arguments as `windows`."""
    family = family_of({"model_type": "llama", **config})
    if family.experts is None:
        return frozenset()
    every, dense = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or ()
    layers = range(config["num_hidden_layers"])
    return frozenset(layer for layer in layers if (layer + 1) % every == 0 and layer not in dense)
