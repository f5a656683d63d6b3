"""The plan in the config of a model that vLLM serves: put there once, read everywhere.

vLLM's config travels to all of its processes, and with it the plan, in its normal form, under the
key `depthpar` of what vLLM has made of config.json. All else there stays the checkpoint's, the
number of layers too: they keep their names, whatever block they run in.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.plan.multimodal import language_config
from vllm_depthpar.plan.plan import Plan, resolve
from vllm_depthpar.plan.spec import DEALT, FOLDED

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

# Where the plan came from: not part of the model, and so not of vLLM's compile-cache key.
_SOURCE = "depthpar_source"


def attach(model_config: ModelConfig, plan: Plan, source: str) -> None:
    """Put a plan into a model's config.

    Relies on: `ModelConfig.compute_hash` takes the dataclass's fields and no other attributes,
    which copies and pickles keep; all of `hf_config` is among the fields, and `hf_text_config` is
    it, or the part of it that the language model of a multimodal one is made from.

    Args:
        source: where the plan came from, for people.
    """
    model_config.hf_text_config.depthpar = plan.to_spec()
    setattr(model_config, _SOURCE, source)


def has_plan(model_config: ModelConfig) -> bool:
    """Say whether `attach` was called for this model."""
    return source_of(model_config) is not None


def plan_of(model_config: ModelConfig) -> Plan:
    """Read the plan of a model that has one."""
    config = model_config.hf_text_config
    return resolve(config.depthpar, config.num_hidden_layers)


def source_of(model_config: ModelConfig) -> str | None:
    """Say where the plan of a model came from, for people; None for a model without one."""
    return getattr(model_config, _SOURCE, None)


def config_of(model_config: ModelConfig) -> dict[str, Any]:
    """Read the checkpoint's config.json, of a multimodal one what it says of its language model."""
    return language_config(model_config.hf_config.to_dict())


def shape_of(vllm_config: VllmConfig) -> ModelShape:
    """Read the shape of the checkpoint, and in which layouts vLLM can hold what runs side by side
    here."""
    model_config = vllm_config.model_config
    shape = ModelShape.from_config(config_of(model_config))
    without = set()
    if model_config.quantization is not None:
        without = {FOLDED}
    if vllm_config.lora_config is not None:
        without = {FOLDED, DEALT}
    return replace(shape, layouts=tuple(way for way in shape.layouts if way not in without))


def layouts_of(vllm_config: VllmConfig) -> tuple[str, ...]:
    """Say how each block of the plan is held, see `ModelShape.layout`."""
    tp = vllm_config.parallel_config.tensor_parallel_size
    plan, shape = plan_of(vllm_config.model_config), shape_of(vllm_config)
    return tuple(shape.layout(plan, position, tp) for position in range(plan.depth))
