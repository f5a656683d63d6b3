"""Plans that papers measured, by the shape of the model; and the plan `published`.

What stands in abstracts and code is quoted; the paper's tables could not be read. Depths and
speed-ups of arXiv 2502.02790 that are not in an abstract are second-hand, and so is where its spans
end: the spans below are the only ones of that depth and that end.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from vllm_depthpar.errors import UserError
from vllm_depthpar.plan.model_shape import ModelShape


@dataclass(frozen=True)
class Choice:
    """A plan for models of one shape.

    Attributes:
        spec: what a user would write.
        source: where it comes from, in one line: what of it is quoted, what inferred.
    """

    spec: dict[str, object]
    source: str


@dataclass(frozen=True)
class Preset:
    """A model, by its shape, and what was published of it.

    Attributes:
        auto: what `auto` takes, if not its rule.
        published: the plan with which the paper heads what it says of this model.
        speedup: of that plan, as the paper measured it: with eager code, or on its own kernels.
        retrained: whether that was measured on weights that were retrained for the plan.
    """

    model: str
    layers: int
    hidden: int
    intermediate: int
    auto: Choice | None
    published: Choice
    speedup: float
    retrained: bool = False


PRESETS = (
    Preset(
        model="Llama 2 7B",
        layers=32,
        hidden=4096,
        intermediate=11008,
        # Inferred, not quoted: five pairs is the depth whose ratio, 32 / 27, is the 1.19x that the
        # abstract gives for a loss of 1.5 % accuracy.
        auto=Choice({"pair": [18, 28]}, "span inferred from arXiv 2502.02790 (1.19x at -1.5 %)"),
        published=Choice(
            {"pair": [14, 28]},
            "arXiv 2502.02790: 1.29x at depth 25, second-hand; span inferred from depth and end",
        ),
        speedup=1.29,
    ),
    Preset(
        model="Llama 3.2 3B",
        layers=28,
        hidden=3072,
        intermediate=8192,
        # Defaults of the authors' script: --start_idx 21 --end_idx 25.
        auto=Choice(
            {"pair": [21, 25]}, "github.com/noctrog/effective-depth, src/effective-depth/main.py"
        ),
        published=Choice(
            {"pair": [15, 25]},
            "arXiv 2502.02790: 1.22x at depth 23, second-hand; span inferred from depth and end",
        ),
        speedup=1.22,
    ),
    Preset(
        model="Llama 3.1 8B",
        layers=32,
        hidden=4096,
        intermediate=14336,
        auto=None,
        published=Choice(
            {"ladder": 16}, "arXiv 2501.06589: its hybrid ladder, 1.21x, second-hand, retrained"
        ),
        speedup=1.21,
        retrained=True,
    ),
)


def preset_of(shape: ModelShape, model_type: str = "llama") -> Preset | None:
    """Find what was published of a model. All are Llamas; other families share shapes with them."""
    sizes = (shape.layers, shape.hidden, shape.intermediate)
    for preset in PRESETS:
        if model_type == "llama" and sizes == (preset.layers, preset.hidden, preset.intermediate):
            return preset
    return None


def published_spec(shape: ModelShape, model_type: str = "llama") -> tuple[dict[str, object], str]:
    """Choose the plan that a paper gives for a model, and say in one line where it comes from.

    Raises:
        UserError: there is none, or it is nothing without weights that were retrained for it.
    """
    preset = preset_of(shape, model_type)
    if preset is not None and preset.retrained:
        raise UserError(
            f"plan 'published': for {preset.model} that is {json.dumps(preset.published.spec)} of "
            f"weights that were retrained for it; allowed: that plan, after recovery"
        )
    if preset is None:
        known = ", ".join(one.model for one in PRESETS if not one.retrained)
        raise UserError(
            f"plan 'published': no paper has one for a {model_type} of {shape.layers} layers with "
            f"hidden size {shape.hidden}; allowed: {known}"
        )
    return preset.published.spec, f"{preset.model}, {preset.published.source}"
