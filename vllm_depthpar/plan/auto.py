"""The plan `auto`: a published span for a known model, else one conservative rule."""

from __future__ import annotations

from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.plan.presets import preset_of


def auto_spec(shape: ModelShape, model_type: str = "llama") -> tuple[dict[str, object] | str, str]:
    """Choose the plan for a model nobody wrote one for, and say in one line where it comes from.

    Rule for models with no preset: run one layer in four in pairs, one in eight where norms stand
    after the modules, in one span that ends two layers before the last.
    """
    preset = preset_of(shape, model_type)
    if preset is not None and preset.auto is not None:
        return preset.auto.spec, f"preset for {preset.model}, {preset.auto.source}"
    # Of the one such model that was measured a pair costs several times as much (docs/plans.md).
    share, said = (16, "an eighth") if shape.family.norms_after else (8, "a quarter")
    pairs = shape.layers // share
    end = shape.layers - 2
    if pairs == 0 or end - 2 * pairs < 2:
        return "identity", "conservative rule: too few layers to pair any"
    return {"pair": [end - 2 * pairs, end]}, f"conservative rule: {said} of the layers in pairs"
