"""Plans on checkpoints, collected: the same plan on the same checkpoint is one point."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from vllm_depthpar.errors import UserError
from vllm_depthpar.launch.variants import PLAIN, Variant
from vllm_depthpar.plan import Plan, drawing, resolve
from vllm_depthpar.plan.model_shape import all_reduces
from vllm_depthpar.report import commands
from vllm_depthpar.report.data import (
    COMPARED,
    KINDS,
    RECOVERED,
    SKIPPING,
    SPAN,
    UNMODIFIED,
    Measure,
    Point,
    Source,
    Value,
)
from vllm_depthpar.report.records import Made

BLOCKS = Measure("blocks", "blocks, one after the other", form=".0f")
ALL_REDUCES = Measure("all-reduces", "all-reduces a forward pass, TP > 1", form=".0f")
# A plan's digest (that of a variant: "plain" for vLLM's own model), and the checkpoint's name.
Key = tuple[str, str]


class Collection:
    """Points, measures and sources, as files add them.

    Args:
        model: whose plans these are; points of others name theirs.
    """

    def __init__(self, model: str) -> None:
        self.sources: list[Source] = []
        self.speeds: dict[str, Measure] = {one.key: one for one in (ALL_REDUCES, BLOCKS)}
        self.qualities: dict[str, Measure] = {}
        self._model = model
        self._points: dict[Key, Point] = {}
        self._layers: dict[str, int] = {}
        self._befores: dict[Key, Key] = {}
        # Recovered points that are as fast as what they were.
        self._alike: set[Key] = set()

    def source(self, name: str, made: Made, notes: Iterable[str] = ()) -> int:
        """Add a command; returns its place."""
        versions = ", ".join(f"{of} {version}" for of, version in made.versions.items())
        when = "; ".join(part for part in (made.date, made.cpu, versions) if part)
        self.sources.append(Source(name, made.command, when, tuple(notes)))
        return len(self.sources) - 1

    def plain(self, model: str, layers: int | None) -> Key:
        """Add plain vLLM; returns its key.

        Args:
            layers: of the model, if they are known.
        """
        key = (PLAIN, model)
        layers = layers or self._layers.get(model)
        plan = None if layers is None else resolve("identity", layers)
        serve = shlex.join(["vllm", "serve", model])
        label = self._named("plain vLLM", model)
        self._put(key, Point(label, UNMODIFIED, _picture(plan), None, serve, _counts(plan)))
        return key

    def plan(self, spec: Mapping[str, object], model: str, command: str, name: str) -> Key:
        """Add a plan, or plain vLLM where it changes nothing; returns its key.

        Args:
            command: that measured it.
            name: of the file, for messages.

        Raises:
            UserError: it is none.
        """
        plan = read_plan(spec, name)
        self._layers[model] = plan.layers
        if plan.is_identity or (PLAIN, model) in self._points:
            plain = self.plain(model, plan.layers)
            if plan.is_identity:
                return plain
        key = (plan.digest, model)
        tp = commands.ranks(command, plan)
        flags = ["--tensor-parallel-size", str(tp)] * (tp > 1)
        one = Variant(plan.name, spec=plan.to_spec())
        serve = shlex.join(["vllm", "serve", model, *one.flags, *flags])
        self._put(key, self._point(plan, model, kind(plan), serve))
        return key

    def recovered(self, before: Key, spec: Mapping[str, object], name: str, serve: str) -> Key:
        """Add new weights in a known plan; returns their key.

        Args:
            name: of the new checkpoint.
        """
        plan = read_plan(spec, name)
        key = (before[0], name)
        self._put(key, self._point(plan, name, RECOVERED, serve))
        self._befores[key] = before
        return key

    def as_fast_as_before(self, key: Key) -> None:
        """Say that a recovered point is its plan with other weights, and nothing more."""
        self._alike.add(key)

    def is_kind(self, key: Key, of_kind: str) -> None:
        """Say what a point is, who found it."""
        point = self._points[key]
        if point.kind == COMPARED and of_kind in KINDS:
            self._points[key] = replace(point, kind=of_kind)

    def called(self, key: Key, name: str) -> None:
        """Add a name that a point was given."""
        point = self._points[key]
        if name not in (PLAIN, *point.names):
            self._points[key] = replace(point, names=(*point.names, name))

    def see(self, key: Key, measure: Measure, value: Value) -> None:
        """Add a value; what is known stays, and what is no number is left out.

        Args:
            measure: of one source.
        """
        (source,) = measure.sources
        value = replace(value, source=source)
        if not all(math.isfinite(one) for one in vars(value).values() if one is not None):
            return
        measures = self.qualities if measure.is_quality else self.speeds
        known = measures.setdefault(measure.key, measure)
        sources = tuple(dict.fromkeys((*known.sources, *measure.sources)))
        measures[measure.key] = replace(known, sources=sources)
        point = self._points[key]
        self._points[key] = replace(point, values={measure.key: value, **point.values})

    def compare_with_unmodified(self) -> None:
        """Add each perplexity's ratio to the unmodified model's on the same text, which is plotted
        in its place."""
        plain = self._points.get((PLAIN, self._model))
        perplexities = [one for one in self.qualities.values() if one.figure == "perplexity"]
        for measure in perplexities:
            base = plain.values.get(measure.key) if plain else None
            if base is None or not base.value > 0:
                continue
            self.qualities[measure.key] = replace(measure, plotted=False)
            ratio = replace(
                measure,
                key=f"ratio {measure.key}",
                title=f"{measure.title}, times the unmodified's",
                figure="ratio",
                form=".3f",
            )
            for key, point in list(self._points.items()):
                mine = point.values.get(measure.key)
                if mine is not None and mine.source is not None:
                    of_source = replace(ratio, sources=(mine.source,))
                    self.see(key, of_source, Value(mine.value / base.value))

    def points(self) -> list[Point]:
        """List the points."""
        found = []
        for key, point in self._points.items():
            before = self._befores.get(key)
            values = dict(point.values)
            if before is not None and key in self._alike:
                known = self._points[before].values
                values = {name: known[name] for name in self.speeds if name in known} | values
            place = None if before is None else self.place(before)
            found.append(replace(point, values=values, before=place))
        return found

    def place(self, key: Key) -> int:
        """Find a point's place among `points`."""
        return list(self._points).index(key)

    def _point(self, plan: Plan, model: str, of_kind: str, serve: str) -> Point:
        label = self._named(plan.name, model)
        return Point(label, of_kind, _picture(plan), plan.to_spec(), serve, _counts(plan))

    def _named(self, label: str, model: str) -> str:
        return label if model == self._model else f"{label}; {model}"

    def _put(self, key: Key, point: Point) -> None:
        """Add a point, or what it says of one that is known: a picture, that it was recovered."""
        known = self._points.get(key)
        if known is not None:
            better = point.kind == RECOVERED or not known.picture
            merged = replace(point, names=known.names) if better else known
            point = replace(merged, values={**point.values, **known.values})
        self._points[key] = point


def read_plan(spec: Mapping[str, object], name: str) -> Plan:
    """Read a plan that a file holds in its normal form.

    Raises:
        UserError: it is none.
    """
    layers = spec.get("layers")
    # Deeper than any model; a picture of it would have as many lines.
    if not isinstance(layers, int) or not 0 < layers <= 10_000:
        raise UserError(f"{name}: a plan has {layers!r} layers; allowed: 1 to 10000")
    try:
        return resolve(spec, layers)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def kind(plan: Plan) -> str:
    """Say whether a plan is one of the published ways to shorten a model: a contiguous span of
    pairs, or nothing but skipped layers."""
    if plan.is_identity:
        return UNMODIFIED
    alone = tuple((layer,) for layer in range(plan.layers))
    if plan == Plan(plan.layers, tuple((layer,) for layer in plan.kept)):
        return SKIPPING
    wide = [block for block in plan.blocks if len(block) > 1]
    first = wide[0][0] if wide else 0
    end = first + 2 * len(wide)
    pairs = tuple((layer, layer + 1) for layer in range(first, end, 2))
    return SPAN if plan == Plan(plan.layers, alone[:first] + pairs + alone[end:]) else COMPARED


def fullest_first(measures: Iterable[Measure], points: Sequence[Point]) -> list[Measure]:
    """Sort measures by how many points have a value; equal ones keep their order. Those that are
    not plotted are last."""
    return sorted(
        measures,
        key=lambda one: (not one.plotted, -sum(one.key in point.values for point in points)),
    )


def _picture(plan: Plan | None) -> str:
    return "" if plan is None else "\n".join(drawing.blocks(plan))


def _counts(plan: Plan | None) -> dict[str, Value]:
    """Count what a plan itself says."""
    if plan is None:
        return {}
    return {BLOCKS.key: Value(plan.depth), ALL_REDUCES.key: Value(all_reduces(plan))}
