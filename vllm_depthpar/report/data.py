"""What a page shows: plain data, whichever files it was read from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm_depthpar.report.records import Quality, RowOfGeneration

# What a point is; with a mark of its own, so that no colour is needed to tell them apart.
UNMODIFIED, FOUND, SPAN, SKIPPING, COMPARED, RECOVERED = KINDS = (
    "unmodified",
    "found",
    "span of pairs",
    "skipping",
    "compared",
    "recovered",
)
# Published ways to shorten a model.
BASELINES = (SPAN, SKIPPING)


@dataclass(frozen=True)
class Source:
    """A command whose numbers a page shows.

    Attributes:
        name: the file that it wrote.
        made: when and on what, in words.
        notes: what has to stand beside its numbers: texts, settings.
    """

    name: str
    command: str
    made: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measure:
    """Something that points have a value of.

    Attributes:
        key: its name in `Point.values`.
        title: for people, with its unit.
        sources: the commands that measured it, by their place in `Page.sources`; none for what
            the plan itself says.
        more_is_better: or less is.
        form: how its values are written.
        is_quality: or a speed.
        text, text_name: that it is a quality on, cut in one way, if it is on one; what people
            call it.
        figure: which of a text's figures: "perplexity", "ratio" (to the unmodified model's), "kl".
        plotted: whether points are plotted against it.
    """

    key: str
    title: str
    sources: tuple[int, ...] = ()
    more_is_better: bool = False
    form: str = ".3f"
    is_quality: bool = False
    text: str = ""
    text_name: str = ""
    figure: str = ""
    plotted: bool = True


@dataclass(frozen=True)
class Value:
    """A value, and how far it is known.

    Attributes:
        low, high: the spread of a measurement.
        error: its standard error.
        source: the command that measured it, by its place in `Page.sources`.
    """

    value: float
    low: float | None = None
    high: float | None = None
    error: float | None = None
    source: int | None = None

    def written(self, form: str) -> str:
        """Write it for people: '1.21 (1.19 to 1.24)', '0.353 ± 0.012'."""
        text = f"{self.value:{form}}"
        if self.low is not None and self.high is not None and self.low < self.high:
            return f"{text} ({self.low:{form}} to {self.high:{form}})"
        return text if self.error is None else f"{text} ± {self.error:{form}}"


@dataclass(frozen=True)
class Point:
    """A plan on a checkpoint.

    Attributes:
        label: the plan in words.
        kind: of `KINDS`.
        picture: its blocks, a line each.
        spec: JSON-ready; None for plain vLLM.
        serve: the command that serves it.
        values: by `Measure.key`.
        names: what else it was called where it was measured.
        before: of a recovered one, the point that it was, by its place in `Page.points`.
    """

    label: str
    kind: str
    picture: str
    spec: Mapping[str, object] | None
    serve: str
    values: Mapping[str, Value]
    names: tuple[str, ...] = ()
    before: int | None = None


@dataclass(frozen=True)
class Recovery:
    """What a plan lost, and what was won back.

    Attributes:
        source: by its place in `Page.sources`.
        stages: {stage: {text: its quality}}, in order.
    """

    label: str
    source: int
    stages: Mapping[str, Mapping[str, Quality]]


@dataclass(frozen=True)
class Answers:
    """What plans answer, side by side.

    Attributes:
        source: by its place in `Page.sources`.
        labels: of the plans.
        prompts: with an answer of each plan.
    """

    source: int
    labels: tuple[str, ...]
    prompts: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Generation:
    """What plans write when they go on from what they wrote themselves.

    Attributes:
        source: by its place in `Page.sources`.
        length: the tokens up to which they wrote.
        plans: with their labels, the unmodified model first.
    """

    source: int
    length: str
    plans: tuple[tuple[str, RowOfGeneration], ...]


@dataclass(frozen=True)
class Page:
    """Everything that a page shows.

    Attributes:
        model: whose plans these are.
        speed, quality: what points are plotted against, the first that is to be shown first.
        chosen: the point to show first, if one was looked for.
    """

    model: str
    sources: Sequence[Source]
    speed: Sequence[Measure]
    quality: Sequence[Measure]
    points: Sequence[Point]
    chosen: int | None = None
    recoveries: Sequence[Recovery] = ()
    generations: Sequence[Generation] = ()
    answers: Sequence[Answers] = ()


def front(points: Sequence[Point], speed: Measure, quality: Measure) -> list[int]:
    """List the points that no other beats: the Pareto front, from slow to fast.

    Points without a value of both are on none.
    """
    known = [
        at
        for at, point in enumerate(points)
        if speed.key in point.values and quality.key in point.values
    ]

    def gain(measure: Measure, at: int) -> float:
        value = points[at].values[measure.key].value
        return value if measure.more_is_better else -value

    known.sort(key=lambda at: (gain(speed, at), gain(quality, at)), reverse=True)
    found: list[int] = []
    for at in known:
        if not found or gain(quality, at) > gain(quality, found[-1]):
            found.append(at)
    return found[::-1]
