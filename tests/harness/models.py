"""Small random checkpoints for tests, written without transformers' initialization.

They have no tokenizer of their own: prompts are lists of token ids, and vLLM takes them with
``skip_tokenizer_init=True``. `write_tokenizer` adds one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

# `write_llama`'s model type to what config.json names.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "granite": "GraniteForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "bloom": "BloomForCausalLM",
}
# What of Gemma's configs the others' don't have: every key with a value that shows at the few dozen
# tokens of a test. Gemma 2's layers alternate, of Gemma 3's one in three sees all tokens.
GEMMA: dict[str, dict[str, object]] = {
    "gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 6.0},
    "gemma3_text": {
        "sliding_window_pattern": 3,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
}

# Of families that are Llama's but for their shares of heads that turn, or their multipliers.
OTHERS: dict[str, dict[str, object]] = {
    "phi3": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
        },
        "pad_token_id": None,
        "sliding_window": None,
    },
    "glm4": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
        "pad_token_id": None,
    },
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
}
# Of families with experts: some MLPs of Qwen's are one.
MOE: dict[str, dict[str, object]] = {
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 128,
        "norm_topk_prob": False,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "mlp_only_layers": [4],
    },
    "gpt_oss": {
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "swiglu_limit": 7.0,
        "attention_bias": True,
        "sliding_window": 8,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
    },
}

# As in Llama 3.2's config.json, with an original context short enough that the scaling of the
# slow frequencies shows at the few dozen tokens of a test.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def write_llama(
    folder: Path,
    *,
    seed: int = 0,
    layers: int = 6,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    intermediate: int = 96,
    vocab: int = 512,
    tie: bool = False,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    rope_scaling: dict[str, object] | None = None,
    dtype: torch.dtype = torch.float32,
    model_type: str = "llama",
    architecture: str | None = None,
    ladder_layers: int | list[int] | None = None,
    **config_keys: object,
) -> Path:
    """Write config.json and model.safetensors of a seeded random model; returns the folder.

    A Llama, or of the family that `model_type` names; `config_keys` are more of its config's keys.
    With `ladder_layers` the config is as the Ladder Residual authors write it. A BLOOM has as many
    KV heads as heads, of hidden / heads each, and an MLP four times as wide as the stream.

    Norm gains are far from one and biases from zero, so that leaving one out, or giving it to the
    wrong layer, shows. No token ends a generation. vLLM's CPU attention takes head_dim 32 and
    larger.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(dtype)

    def gain(size: int = hidden) -> torch.Tensor:
        return torch.empty(size).uniform_(0.5, 1.5, generator=generator).to(dtype)

    # Attention and MLP add about 0.4 to each element of the stream. The embedding adds less, or a
    # model with tied embeddings would repeat its last token for ever; its last norm makes up for
    # what that takes from the logits.
    of_qwen2, gpt_oss = model_type in ("qwen2", "qwen2_moe"), model_type == "gpt_oss"
    bloom = model_type == "bloom"
    attention_bias, mlp_bias = attention_bias or gpt_oss or bloom, mlp_bias or gpt_oss or bloom
    if bloom:
        kv_heads, head_dim, intermediate = heads, hidden // heads, 4 * hidden
    qkv_bias = attention_bias or of_qwen2
    if of_qwen2:  # whose config has no such key
        head_dim = hidden // heads
    output_bias = attention_bias and model_type != "glm4"
    gemma = model_type in GEMMA
    moe: dict[str, Any] = MOE.get(model_type, {}) | config_keys
    attention = {
        "self_attn.q_proj": (heads * head_dim, hidden, 1.0, qkv_bias),
        "self_attn.k_proj": (kv_heads * head_dim, hidden, 1.0, qkv_bias),
        "self_attn.v_proj": (kv_heads * head_dim, hidden, 1.0, qkv_bias),
        "self_attn.o_proj": (hidden, heads * head_dim, 0.6, output_bias),
    }
    # A Gemma multiplies its embedding, adds one to its gains, and normalizes what modules give.
    embedding, one = (hidden**0.5, 1) if gemma else (1, 0)
    tensors = {"model.embed_tokens.weight": normal(vocab, hidden, std=0.1 / embedding)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            after = gemma and norm == "post_attention_layernorm"
            tensors[f"{prefix}{norm}.weight"] = gain() * (0.4 if after else 1) - one
        if gemma:
            tensors[f"{prefix}pre_feedforward_layernorm.weight"] = gain() - one
            tensors[f"{prefix}post_feedforward_layernorm.weight"] = gain() * 0.4 - one
        if model_type == "glm4":
            for norm in ("post_self_attn_layernorm", "post_mlp_layernorm"):
                tensors[f"{prefix}{norm}.weight"] = gain() * 0.4
        if model_type in ("qwen3", "qwen3_moe", "gemma3_text"):
            for norm in ("q_norm", "k_norm"):
                tensors[f"{prefix}self_attn.{norm}.weight"] = gain(head_dim) - one
        if gpt_oss:
            tensors[f"{prefix}self_attn.sinks"] = 3 + normal(heads, std=1.0)
        sparse = model_type in MOE and layer not in moe.get("mlp_only_layers", ())
        mlp = _experts(hidden, intermediate, moe) if sparse else _mlp("mlp", hidden, intermediate)
        biased = {name: (*shape, mlp_bias) for name, shape in mlp.items()}
        for name, (out, into, scale, bias) in {**attention, **biased}.items():
            tensors[f"{prefix}{name}.weight"] = normal(out, into, std=scale / into**0.5)
            if bias:
                tensors[f"{prefix}{name}.bias"] = normal(out, std=0.1)
    if model_type in ("phi3", "glm4"):
        tensors = _fused(tensors, qkv=model_type == "phi3")
    if gpt_oss:
        tensors = _stacked(tensors)
    tensors["model.norm.weight"] = gain() * (3 * embedding if tie else 1) - one
    if not tie:
        tensors["lm_head.weight"] = normal(vocab, hidden, std=3 / hidden**0.5)

    config = {
        "architectures": [architecture or ARCHITECTURES[model_type]],
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
        "tie_word_embeddings": tie,
        "attention_bias": attention_bias,
        "mlp_bias": mlp_bias,
        "hidden_activation" if gemma else "hidden_act": "gelu_pytorch_tanh" if gemma else "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": None,
        "eos_token_id": None,
        **({} if of_qwen2 else {"head_dim": head_dim}),
        **({"sliding_window": None} if model_type == "mistral" else {}),
        **({"sliding_window": 8, "query_pre_attn_scalar": 24} if gemma else {}),
        **GEMMA.get(model_type, {}),
        **MOE.get(model_type, {}),
        **OTHERS.get(model_type, {}),
        **({"rope_scaling": rope_scaling} if rope_scaling is not None else {}),
        **config_keys,
    }
    if bloom:
        biases = {
            name.replace("weight", "bias"): normal(hidden, std=0.1)
            for name in tensors
            if "norm" in name
        }
        tensors = _bloom(tensors | biases, heads)
        embedded = "transformer.word_embeddings_layernorm"
        tensors[f"{embedded}.weight"] = gain() * 0.2
        tensors[f"{embedded}.bias"] = normal(hidden, std=0.02)
        kept = ("architectures", "model_type", "hidden_size", "vocab_size", "torch_dtype")
        config = {key: config[key] for key in (*kept, "tie_word_embeddings")} | {
            "n_layer": layers,
            "n_head": heads,
            "layer_norm_epsilon": 1e-5,
            "seq_length": 512,
            "bos_token_id": None,
            "eos_token_id": None,
            **config_keys,
        }
    if ladder_layers is not None:
        config |= {
            "model_type": "llamaLadder",
            "ladder_layers": ladder_layers,
            "auto_map": {
                "AutoConfig": "configuration_llama_ladder.LlamaLadderConfig",
                "AutoModelForCausalLM": "modeling_llama_ladder.LlamaLadderForCausalLM",
            },
        }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def _fused(tensors: dict[str, torch.Tensor], qkv: bool) -> dict[str, torch.Tensor]:
    """With gate and up, and perhaps q, k and v, as one projection."""
    parts: dict[str, tuple[str, ...]] = {"gate_up_proj": ("gate_proj", "up_proj")}
    if qkv:
        parts["qkv_proj"] = ("q_proj", "k_proj", "v_proj")
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        for fused, of in parts.items():
            if any(f".{part}." in name for part in of):
                one = next(name.replace(part, fused) for part in of if f".{part}." in name)
                found[one] = torch.cat([found[one], tensor]) if one in found else tensor
                break
        else:
            found[name] = tensor
    return found


# Llama's names to BLOOM's, piece by piece.
_BLOOM = {
    "model.": "transformer.",
    "embed_tokens": "word_embeddings",
    ".layers.": ".h.",
    "transformer.norm": "transformer.ln_f",
    "self_attn.q_proj": "self_attention.query_key_value",
    "self_attn.o_proj": "self_attention.dense",
    "up_proj": "dense_h_to_4h",
    "down_proj": "dense_4h_to_h",
}


def _bloom(tensors: dict[str, torch.Tensor], heads: int) -> dict[str, torch.Tensor]:
    """With BLOOM's names: q, k and v in one, head by head, and no gate."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if any(f".{part}_proj." in name for part in ("k", "v", "gate")):
            continue
        if ".q_proj." in name:
            of = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            tensor = torch.stack([one.unflatten(0, (heads, -1)) for one in of], 1).flatten(0, 2)
        for llamas, theirs in _BLOOM.items():
            name = name.replace(llamas, theirs)
        found[name] = tensor
    return found


def as_published(bloom: Path, folder: Path) -> Path:
    """Write a BLOOM of `write_llama`'s with the names and keys that published ones have."""
    folder.mkdir()
    tensors = load_file(bloom / "model.safetensors").items()
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((bloom / "config.json").read_text())
    config |= {"n_embed": config.pop("hidden_size"), "num_attention_heads": config.pop("n_head")}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With the experts of each MLP together, as gpt-oss has them.

    Gate and up are larger than others', so that some of what they give is beyond `swiglu_limit`.
    """
    found: dict[str, torch.Tensor] = {}
    of: dict[str, list[torch.Tensor]] = {}
    for name, tensor in tensors.items():
        before, _, rest = name.partition(".experts.")
        if rest:  # "3.up_proj.bias"
            _, projection, kind = rest.split(".")
            of.setdefault(f"{before}.experts.{projection}.{kind}", []).append(tensor)
        else:
            found[name.replace(".mlp.gate.", ".mlp.router.")] = tensor
    for name, down in of.items():
        if "down_proj" not in name:
            continue
        gate, up = (torch.stack(of[name.replace("down", part)]) for part in ("gate", "up"))
        into = torch.stack([gate, up], 2).flatten(1, 2) * 2
        before, projection, kind = name.rsplit(".", 2)
        bias = kind == "bias"
        for stacked, tensor in (("gate_up_proj", into), (projection, torch.stack(down) / 4)):
            whole = tensor if bias else tensor.mT.contiguous()
            found[f"{before}.{stacked}{'_bias' * bias}"] = whole
    return found


def _mlp(
    module: str,
    hidden: int,
    intermediate: int,
    names: Sequence[str] = ("gate_proj", "up_proj", "down_proj"),
) -> dict[str, tuple[int, int, float]]:
    gate, up, down = (f"{module}.{name}" for name in names)
    into = intermediate, hidden, 1.0
    return {gate: into, up: into, down: (hidden, intermediate, 0.6)}


def _experts(
    hidden: int, intermediate: int, config: dict[str, Any]
) -> dict[str, tuple[int, int, float]]:
    mixtral = "num_local_experts" in config and "swiglu_limit" not in config
    module = "block_sparse_moe" if mixtral else "mlp"
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    count = config.get("num_local_experts") or config["num_experts"]
    shapes = {f"{module}.gate": (count, hidden, 2.0)}
    for expert in range(count):
        size = config.get("moe_intermediate_size", intermediate)
        shapes |= _mlp(f"{module}.experts.{expert}", hidden, size, names)
    if shared := config.get("shared_expert_intermediate_size"):
        shapes |= _mlp(f"{module}.shared_expert", hidden, shared)
        shapes[f"{module}.shared_expert_gate"] = (1, hidden, 1.0)
    return shapes


def write_eagle(model: Path, folder: Path, method: str) -> Path:
    """Write a seeded head of EAGLE's (`eagle`, `eagle3`) for a checkpoint of `write_llama`'s."""
    config = json.loads((model / "config.json").read_text())
    hidden, layer = config["hidden_size"], "layers.0." if method == "eagle" else "midlayer."
    tensors = {
        name.replace("model.layers.0.", layer): tensor
        for name, tensor in load_file(model / "model.safetensors").items()
        if name.startswith("model.layers.0.")
    }
    generator = torch.Generator().manual_seed(0)
    reads = 2 if method == "eagle" else 3
    tensors["fc.weight"] = torch.randn(hidden, reads * hidden, generator=generator) / hidden**0.5
    if method == "eagle":
        del tensors[f"{layer}input_layernorm.weight"]
    else:
        tensors |= {
            "norm.weight": torch.ones(hidden),
            f"{layer}hidden_norm.weight": torch.ones(hidden),
        }
        for part in "qkv":
            name = f"{layer}self_attn.{part}_proj.weight"
            tensors[name] = torch.cat([tensors[name], tensors[name]], 1)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    names = {"eagle": "LlamaForCausalLM", "eagle3": "LlamaForCausalLMEagle3"}
    head = config | {"architectures": [names[method]], "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(head))
    return folder


def write_medusa(
    model: PreTrainedModel, folder: Path, texts: torch.Tensor, prompt: int, heads: int
) -> Path:
    """Write Medusa's heads that know how texts, (count, tokens), go on after their prompts, and
    nothing else: fitted to the model's last hidden states, more than which each of these must have
    elements."""
    with torch.no_grad():
        states = model.model(texts).last_hidden_state
    hidden, vocab = model.config.hidden_size, model.config.vocab_size
    tensors = {}
    for head in range(heads):
        reads, tokens = states[:, prompt - 1 : -2 - head], texts[:, prompt + 1 + head :]
        said = torch.nn.functional.one_hot(tokens.flatten(), vocab).float()
        fitted = torch.linalg.lstsq(reads.flatten(0, 1), said).solution
        tensors[f"{head}.0.linear.weight"] = torch.zeros(hidden, hidden)
        tensors[f"{head}.1.weight"] = fitted.T.contiguous()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "medusa", "hidden_size": hidden, "vocab_size": vocab}
    counts = {"medusa_num_heads": heads, "medusa_num_layers": 1}
    (folder / "config.json").write_text(json.dumps(config | counts))
    return folder


def write_tokenizer(folder: Path, *, bos: bool = False, chat: bool = False) -> Path:
    """Write a tokenizer of 256 bytes and <s>, for models with a vocabulary of 512.

    With `bos` it starts every text with <s>, as Llama 2's and 3's do.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, "<s>"])}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    if chat:
        fast.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    fast.save_pretrained(folder)
    return folder


def prompts(count: int, tokens: int, *, vocab: int = 512, seed: int = 0) -> torch.Tensor:
    """Seeded random token ids, (count, tokens)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (count, tokens), generator=generator)


def write_adapter(
    model: Path,
    folder: Path,
    *,
    rank: int = 8,
    seed: int = 0,
    projections: str = "all-linear",
    kind: Any = AutoModelForCausalLM,
) -> tuple[Path, Path]:
    """Write an adapter of a checkpoint's projections, by peft, with seeded weights.

    Args:
        kind: transformers' class that loads the checkpoint.

    Returns:
        The folder of the adapter, and of a checkpoint with the adapter merged.
    """
    # Only here: it takes seconds.
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    plain = kind.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=projections, init_lora_weights=False
    )
    adapted = get_peft_model(plain, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.5 / parameter.shape[1] ** 0.5)
    folders = folder / f"rank{rank}", folder / f"rank{rank}-merged"
    adapted.save_pretrained(folders[0])
    adapted.merge_and_unload().save_pretrained(folders[1])
    return folders


def quantize_int8(
    source: Path, folder: Path, ignore: Sequence[int] = (), *, mlps: bool = True
) -> tuple[Path, Path]:
    """Write a checkpoint's projections as int8 (compressed-tensors, W8A8, scales per channel).

    Args:
        ignore: layers that stay as they are.
        mlps: whether those of MLPs are quantized, too.

    Returns:
        The folder of the quantized checkpoint, and of one with the same weights dequantized.
    """
    kept = [rf".*\.layers\.{layer}\..*" for layer in ignore]
    if not mlps:
        kept.append(r".*\.(mlp|block_sparse_moe)\..*")
    quantized, dequantized = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith("proj.weight") and not any(re.match(one, name) for one in kept):
            # Half of int8's range: a CPU without VNNI adds two products in 16 bits, and saturates.
            scale = tensor.abs().amax(1, keepdim=True) / 63
            codes = (tensor / scale).round()
            quantized[name] = codes.to(torch.int8)
            quantized[name.replace(".weight", ".weight_scale")] = scale
            dequantized[name] = codes * scale
        else:
            quantized[name] = dequantized[name] = tensor
    config = json.loads((source / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "int", "symmetric": True}
    int8 = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", *(f"re:{one}" for one in kept)],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**scheme, "strategy": "channel", "dynamic": False},
                "input_activations": {**scheme, "strategy": "token", "dynamic": True},
            }
        },
    }
    folders = folder / "int8", folder / "dequantized"
    for path, tensors, extra in zip(
        folders, (quantized, dequantized), ({"quantization_config": int8}, {}), strict=True
    ):
        path.mkdir(parents=True)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(config | extra))
    return folders
