"""A page out of files, each with what its command has measured."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vllm_depthpar.bench.report import FIGURES, SHOWN
from vllm_depthpar.checkpoint.adapter import serving_command
from vllm_depthpar.errors import UserError, shortened
from vllm_depthpar.launch.variants import CARRIED, PLAIN
from vllm_depthpar.report import commands, records
from vllm_depthpar.report.collection import (
    ALL_REDUCES,
    BLOCKS,
    Collection,
    Key,
    fullest_first,
    read_plan,
)
from vllm_depthpar.report.data import Answers, Generation, Measure, Page, Recovery, Value


def page(files: Sequence[tuple[str, records.Record]]) -> Page:
    """Gather what files say.

    Args:
        files: one or more, by their names. The first says whose plans these are.

    Raises:
        UserError: a plan in a file is none.
    """
    model = _model(files[0][1])
    found = Collection(model)
    chosen: list[Key] = []
    recoveries: list[Recovery] = []
    generations: list[Generation] = []
    answers: list[Answers] = []
    for name, record in files:
        match record:
            case records.SearchRecord():
                chosen.append(_search(found, name, record))
            case records.EvalRecord():
                answers += _evaluation(found, name, record)
                generations += _generation(found, name, record.generate)
            case records.BenchRecord():
                _bench(found, name, record)
            case records.RecoveryRecord():
                recoveries.append(_recovery(found, name, record))
    found.compare_with_unmodified()
    points = found.points()
    # Where all points have both, what a search was for goes first.
    goals = [record.goal for _, record in files if isinstance(record, records.SearchRecord)]
    counted = [BLOCKS, ALL_REDUCES] if goals and "depth" in goals[0] else [ALL_REDUCES, BLOCKS]
    speeds = [one for one in found.speeds.values() if one not in counted]
    return Page(
        model=model,
        sources=found.sources,
        speed=fullest_first([*speeds, *counted], points),
        quality=fullest_first(found.qualities.values(), points),
        points=points,
        chosen=found.place(chosen[0]) if chosen else None,
        recoveries=recoveries,
        generations=generations,
        answers=answers,
    )


def _model(record: records.Record) -> str:
    match record:
        case records.RecoveryRecord(command=command):
            return commands.checkpoints(command)[0]
        case records.EvalRecord():
            return next(iter(record.parts)).model
    return record.model


def _search(found: Collection, name: str, record: records.SearchRecord) -> Key:
    """Take what a search found; returns the plan that it was for."""
    goal = ", ".join(f"--{key.replace('_', '-')} {value:g}" for key, value in record.goal.items())
    notes = (
        f"goal: {goal}; methods: {record.methods}; {record.rounds} rounds; "
        f"{len(record.measured)} plans measured",
        *_texts(record.texts, record.dtype),
    )
    at = found.source(name, record, notes)
    # The mean over the same texts, cut alike, is the same measure in every search.
    cuts = "; ".join(f"{text.text} {text.cut}" for text in record.texts)
    kl = Measure(
        f"kl mean {cuts} {record.dtype} {record.model}",
        "KL from the unmodified model, nats/token",
        (at,),
        is_quality=True,
    )
    place = commands.deployment(record.command)
    speed = Measure(
        f"predicted speed-up {place or record.cpu}",
        f"predicted speed-up ({place or record.cpu or 'this machine'})",
        (at,),
        more_is_better=True,
        form=".2f",
    )
    plain = found.plain(record.model, read_plan(record.plan.plan, name).layers)
    found.see(plain, kl, Value(0.0))
    _qualities(found, plain, record.unmodified, record, record.model, at)
    entries = [record.plan, *record.front, *record.measured]
    keys = [found.plan(one.plan, record.model, record.command, name) for one in entries]
    for key, entry in zip(keys, entries, strict=True):
        found.is_kind(key, entry.kind)
        found.see(key, kl, Value(entry.kl))
        _qualities(found, key, entry.quality, record, record.model, at)
        if entry.predicted_speedup is not None:
            found.see(plain, speed, Value(1.0))
            found.see(key, speed, Value(entry.predicted_speedup))
    return keys[0]


def _evaluation(found: Collection, name: str, record: records.EvalRecord) -> list[Answers]:
    """Take what plans cost on texts and tasks; returns what they answer."""
    if (texts := record.text) is not None:
        at = found.source(name, texts, _texts(texts.texts, texts.dtype))
        for key, row in _rows(found, texts.plans, texts, name):
            # A checkpoint that carries a plan is its own unmodified model.
            _qualities(
                found, key, row.results, texts, texts.model, at, with_kl=row.label != CARRIED
            )
    if (tasks := record.tasks) is not None:
        asked = (f"{task}: {about.documents} documents" for task, about in tasks.tasks.items())
        at = found.source(name, tasks, asked)
        for key, scored in _rows(found, tasks.plans, tasks, name):
            for measure, value in _scores(scored.results, tasks.tasks, at):
                found.see(key, measure, value)
    if (written := record.answers) is None:
        return []
    at = found.source(name, written, written.settings)
    plans = [plan for _, plan in _rows(found, written.plans, written, name)]
    for plan in plans:
        if len(plan.answers) != len(written.prompts):
            raise UserError(
                f"{name}: {shortened(plan.label)} has {len(plan.answers)} answers; allowed: one to "
                f"each of {len(written.prompts)} prompts"
            )
    each = zip(*(plan.answers for plan in plans), strict=True)
    side_by_side = tuple(zip(written.prompts, each, strict=True))
    return [Answers(at, tuple(plan.label for plan in plans), side_by_side)]


def _generation(
    found: Collection, name: str, record: records.GenerationRecord | None
) -> list[Generation]:
    """Take what plans write; the unmodified model may be another checkpoint."""
    if record is None:
        return []
    length = record.longest
    asked = f"{record.prompts} prompts of each kind, to {length} tokens; seed {record.seed}"
    if tasks := record.plans[0].tasks:
        asked += f"; {next(iter(tasks.values())).questions} questions of each task"
    at = found.source(name, record, [asked])
    unmodified = record.model_copy(update={"model": record.unmodified or record.model})
    rows = _rows(found, record.plans[1:], record, name)
    rows = [*_rows(found, record.plans[:1], unmodified, name), *rows]
    for key, row in rows:
        for measure, value in _generated(row, unmodified.model, asked, length, at):
            found.see(key, measure, value)
    models = [unmodified.model, *[record.model] * (len(rows) - 1)]
    labels = [
        row.label if unmodified.model == record.model else f"{row.label}; {model}"
        for (_, row), model in zip(rows, models, strict=True)
    ]
    return [Generation(at, length, tuple(zip(labels, record.plans, strict=True)))]


def _generated(
    row: records.RowOfGeneration, unmodified: str, asked: str, length: str, at: int
) -> list[tuple[Measure, Value]]:
    """List the figures of a plan's writing that are points' too. What was asked alike is the same
    measure in every file."""
    measured = []
    for kind, writing in row.writing.items():
        kl = writing.lengths[length].sampled.kl
        title = f"KL of drawn {kind}, nats/token"
        measure = Measure(f"{title} {asked} {unmodified}", title, (at,), is_quality=True)
        measured.append((measure, Value(kl.value, error=kl.stderr)))
    for task, right in row.tasks.items():
        title = f"right answers, {task}"
        # A few questions: to be read with their intervals, not plotted.
        measure = Measure(
            f"{title} {asked}", title, (at,), True, ".2f", is_quality=True, plotted=False
        )
        measured.append((measure, Value(right.value, low=right.low, high=right.high)))
    return measured


def _scores(
    results: Mapping[str, Mapping[str, records.Metric]],
    tasks: Mapping[str, records.Task],
    at: int,
) -> list[tuple[Measure, Value]]:
    """List a plan's metrics of which it is known which way is better. The same questions are the
    same measure in every file."""
    scores = []
    for task, metrics in results.items():
        about = tasks.get(task) or records.Task()
        better, asked = about.higher_is_better, f"{about.documents}, {about.num_fewshot}"
        for metric, score in metrics.items():
            if score.value is not None and (more := better.get(metric)) is not None:
                key, title = f"task {task} {asked} {metric}", f"{task}, {metric}"
                measure = Measure(key, title, (at,), more_is_better=more, is_quality=True)
                scores.append((measure, Value(score.value, error=score.stderr)))
    return scores


def _bench(found: Collection, name: str, record: records.BenchRecord) -> None:
    """Take speed-ups, measured and predicted."""
    settings, baseline = record.settings, record.summary.baseline
    mode = "eager" if settings.eager else "compiled"
    at = found.source(name, record, [f"TP {settings.tp}, {settings.dtype}, {mode}"])
    over = "" if baseline == PLAIN else f" over {baseline}"
    keys = {row.label: key for key, row in _rows(found, record.variants, record, name)}

    def speedup(what: str, load: str) -> Measure:
        title = f"{what}{over}, {load}"
        return Measure(f"{what} {at} {load}", title, (at,), more_is_better=True, form=".2f")

    for load, of_load in record.summary.loads.items():
        part, _, sizes = load.partition(", ")
        for figure in FIGURES.get(part, ()):
            if figure.key not in SHOWN[part]:
                continue
            what = figure.title.partition(",")[0]
            measure = speedup(f"measured speed-up: {what}", f"{sizes} ({part})")
            for label, figures in of_load.items():
                speed = figures[figure.key].speedup if figure.key in figures else None
                if label in keys and speed:
                    value = Value(speed.median, low=speed.min, high=speed.max)
                    found.see(keys[label], measure, value)
    for load, predicted in record.predicted.items():
        for label, times in predicted.items():
            if label in keys:
                sizes = load.partition(", ")[2]
                found.see(keys[label], speedup("predicted speed-up", sizes), Value(times))


def _recovery(found: Collection, name: str, record: records.RecoveryRecord) -> Recovery:
    """Take what was won back."""
    model, out = commands.checkpoints(record.command)
    at = found.source(name, record, _texts(record.texts, record.dtype))
    plan = read_plan(record.plan, name)
    before = found.plan(record.plan, model, record.command, name)
    tp = commands.ranks(record.command, plan)
    flags = ["--tensor-parallel-size", str(tp)] * (tp > 1)
    serve = shlex.join(["vllm", "serve", out, *flags])
    adapter = record.settings.train == "lora"
    if adapter:
        serve = shlex.join([serving_command(model, Path(out), record.settings.rank), *flags])
    after = found.recovered(before, record.plan, out, serve)
    if not adapter:
        found.as_fast_as_before(after)
    stages = {"unmodified": found.plain(model, plan.layers), "plan": before, "end": after}
    for stage, key in stages.items():
        _qualities(found, key, record.quality.get(stage, {}), record, model, at)
    return Recovery(f"{plan.name}, on {model}", at, record.quality)


def _rows(
    found: Collection,
    rows: Sequence[records.SomeRow],
    record: records.OfModel,
    name: str,
) -> list[tuple[Key, records.SomeRow]]:
    """Add the plans of a comparison; returns them with their keys."""
    specs = [row.spec for row in rows if row.spec is not None]
    layers = read_plan(specs[0], name).layers if specs else None
    keyed = []
    for row in rows:
        if row.spec is None:
            key = found.plain(record.model, layers)
        else:
            key = found.plan(row.spec, record.model, record.command, name)
        found.called(key, row.label)
        keyed.append((key, row))
    return keyed


def _qualities(
    found: Collection,
    key: Key,
    qualities: Mapping[str, records.Quality],
    record: records.OnTexts,
    model: str,
    at: int,
    with_kl: bool = True,
) -> None:
    """Add qualities on texts. The same text, cut alike, is the same measure in every file.

    Args:
        model: from which the KL is, and which wrote the texts that a model writes itself.
    """
    for name, quality in qualities.items():
        cut = next((one.cut for one in record.texts if one.text == name), "")
        # Each model writes its own.
        writer = model if name.startswith("own-") else ""
        text = " ".join([name, cut, record.dtype, writer])
        perplexity = Measure(
            f"perplexity {text}",
            f"perplexity, {name}",
            (at,),
            form=".2f",
            is_quality=True,
            text=text,
            text_name=name,
            figure="perplexity",
        )
        found.see(key, perplexity, Value(quality.perplexity))
        if with_kl:
            kl = replace(
                perplexity,
                key=f"kl {text} {model}",
                title=f"KL, {name}, nats/token",
                form=".3f",
                figure="kl",
            )
            found.see(key, kl, Value(quality.kl, error=quality.kl_standard_error))


def _texts(texts: Sequence[records.Text], dtype: str) -> tuple[str, ...]:
    """Say what texts were counted."""
    return tuple(
        f"{text.text}: {text.tokens_counted} tokens counted, in {text.windows} windows of "
        f"{text.window}, {dtype}"
        for text in texts
    )
