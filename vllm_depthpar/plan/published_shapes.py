"""Sizes of models by name, from the config.json that each was published with: enough to predict
speed, with no checkpoint at hand. Windows and the scaling of positions are left out."""

from __future__ import annotations

from typing import Any

from vllm_depthpar.errors import UserError
from vllm_depthpar.util.names import nearest_first

_COLUMNS = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "tie_word_embeddings",
)
# By model_type.
_SIZES = {
    "llama": {
        "llama-2-7b": (32, 4096, 32, 32, 128, 11008, 32000, False),
        "llama-2-13b": (40, 5120, 40, 40, 128, 13824, 32000, False),
        "llama-2-70b": (80, 8192, 64, 8, 128, 28672, 32000, False),
        "llama-3-8b": (32, 4096, 32, 8, 128, 14336, 128256, False),
        "llama-3-70b": (80, 8192, 64, 8, 128, 28672, 128256, False),
        "llama-3.1-8b": (32, 4096, 32, 8, 128, 14336, 128256, False),
        "llama-3.1-70b": (80, 8192, 64, 8, 128, 28672, 128256, False),
        "llama-3.1-405b": (126, 16384, 128, 8, 128, 53248, 128256, False),
        "llama-3.2-1b": (16, 2048, 32, 8, 64, 8192, 128256, True),
        "llama-3.2-3b": (28, 3072, 24, 8, 128, 8192, 128256, True),
        "llama-3.3-70b": (80, 8192, 64, 8, 128, 28672, 128256, False),
        "smollm2-135m": (30, 576, 9, 3, 64, 1536, 49152, True),
        "smollm2-360m": (32, 960, 15, 5, 64, 2560, 49152, True),
        "smollm2-1.7b": (24, 2048, 32, 32, 64, 8192, 49152, True),
    },
    "mistral": {
        "mistral-7b-v0.1": (32, 4096, 32, 8, 128, 14336, 32000, False),
        "mistral-7b-v0.3": (32, 4096, 32, 8, 128, 14336, 32768, False),
    },
    "qwen3": {
        "qwen3-0.6b": (28, 1024, 16, 8, 128, 3072, 151936, True),
        "qwen3-1.7b": (28, 2048, 16, 8, 128, 6144, 151936, True),
        "qwen3-4b": (36, 2560, 32, 8, 128, 9728, 151936, True),
        "qwen3-8b": (36, 4096, 32, 8, 128, 12288, 151936, False),
        "qwen3-14b": (40, 5120, 40, 8, 128, 17408, 151936, False),
        "qwen3-32b": (64, 5120, 64, 8, 128, 25600, 151936, False),
    },
    "gemma2": {
        "gemma-2-2b": (26, 2304, 8, 4, 256, 9216, 256000, True),
        "gemma-2-9b": (42, 3584, 16, 8, 256, 14336, 256000, True),
        "gemma-2-27b": (46, 4608, 32, 16, 128, 36864, 256000, True),
    },
    "gemma3_text": {
        "gemma-3-270m": (18, 640, 4, 1, 256, 2048, 262144, True),
        "gemma-3-1b": (26, 1152, 4, 1, 256, 6912, 262144, True),
    },
}

CONFIGS: dict[str, dict[str, Any]] = {
    name: {
        "model_type": model_type,
        "torch_dtype": "bfloat16",
        **dict(zip(_COLUMNS, sizes, strict=True)),
    }
    for model_type, models in _SIZES.items()
    for name, sizes in models.items()
}


def config_named(name: str) -> dict[str, Any]:
    """Find what a model's config.json says of its sizes.

    Raises:
        UserError: no model has that name here.
    """
    if name not in CONFIGS:
        known = ", ".join(nearest_first(name, CONFIGS))
        raise UserError(f"shape {name!r} is unknown; allowed: {known}")
    return CONFIGS[name]
