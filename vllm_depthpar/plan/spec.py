"""Specs: what people write to say which plan they mean, checked in form. No model is known here.

JSON: ``{"pair": [14, 28]}``, ``{"skip": {"speedup": 1.5}}``, ... `plan.resolve` gives it meaning.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, TypeAdapter, ValidationError

from vllm_depthpar.errors import UserError, shortened
from vllm_depthpar.util.files import reason

# A plan for the deepest published model is a few kilobytes; anything far above is not a plan.
MAX_SPEC_BYTES = 1 << 20


LayerIndex = Annotated[StrictInt, Field(ge=0)]
LayerChoice = Annotated[StrictInt, Field(ge=1)] | list[LayerIndex] | Literal["all"] | None


class Skip(BaseModel):
    """Unified Layer Skipping: keep floor(layers / speedup) layers, first and last always."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    speedup: float = Field(
        ge=1,
        strict=True,
        allow_inf_nan=False,
        description="a number from 1 to half the number of layers",
    )
    schedule: Literal["balanced", "paper"] = Field(
        default="balanced",
        description="'balanced' (spaced evenly) or 'paper' (the authors' integer rule)",
    )


class Every(BaseModel):
    """One in so many."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    every: Annotated[StrictInt, Field(ge=2)]


class Halves(BaseModel):
    """Attentions and MLPs of different layers; either may be none."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    attention: list[LayerIndex] = Field(
        description="a list of layer indices: the attentions that run side by side"
    )
    mlp: list[LayerIndex] = Field(
        description="a list of layer indices: the MLPs that run side by side after them"
    )


class Spec(BaseModel):
    """What a user writes. `resolve` gives it meaning."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    blocks: list[list[LayerIndex] | Halves] | None = Field(
        default=None,
        min_length=1,
        description="a list of lists of layer indices: the blocks in the order they run; "
        'layers that are not named are skipped; {"attention": [...], "mlp": [...]} for a block '
        "whose halves differ",
    )
    pair: tuple[LayerIndex, LayerIndex] | None = Field(
        default=None,
        description="[start, end): the span of consecutive layers to run side by side",
    )
    group: Annotated[StrictInt, Field(ge=2)] | None = Field(
        default=None, description="how many layers of 'pair' run side by side, 2 or more (2)"
    )
    skip: Skip | None = Field(
        default=None, description='{"speedup": s} or {"speedup": s, "schedule": "paper"}'
    )
    ladder: LayerChoice = Field(
        default=None,
        description="which layers read the stream as a ladder: a number (that many, the last), "
        "a list of layer indices, or 'all'",
    )
    drop_sync: LayerChoice = Field(
        default=None,
        description="which layers do without their attention's all-reduce: a number (that many, "
        "the last), a list of layer indices, or 'all'",
    )
    parallel_residual: LayerChoice = Field(
        default=None,
        description="in which layers attention and MLP read the same stream: a number (that many, "
        "the last), a list of layer indices, or 'all'",
    )
    desync: Every | Halves | None = Field(
        default=None,
        description='{"every": n}, n from 2 on: one all-reduce in n stays; or {"attention": [...], '
        '"mlp": [...]}: the layers of which these have none',
    )
    drop_attention: list[LayerIndex] | None = Field(
        default=None, description="a list of layer indices: layers without their attention"
    )
    drop_mlp: list[LayerIndex] | None = Field(
        default=None, description="a list of layer indices: layers without their MLP"
    )
    layout: Literal["folded", "whole"] | None = Field(
        default=None,
        description="how layers side by side are held: 'folded' into one wide layer, or 'whole', "
        "each as it is; else whichever a block can be and is fastest",
    )
    tp: Annotated[StrictInt, Field(ge=1)] | None = Field(
        default=None, description="the tensor-parallel size that the plan was made for, 1 or more"
    )
    layers: Annotated[StrictInt, Field(ge=1)] | None = Field(
        default=None, description="the number of layers of the checkpoint the plan was made for"
    )


NAMED = ("auto", "identity", "published")
NULL = "null is no plan; allowed: a mapping, 'auto', 'identity' or 'published'"
STANDARD = "standard"
# How else a block can run, as the keys that name its layers; one mode a block.
MODES = ("ladder", "drop_sync", "parallel_residual")
# What vLLM holds of a block, see `model_shape.ModelShape.layout`; the last two a plan can ask for.
SINGLE, DEALT, FOLDED, WHOLE = "single", "dealt", "folded", "whole"
# Those in which vLLM takes the layers of a block for one layer.
AS_ONE = (DEALT, FOLDED)
# The halves of a layer, and the keys that leave them out.
HALVES = {"attention": "drop_attention", "mlp": "drop_mlp"}
_METHODS = ("blocks", "pair", "skip", *MODES, "desync", *HALVES.values())
_ADAPTER: TypeAdapter[Any] = TypeAdapter(Spec | Literal["auto", "identity", "published"])


def parse(spec: object) -> Any:
    """Check a spec's form, without knowing the model: a `Spec`, or one of `NAMED`.

    Raises:
        UserError: one line that names the key, the value and what is allowed.
    """
    if isinstance(spec, Spec):
        return spec
    if isinstance(spec, str):
        if spec in NAMED:
            return spec
        raise UserError(f"plan {shortened(spec)} is unknown; allowed: {_names(NAMED)} or a mapping")
    if not isinstance(spec, dict) or not all(isinstance(key, str) for key in spec):
        raise UserError(f"plan {shortened(spec)} is not a mapping; allowed keys: {_names(_KEYS)}")
    try:
        parsed = Spec.model_validate(spec)
    except ValidationError as error:
        raise UserError(_explain(error)) from None
    if all(getattr(parsed, key) is None for key in _METHODS):
        raise UserError(f"plan is empty; it needs one of the keys {_names(_METHODS)}")
    if parsed.blocks is not None and (parsed.pair or parsed.group or parsed.skip):
        raise UserError(
            "plan key 'blocks' names every layer that runs; it can't stand beside pair, group, skip"
        )
    if parsed.group is not None and parsed.pair is None:
        raise UserError(f"plan key 'group': {parsed.group} needs the key 'pair' beside it")
    return parsed


def read_spec(text_or_path: str) -> object:
    """Read a spec from JSON text, one of `NAMED`, or the path of a plan file.

    Raises:
        UserError: the file is missing or too large, or the JSON is malformed, or null.
    """
    text = text_or_path.strip()
    if text in NAMED:
        return text
    origin = "plan"
    if not text.startswith(("{", "[", '"')):
        origin = f"plan file {shortened(text, 300)}"
        text = _read(text, origin)
    if len(text.encode(errors="replace")) > MAX_SPEC_BYTES:
        raise UserError(f"{origin} is larger than a plan can be; allowed: {MAX_SPEC_BYTES} bytes")
    try:
        spec: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{origin} is malformed JSON ({reason(error)}); allowed: JSON") from None
    if spec is None:
        raise UserError(f"{origin}: {NULL}")
    return spec


def _read(name: str, origin: str) -> str:
    allowed = f"JSON text, a file with JSON, {_names(NAMED)}"
    if not name:
        raise UserError(f"plan is empty text; allowed: {allowed}")
    try:
        with Path(name).expanduser().open("rb") as file:
            return file.read(MAX_SPEC_BYTES + 1).decode()
    except (OSError, UnicodeDecodeError) as error:
        why = reason(error)
    except (RuntimeError, ValueError):  # an unknown ~user, a NUL byte
        why = "not a path"
    raise UserError(f"{origin} can't be read ({why}); allowed: {allowed}")


def json_schema() -> dict[str, Any]:
    """Make the JSON Schema of a spec."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "vllm-depthpar plan",
        **_ADAPTER.json_schema(),
    }


_KEYS = tuple(Spec.model_fields)


def _explain(error: ValidationError) -> str:
    """Say the first of pydantic's complaints as one line of ours."""
    # An unknown key often makes a required one look missing: say the cause, not the effect.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    fields, path = Spec.model_fields, [part for part in first["loc"] if isinstance(part, str)]
    if path[:1] == ["skip"] and len(path) > 1:
        fields = Skip.model_fields
    if path[0] == "blocks" and first["type"] == "extra_forbidden":
        fields, path = Halves.model_fields, ["blocks", path[-1]]
    elif path[0] in ("blocks", *MODES):
        path = path[:1]  # without pydantic's name for the form that it tried
    key, leaf = ".".join(path), path[-1]
    if key.startswith("desync"):
        found, allowed = shortened(first["input"]), fields["desync"].description
        return f"plan key 'desync': {found} is wrong; allowed: {allowed}"
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(leaf, fields, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"plan key {shortened(key)} is unknown{hint} (allowed: {_names(fields)})"
    if first["type"] == "missing" and first["loc"][-1] == leaf:
        return f"plan key {key!r} is missing; allowed: {fields[leaf].description}"
    found, allowed = shortened(first["input"]), fields[leaf].description
    return f"plan key {key!r}: {found} is wrong; allowed: {allowed}"


def _names(names: Any) -> str:
    return ", ".join(repr(name) for name in sorted(names))
