"""The page: one file that asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from html import escape
from importlib import resources
from pathlib import Path

from vllm_depthpar.report import sections
from vllm_depthpar.report.data import KINDS, Measure, Page, Point, front
from vllm_depthpar.util import files

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
"""


def html(page: Page) -> str:
    """Write a page as one HTML file: styles, scripts and numbers inside, and a policy that lets a
    browser load nothing and run nothing else."""
    title = escape(f"Plans for {page.model}")
    scripts = [_static("d3.min.js"), _static("page.js")] if page.quality else []
    head = _HEAD.format(policy=policy(scripts), title=title, style=_static("page.css"))
    parts = [
        f"<header><h1>{title}</h1>{_summary(page)}</header>",
        _plot(page) if page.quality else "",
        _section("numbers", "Numbers", sections.points_table(page)),
        _section("recovery", "Before and after recovery", sections.recoveries(page.recoveries)),
        _section("generation", "While generating", sections.generations(page.generations)),
        _section("answers", "Answers", sections.answers(page.answers)),
        _section("plans", "Plans", sections.plans(page)),
        _section("commands", "The commands that made the figures", sections.commands(page.sources)),
    ]
    code = "".join(f"<script>{script}</script>\n" for script in scripts)
    return f"{head}<body>\n<main>\n{''.join(parts)}</main>\n{code}</body>\n</html>\n"


def write(path: Path, page: Page) -> None:
    """Write a page into a file.

    Raises:
        UserError: it can't be written.
    """
    # Half a character, which JSON can name, is nothing that a file could hold.
    files.write_bytes(path, html(page).encode(errors="replace"))


def policy(scripts: list[str]) -> str:
    """Write a Content-Security-Policy: nothing is loaded, and of scripts only these run."""
    hashes = [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts
    ]
    allowed = " ".join(f"'sha256-{one}'" for one in hashes) or "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; base-uri 'none'; "
        f"form-action 'none'"
    )


def plot_data(page: Page) -> dict[str, object]:
    """Collect what the script draws, JSON-ready."""
    speeds = [one for one in page.speed if one.plotted]
    qualities = [one for one in page.quality if one.plotted]
    return {
        "kinds": list(KINDS),
        "speed": [_measure(one) for one in speeds],
        "quality": [_measure(one) for one in qualities],
        "points": [_point(one, [*speeds, *qualities]) for one in page.points],
        "fronts": {
            f"{speed.key}|{quality.key}": front(page.points, speed, quality)
            for speed in speeds
            for quality in qualities
        },
        "chosen": page.chosen,
    }


def _measure(one: Measure) -> dict[str, object]:
    return {"key": one.key, "title": one.title, "more": one.more_is_better}


def _point(point: Point, measures: list[Measure]) -> dict[str, object]:
    values = {
        one.key: {
            "value": found.value,
            "low": found.low,
            "high": found.high,
            "text": found.written(one.form),
        }
        for one in measures
        if (found := point.values.get(one.key)) is not None
    }
    return {
        "label": point.label,
        "kind": point.kind,
        "before": point.before,
        "values": values,
    }


def _summary(page: Page) -> str:
    count = len(page.points)
    notes = "; ".join(note for source in page.sources[:1] for note in source.notes[:1])
    return f'<p class="lead">{count} plans. {escape(notes)}</p>'


def _section(name: str, title: str, content: str) -> str:
    if not content:
        return ""
    return (
        f'<section id="{name}" aria-labelledby="{name}-title">'
        f'<h2 id="{name}-title">{title}</h2>{content}</section>\n'
    )


def _plot(page: Page) -> str:
    data = json.dumps(plot_data(page), separators=(",", ":"))
    quality = _select("quality", "Quality", [one for one in page.quality if one.plotted])
    speed = _select("speed", "Speed", [one for one in page.speed if one.plotted])
    return (
        '<section id="plot" aria-labelledby="plot-title"><h2 id="plot-title">Quality against speed'
        "</h2><noscript><p>Without scripts there is no plot; the same numbers are below.</p>"
        f'</noscript><div class="panels"><div class="chart">{quality}<div id="canvas"></div>'
        f"{speed}{sections.legend(page.points)}"
        '<p class="help">Lower right is better. A point shows its plan when it is clicked; with '
        "the keyboard: arrow keys, Enter.</p></div>"
        '<aside id="selected" aria-live="polite" aria-label="the selected plan"></aside></div>'
        # No sign that could end the element is left in it.
        f'<script type="application/json" id="plot-data">{data.replace("<", chr(92) + "u003c")}'
        "</script></section>\n"
    )


def _select(name: str, label: str, measures: list[Measure]) -> str:
    options = "".join(
        f'<option value="{at}">{escape(one.title)} {"↑" if one.more_is_better else "↓"}'
        f"{''.join(f' [{source + 1}]' for source in one.sources)}</option>"
        for at, one in enumerate(measures)
    )
    return f'<label class="axis axis-{name}">{label} <select id="{name}">{options}</select></label>'


@cache
def _static(name: str) -> str:
    return (resources.files("vllm_depthpar.report") / "static" / name).read_text()
