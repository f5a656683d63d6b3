"""The plan in the config of a model that vLLM serves: put there once, read everywhere.

vLLM's config travels to all of its processes, and with it the plan, in its normal form, under the
key `depthpar` of what vLLM has made of config.json. `num_hidden_layers` is the number of blocks
there: to vLLM the model has that many layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.plan.plan import Plan, resolve

if TYPE_CHECKING:
    from vllm.config import ModelConfig

# Where the plan came from: not part of the model, and so not of vLLM's compile-cache key.
_SOURCE = "depthpar_source"


def attach(model_config: ModelConfig, plan: Plan, source: str) -> None:
    """Put a plan into a model's config.

    Relies on: `ModelConfig.compute_hash` takes the dataclass's fields and no other attributes,
    which copies and pickles keep; all of `hf_config` is among the fields.

    Args:
        source: where the plan came from, for people.
    """
    config = model_config.hf_config
    config.depthpar = plan.to_spec()
    config.depthpar_base_layers = config.num_hidden_layers
    config.num_hidden_layers = plan.depth
    setattr(model_config, _SOURCE, source)


def has_plan(model_config: ModelConfig) -> bool:
    """Say whether `attach` was called for this model."""
    return getattr(model_config.hf_config, "depthpar_base_layers", None) is not None


def plan_of(model_config: ModelConfig) -> Plan:
    """Read the plan of a model that has one."""
    config = model_config.hf_config
    return resolve(config.depthpar, config.depthpar_base_layers)


def source_of(model_config: ModelConfig) -> str | None:
    """Say where the plan of a model came from, for people; None for a model without one."""
    return getattr(model_config, _SOURCE, None)


def base_config(model_config: ModelConfig) -> dict[str, Any]:
    """Read the checkpoint's config.json, as it was before the plan."""
    config = model_config.hf_config
    return {**config.to_dict(), "num_hidden_layers": config.depthpar_base_layers}


def base_shape(model_config: ModelConfig) -> ModelShape:
    """Read the shape of the checkpoint, as it was before the plan."""
    return ModelShape.from_config(base_config(model_config))
