"""Where a plan comes from: `--hf-overrides`, `DEPTHPAR_PLAN`, config.json, `auto`; first wins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_depthpar.plan import read_spec, resolve
from vllm_depthpar.plan.auto import auto_spec
from vllm_depthpar.plan.ladder_checkpoint import ladder_of
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.plan.plan import Plan
from vllm_depthpar.plan.presets import published_spec

KEY = "depthpar"
# What a checkpoint that carries its plan names in config.json, of whatever family it is.
ARCHITECTURE = "DepthParForCausalLM"
# What the first ones named.
OLD_ARCHITECTURE = "DepthParLlamaForCausalLM"
ENV = "DEPTHPAR_PLAN"
# Plans by name that are others for other models.
_BY_MODEL = {"auto": auto_spec, "published": published_spec}


def choose(
    config: Mapping[str, Any],
    override: object = None,
    environ: str | None = None,
    override_name: str = "--hf-overrides",
) -> tuple[Plan, str]:
    """Choose the plan to serve a checkpoint with.

    Args:
        config: the checkpoint's config.json, parsed.
        override: the spec given for this run, if one was: the key `depthpar` of `--hf-overrides`.
        environ: the value of the environment variable `DEPTHPAR_PLAN`, if it is set.
        override_name: where `override` was given, for the log.

    A checkpoint that was trained as a ladder (see `vllm_depthpar.plan.ladder_checkpoint`) stays
    one: a mapping without the key `ladder` gets the checkpoint's ladder layers, and `auto` is those
    alone.

    Returns:
        The plan, and where it came from, for the log.

    Raises:
        UserError: the winning source holds no valid plan for this checkpoint.
    """
    shape, ladder = ModelShape.from_config(config), ladder_of(config)
    if override is not None:
        spec, source = override, override_name
    elif environ:
        spec, source = read_spec(environ), ENV
    elif config.get(KEY) is not None:
        spec, source = config[KEY], "config.json"
    else:
        spec, source = "auto", "default"
    if spec == "auto" and ladder is not None:
        spec, source = {"ladder": ladder}, f"{source}: the checkpoint's ladder_layers"
    elif ladder is not None and isinstance(spec, dict) and spec.get("ladder") is None:
        spec = {**spec, "ladder": ladder}
    if isinstance(spec, str) and spec in _BY_MODEL:
        source = f"{source}: {spec}"
        spec, reason = _BY_MODEL[spec](shape, config.get("model_type", "llama"))
        source = f"{source}, {reason}"
    plan = resolve(spec, shape.layers)
    shape.check_plan(plan)
    return plan, source
