"""The files that a page is made of, in form: what `search`, `eval`, `bench` and `recover` write.

Only what a page shows is read; what else they hold is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_depthpar.errors import UserError, shortened

Count = Annotated[int, Field(ge=0)]


class Form(BaseModel):
    """A mapping with these keys, among others."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Made(Form):
    """When, with what and on what (`util.provenance.origin`)."""

    command: str
    date: str
    versions: dict[str, str] = {}
    cpu: str = ""


class OfModel(Made):
    """Whose plans were measured."""

    model: str


class Text(Form):
    """A text as it was measured on."""

    text: str
    window: Count
    windows: Count
    tokens_counted: Count

    @property
    def cut(self) -> str:
        """How it was cut."""
        return f"{self.windows} x {self.window}, {self.tokens_counted}"


class Quality(Form):
    """A plan's quality on a text."""

    perplexity: float
    kl: float
    kl_standard_error: float | None = None


class Entry(Form):
    """A plan of a search."""

    plan: dict[str, Any]
    kind: str
    kl: float
    predicted_speedup: float | None = None
    quality: dict[str, Quality] = {}


class SearchRecord(OfModel):
    """`*-report.json` of `depthpar search`."""

    dtype: str
    texts: list[Text]
    goal: dict[str, float]
    methods: str
    rounds: Count
    unmodified: dict[str, Quality]
    plan: Entry
    front: list[Entry]
    measured: list[Entry]


class Row(Form):
    """A plan that was compared; its spec is None for plain vLLM."""

    label: str
    spec: dict[str, Any] | None


class RowOnTexts(Row):
    """What `eval --text` found of a plan."""

    results: dict[str, Quality]


class TextRecord(OfModel):
    """What `eval --text` found."""

    dtype: str
    texts: list[Text]
    plans: list[RowOnTexts]


class Metric(Form):
    """What a task says of a plan."""

    value: float | None
    stderr: float | None = None


class RowOnTasks(Row):
    """What `eval --tasks` found of a plan."""

    results: dict[str, dict[str, Metric]]


class Task(Form):
    """A task as it was asked."""

    documents: Count | dict[str, Count] = 0
    num_fewshot: Count | str | None = None
    higher_is_better: dict[str, bool | None] = {}


class TaskRecord(OfModel):
    """What `eval --tasks` found."""

    tasks: dict[str, Task]
    plans: list[RowOnTasks]


class RowOfAnswers(Row):
    """What a plan answers."""

    answers: list[str]


class AnswersRecord(OfModel):
    """What `eval --answers` found."""

    settings: list[str] = []
    prompts: list[str]
    plans: list[RowOfAnswers]


class Estimate(Form):
    """A mean, and its standard error."""

    value: float
    stderr: float


class Drawn(Form):
    """Answers that were drawn at temperature 1."""

    log_probability: Estimate
    kl: Estimate
    repeated_4_grams: float
    ended: float


class Greedy(Form):
    """Greedy answers; how far they are like the unmodified model's, if they are not that one's."""

    log_probability: Estimate
    repeated_4_grams: float
    loops: float
    ended: float
    median_tokens_alike: float | None = None


class Answered(Form):
    """Answers up to a length."""

    sampled: Drawn
    greedy: Greedy


class Writing(Form):
    """What a plan wrote to prompts of one kind: {length: ...}."""

    answers: Count
    lengths: dict[str, Answered]


class RightAnswers(Form):
    """The share of right answers, and its 95 % interval."""

    questions: Count
    value: float
    low: float
    high: float


class RowOfGeneration(Row):
    """What a plan wrote, by kind of prompt, and how many tasks it did."""

    writing: dict[str, Writing]
    tasks: dict[str, RightAnswers] = {}


class GenerationRecord(OfModel):
    """What `eval --generate` found; of the unmodified model in the first row."""

    unmodified: str = ""
    lengths: list[Count] = Field(min_length=1)
    prompts: Count
    seed: int
    plans: list[RowOfGeneration] = Field(min_length=1)

    @property
    def longest(self) -> str:
        """The length that answers were written to."""
        return str(max(self.lengths))

    @model_validator(mode="after")
    def _has_every_length(self) -> GenerationRecord:
        kinds = self.plans[0].writing.keys()
        for row in self.plans:
            if row.writing.keys() != kinds or row.tasks.keys() != self.plans[0].tasks.keys():
                raise ValueError("plans were asked different things")
            if any(self.longest not in of_kind.lengths for of_kind in row.writing.values()):
                raise ValueError(f"answers of {self.longest} tokens are missing")
        return self


class EvalRecord(Form):
    """`depthpar eval --out`."""

    text: TextRecord | None = None
    tasks: TaskRecord | None = None
    answers: AnswersRecord | None = None
    generate: GenerationRecord | None = None

    @property
    def parts(self) -> list[OfModel]:
        """What was measured."""
        parts = (self.text, self.tasks, self.answers, self.generate)
        return [part for part in parts if part is not None]

    @model_validator(mode="after")
    def _has_a_part(self) -> EvalRecord:
        if not self.parts:
            raise ValueError("nothing was measured")
        return self


class Spread(Form):
    """A median and how far rounds were apart."""

    median: float
    min: float
    max: float


class Figure(Form):
    """What rounds say of a figure."""

    speedup: Spread | None


class BenchSettings(Form):
    """What a comparison depends on."""

    tp: Count = 1
    dtype: str = ""
    eager: bool = False


class BenchSummary(Form):
    """What rounds say: {load: {plan's label: {figure: ...}}}."""

    baseline: str
    loads: dict[str, dict[str, dict[str, Figure]]]


class BenchRecord(OfModel):
    """`depthpar bench --out`."""

    settings: BenchSettings
    variants: list[Row]
    summary: BenchSummary
    predicted: dict[str, dict[str, float]] = {}


class RecoverySettings(Form):
    """How weights were trained."""

    train: str
    rank: Count = 0


class RecoveryRecord(Made):
    """`recovery.json` of `depthpar recover`."""

    plan: dict[str, Any]
    settings: RecoverySettings
    dtype: str
    texts: list[Text] = Field(alias="held_out")  # `texts` of the file are what was learned from
    quality: dict[str, dict[str, Quality]]


SomeRow = TypeVar("SomeRow", bound=Row)
OnTexts = SearchRecord | TextRecord | RecoveryRecord
Record = SearchRecord | EvalRecord | BenchRecord | RecoveryRecord
# What a file is, by a key that no other has.
_FORMS: dict[str, type[Record]] = {
    "front": SearchRecord,
    "variants": BenchRecord,
    "held_out": RecoveryRecord,
    "text": EvalRecord,
    "tasks": EvalRecord,
    "answers": EvalRecord,
    "generate": EvalRecord,
}
ALLOWED = "what search (*-report.json), eval, bench and recover (recovery.json) write"


def read(content: object, name: str) -> Record:
    """Read a file's JSON.

    Args:
        name: of the file, for messages.

    Raises:
        UserError: it is of none of these commands, or something in it is wrong.
    """
    keys = content if isinstance(content, Mapping) else {}
    form = next((form for key, form in _FORMS.items() if key in keys), None)
    if form is None:
        raise UserError(f"{name} is no report of plans; allowed: {ALLOWED}")
    try:
        return form.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(
            part if part.isprintable() else repr(part) for part in map(str, first["loc"])
        )
        raise UserError(
            f"{name}: {place} is {shortened(first['input'])} ({first['msg']}); allowed: {ALLOWED}"
        ) from None
