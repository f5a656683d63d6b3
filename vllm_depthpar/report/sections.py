"""The parts of a page that need no script: tables, plans, answers, commands."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape

from vllm_depthpar.report.data import (
    BASELINES,
    COMPARED,
    FOUND,
    KINDS,
    RECOVERED,
    SKIPPING,
    SPAN,
    UNMODIFIED,
    Answers,
    Generation,
    Measure,
    Page,
    Point,
    Recovery,
    Source,
    front,
)
from vllm_depthpar.report.records import Answered, Estimate, RightAnswers

# Told apart by shape; the plot draws the same ones.
MARKS = {UNMODIFIED: "★", FOUND: "●", SPAN: "■", SKIPPING: "✕", COMPARED: "▲", RECOVERED: "◆"}
_WORDS = {
    UNMODIFIED: "unmodified",
    FOUND: "found by search",
    SPAN: "span of pairs (published)",
    SKIPPING: "skipped layers (published)",
    COMPARED: "compared",
    RECOVERED: "recovered",
}


def legend(points: Sequence[Point]) -> str:
    """Say what each mark stands for, of those that there are."""
    there = {point.kind for point in points}
    items = "".join(
        f'<li class="{_class(kind)}">{_mark(kind)} {_WORDS[kind]}</li>'
        for kind in MARKS
        if kind in there
    )
    return f'<ul class="legend">{items}<li>━ the best known (filled)</li></ul>'


def points_table(page: Page) -> str:
    """Tabulate the numbers of the plot: first the best known and what they are to be compared with,
    then the rest, folded away."""
    order, best = _from_plain_on(page), set(_best(page, KINDS))
    published = {at for kind in BASELINES for at in _best(page, [kind])}
    first = [
        at
        for at in order
        if at in best | published
        or at == page.chosen
        or page.points[at].kind not in (FOUND, *BASELINES)
    ]
    rest = [at for at in order if at not in first]
    html = _table(page, first, best)
    if rest:
        html += (
            f"<details><summary>{len(rest)} more that were measured</summary>"
            f"{_table(page, rest, best)}</details>"
        )
    return html


def _best(page: Page, kinds: Sequence[str]) -> list[int]:
    """List what is on the front of these kinds alone, on the axes that are shown first."""
    if not page.quality:
        return []
    there = [at for at, point in enumerate(page.points) if point.kind in kinds]
    best = front([page.points[at] for at in there], page.speed[0], page.quality[0])
    return [there[at] for at in best]


def _columns(page: Page) -> list[Measure]:
    """Choose what tables show: what the plot shows, its first axes first."""
    speed = [one for one in page.speed if one.plotted]
    quality = [one for one in page.quality if one.plotted]
    return [*speed[:1], *quality, *speed[1:]]


def _from_plain_on(page: Page) -> list[int]:
    """Order points as the plot does, the unmodified model first."""
    speed = page.speed[0]
    sign = 1 if speed.more_is_better else -1

    def place(at: int) -> tuple[bool, float, float]:
        point = page.points[at]
        found, quality = point.values.get(speed.key), _first_quality(page, point)
        return (point.kind != UNMODIFIED, sign * found.value if found else 0.0, quality)

    return sorted(range(len(page.points)), key=place)


def _first_quality(page: Page, point: Point) -> float:
    value = point.values.get(page.quality[0].key) if page.quality else None
    return value.value if value else 0.0


def _table(page: Page, rows: Sequence[int], best: set[int]) -> str:
    known = [one for one in _columns(page) if any(one.key in page.points[at].values for at in rows)]
    head = "".join(
        f'<th scope="col">{escape(one.title)} {_direction(one)}{_notes(one.sources)}</th>'
        for one in known
    )
    body = []
    for at in rows:
        point = page.points[at]
        cells = "".join(f"<td>{_cell(point, one)}</td>" for one in known)
        notes = ", best known" if at in best else ""
        body.append(
            f'<tr class="{_class(point.kind)}" data-point="{at}"><th scope="row">'
            f'<a href="#plan-{at}">{_mark(point.kind)} {escape(point.label)}</a>'
            f"<small>{_WORDS[point.kind]}{notes}{_names(point)}</small></th>{cells}</tr>"
        )
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="table of plans"><table>'
        f'<thead><tr><th scope="col">plan</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def plans(page: Page) -> str:
    """Show each plan: its picture, its figures, itself as JSON, the command that serves it."""
    return "".join(_plan(page, at) for at in _from_plain_on(page))


def _plan(page: Page, at: int) -> str:
    point = page.points[at]
    chosen = ", what the search was for" if at == page.chosen else ""
    picture = (
        f'<pre class="picture" role="img" aria-label="{escape(point.label)}">'
        f"{escape(point.picture)}</pre>"
    )
    spec = "" if point.spec is None else f"<h4>Plan</h4>{_code(json.dumps(point.spec))}"
    before = (
        ""
        if point.before is None
        else f'<p>Recovered from <a href="#plan-{point.before}">the plan alone</a>.</p>'
    )
    return (
        f'<details class="plan {_class(point.kind)}" id="plan-{at}">'
        f"<summary>{_mark(point.kind)} {escape(point.label)}"
        f"<small>{_WORDS[point.kind]}{chosen}{_names(point)}</small></summary>"
        f'<div class="about">{before}{_figures(page, point)}{picture if point.picture else ""}'
        f"<h4>Serve it</h4>{_code(point.serve)}{spec}</div></details>"
    )


def _figures(page: Page, point: Point) -> str:
    """Tabulate a point's qualities, a text in a row, and its speeds."""
    texts: dict[str, list[Measure]] = {}
    for one in page.quality:
        if one.key in point.values and one.text:
            texts.setdefault(one.text, []).append(one)
    rows = []
    for of_text in texts.values():
        found = {one.figure: one for one in of_text}
        cells = "".join(
            f"<td>{_cell(point, found[figure]) if figure in found else ''}</td>"
            for figure in ("perplexity", "ratio", "kl")
        )
        name = f"{escape(of_text[0].text_name)}{_made_by(point, of_text)}"
        rows.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    html = ""
    if rows:
        html += (
            '<div class="wide"><table><thead><tr><th scope="col">text</th>'
            '<th scope="col">perplexity</th><th scope="col">its ratio</th>'
            '<th scope="col">KL</th></tr></thead>'
            f"<tbody>{''.join(rows)}</tbody></table></div>"
        )
    others = [
        one for one in (*page.quality, *page.speed) if one.key in point.values and not one.text
    ]
    items = "".join(
        f"<dt>{escape(one.title)}{_made_by(point, [one])}</dt><dd>{_cell(point, one)}</dd>"
        for one in others
    )
    return f"{html}<dl>{items}</dl>" if items else html


def recoveries(found: Sequence[Recovery]) -> str:
    """Show qualities before and after recovery, with a bar for what is lost."""
    return "".join(map(_recovery, found))


_STAGES = {
    "unmodified": "unmodified",
    "plan": "plan alone",
    "refit": "after least squares",
    "distilled": "distilled, not kept",
    "end": "recovered",
}


def _recovery(found: Recovery) -> str:
    names = list(dict.fromkeys(name for texts in found.stages.values() for name in texts))
    most = max(
        (quality.kl for texts in found.stages.values() for quality in texts.values()),
        default=0.0,
    )
    rows = []
    for stage, texts in found.stages.items():
        cells = ""
        for name in names:
            quality = texts.get(name)
            if quality is None:
                cells += "<td></td><td></td>"
                continue
            share = 100 * quality.kl / most if most > 0 else 0
            cells += (
                f"<td>{quality.perplexity:.2f}</td><td>{quality.kl:.3f}"
                f'<span class="bar" style="width:{max(0.0, min(100.0, share)):.1f}%"></span></td>'
            )
        label = escape(_STAGES.get(stage, stage))
        rows.append(f'<tr><th scope="row">{label}</th>{cells}</tr>')
    head = "".join(
        f'<th scope="col">perplexity, {escape(name)}</th>'
        f'<th scope="col">KL, {escape(name)}, nats/token</th>'
        for name in names
    )
    return (
        f"<h3>{escape(found.label)}{_notes([found.source])}</h3>"
        '<div class="wide" tabindex="0" role="region" aria-label="table of a recovery"><table>'
        f'<thead><tr><th scope="col">weights</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def generations(found: Sequence[Generation]) -> str:
    """Show what plans write by themselves: a row for each kind of prompt and plan, and one for each
    plan's share of right answers."""
    return "".join(map(_generation, found))


_OF_WRITING = (
    *("log-prob., drawn", "KL, drawn", "log-prob., greedy", "repeated, greedy"),
    *("loops, greedy", "ended, drawn", "ended, greedy", "alike until"),
)


def _generation(found: Generation) -> str:
    kinds = found.plans[0][1].writing
    rows = [
        _row(f"{kind}: {label}", _of_writing(row.writing[kind].lengths[found.length]))
        for kind in kinds
        for label, row in found.plans
    ]
    html = (
        f'<p class="lead">Answers of up to {escape(found.length)} tokens, under the unmodified '
        "model, which is first: log-probability, and KL of the plan from it, in nats per token; "
        f"repeated 4-grams.{_notes([found.source])}</p>"
        f"{_numbers('what was written', ['prompts: plan', *_OF_WRITING], rows)}"
    )
    if tasks := found.plans[0][1].tasks:
        shares = [_row(label, map(_share, row.tasks.values())) for label, row in found.plans]
        html += _numbers("right answers", ["right answers", *tasks], shares)
    return html


def _of_writing(answered: Answered) -> list[str]:
    drawn, greedy = answered.sampled, answered.greedy
    alike = greedy.median_tokens_alike
    return [
        _estimate(drawn.log_probability, ".2f"),
        _estimate(drawn.kl, ".3f"),
        _estimate(greedy.log_probability, ".2f"),
        *map(_percent, (greedy.repeated_4_grams, greedy.loops, drawn.ended, greedy.ended)),
        "" if alike is None else f"{alike:g}",
    ]


def _estimate(one: Estimate, form: str) -> str:
    return f"{one.value:{form}} ± {one.stderr:{form}}"


def _share(one: RightAnswers) -> str:
    return f"{_percent(one.value)} ({_percent(one.low)} to {_percent(one.high)})"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _row(label: str, cells: Iterable[str]) -> str:
    body = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f'<tr><th scope="row">{escape(label)}</th>{body}</tr>'


def _numbers(of: str, head: Iterable[str], rows: Iterable[str]) -> str:
    columns = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="table of {of}"><table>'
        f"<thead><tr>{columns}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def answers(found: Sequence[Answers]) -> str:
    """Show the answers of plans side by side; the first difference is marked."""
    return "".join(map(_answers, found))


def _answers(found: Answers) -> str:
    items = []
    for prompt, texts in found.prompts:
        columns = "".join(
            f"<figure><figcaption>{escape(label)}</figcaption>"
            f"<blockquote>{_against(text, texts[0]) if at else escape(text)}</blockquote></figure>"
            for at, (label, text) in enumerate(zip(found.labels, texts, strict=True))
        )
        items.append(f'<li><p class="prompt">{escape(prompt)}</p><div class="side">{columns}</div>')
    return (
        '<p class="lead">The word from which on an answer is another than in the first column is '
        f'underlined.{_notes([found.source])}</p><ol class="answers">{"".join(items)}</ol>'
    )


def _against(text: str, first: str) -> str:
    """Mark the word from which on an answer is another than the first plan's."""
    if text == first:
        return f'{escape(text)}<small class="same">word for word the same</small>'
    pairs = enumerate(zip(text, first, strict=False))
    at = next((at for at, (mine, other) in pairs if mine != other), min(len(text), len(first)))
    same, differs = text[: (cut := text.rfind(" ", 0, at) + 1)], text[cut:]
    word, space, rest = differs.partition(" ")
    return f"{escape(same)}<mark>{escape(word)}</mark>{escape(space + rest)}"


def commands(sources: Sequence[Source]) -> str:
    """List the commands that made the figures, in the order of their numbers."""
    items = []
    for at, source in enumerate(sources):
        notes = "".join(f"<li>{escape(note)}</li>" for note in source.notes)
        items.append(
            f'<li id="source-{at}">{_code(source.command)}'
            f"<ul><li>{escape(source.name)}; {escape(source.made)}</li>{notes}</ul></li>"
        )
    return f'<ol class="commands">{"".join(items)}</ol>'


def _cell(point: Point, measure: Measure) -> str:
    value = point.values.get(measure.key)
    return "" if value is None else escape(value.written(measure.form))


def _code(text: str) -> str:
    return f'<pre class="code" tabindex="0">{escape(text)}</pre>'


def _notes(sources: Iterable[int]) -> str:
    """Refer to commands by their numbers."""
    links = " ".join(f'<a href="#source-{at}">{at + 1}</a>' for at in sources)
    return f"<sup>{links}</sup>" if links else ""


def _made_by(point: Point, measures: Iterable[Measure]) -> str:
    """Refer to the commands that measured a point's values."""
    sources = {point.values[one.key].source for one in measures}
    return _notes(sorted(source for source in sources if source is not None))


def _direction(measure: Measure) -> str:
    return "↑" if measure.more_is_better else "↓"


def _names(point: Point) -> str:
    return "".join(f", {escape(name)}" for name in point.names)


def _mark(kind: str) -> str:
    return f'<span class="mark" aria-hidden="true">{MARKS[kind]}</span>'


def _class(kind: str) -> str:
    return f"kind-{kind.replace(' ', '-')}"
