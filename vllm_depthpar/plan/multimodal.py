"""Models that see: a tower, which no plan touches, and a language model of one of our families.

Its config is under the key `text_config`, its tensors under `language_model`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from vllm_depthpar.plan.families import with_llamas_keys
from vllm_depthpar.plan.model_shape import DEEPSTACK
from vllm_depthpar.plan.precedence import KEY

# vLLM's class of each, as "module:class", by config.json's `model_type`.
MULTIMODAL = {
    "gemma3": "vllm.model_executor.models.gemma3_mm:Gemma3ForConditionalGeneration",
    "llava": "vllm.model_executor.models.llava:LlavaForConditionalGeneration",
    "mistral3": "vllm.model_executor.models.mistral3:Mistral3ForConditionalGeneration",
    "qwen2_5_vl": "vllm.model_executor.models.qwen2_5_vl:Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "vllm.model_executor.models.qwen3_vl:Qwen3VLForConditionalGeneration",
}
# By `model_type`, too, what config.json and transformers call it.
CLASSES = {kind: model.rpartition(":")[2] for kind, model in MULTIMODAL.items()}
_TEXT = "text_config"
# Those whose first checkpoints have the language model's keys at the top, with its `model_type`.
_FLAT = {"qwen2_5_vl": "qwen2_5_vl_text"}
# The tower's layers whose output is added to the stream, too, each after a layer of the language
# model's own (DeepStack, arXiv 2406.04334); and those that are meant where config.json is silent.
_DEEPSTACK_LAYERS = "deepstack_visual_indexes"
_DEEPSTACK_DEFAULTS = {"qwen3_vl": (8, 16, 24)}
# What config.json has beside it of the language model.
_OUTSIDE = ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config", KEY)
# How files name the language model's tensors, old ones and those of transformers 5.
_NAME = re.compile(r"(?:model\.)?language_model\.(?:model\.)?(.*)")


def is_multimodal(config: Mapping[str, Any]) -> bool:
    """Whether a parsed config.json is of a model with a language model inside."""
    kind = str(config.get("model_type"))
    return kind in MULTIMODAL and (kind in _FLAT or isinstance(config.get(_TEXT), Mapping))


def language_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Find what a parsed config.json says of the language model: all of it, if that is all there
    is.

    Returns:
        Its config.json by Llama's keys, with the key `DEEPSTACK` where a tower adds to the stream
        between layers.
    """
    if not is_multimodal(config):
        return with_llamas_keys(config)
    kind, text, tower = config["model_type"], config.get(_TEXT), config.get("vision_config")
    if not isinstance(text, Mapping):
        text = {key: value for key, value in config.items() if key not in (_TEXT, "vision_config")}
        text["model_type"] = _FLAT[kind]
    outside = {key: config[key] for key in _OUTSIDE if config.get(key) is not None}
    default = _DEEPSTACK_DEFAULTS.get(kind, ())
    added = tower.get(_DEEPSTACK_LAYERS, default) if isinstance(tower, Mapping) else default
    return {**text, **outside, **({DEEPSTACK: len(added)} if added else {})}


def language_names(names: Iterable[str]) -> dict[str, str]:
    """Find the language model's among the names of a checkpoint's tensors.

    Returns:
        What the language model alone would call them, by their names; all as they are where they
        are of no multimodal model.
    """
    listed = list(names)
    inside = {name: match[1] for name in listed if (match := _NAME.match(name)) is not None}
    if not inside:
        return {name: name for name in listed}
    found = {
        name: rest if rest.startswith("lm_head.") else f"model.{rest}"
        for name, rest in inside.items()
    }
    return found | {name: name for name in listed if name.startswith("lm_head.")}
