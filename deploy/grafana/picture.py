"""Draws the dashboard without Grafana: python picture.py http://localhost:9090 --out dashboard.png

Asks a Prometheus every query of every panel, as Grafana would, and draws what it answers where the
dashboard places it. Exit code 1, with the queries' names, if any finds no data.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import sys
import time
import urllib.error
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter
from PIL import Image

from vllm_depthpar.launch.server import open_url
from vllm_depthpar.util.files import write_bytes

DASHBOARD = Path(__file__).parent / "dashboards/depthpar.json"
COLUMNS = 24
POINTS = 400  # of a line, at most
# Inches: one cell of Grafana's grid, and a panel's margins, the lower one with the legend in it.
CELL = (0.62, 0.28)
LEFT, RIGHT, TOP, BOTTOM = 0.62, 0.12, 0.3, 0.74
SMALL, LARGE = 7, 17
# Characters of a legend of which three stand beside each other.
NARROW = 24
# Grafana's units, with an SI prefix and without.
PREFIXED = {"s": "s", "bytes": "B"}
PLAIN = {"short": "", "reqps": "req/s"}


@dataclass(frozen=True)
class Line:
    """One of the series that a query finds: `points` are (minutes before the end as a negative
    number, value); there is one at least, and no value is NaN."""

    legend: str
    labels: Mapping[str, str]
    points: tuple[tuple[float, float], ...]

    @property
    def last(self) -> float:
        return self.points[-1][1]


def variables(dashboard: Mapping[str, Any], chosen: Iterable[str]) -> dict[str, str]:
    """The dashboard's variables by name: the values saved in it, or those `chosen` as NAME=VALUE.

    Raises:
        ValueError: the dashboard has no such variable.
    """
    values = {
        variable["name"]: variable["current"]["value"].replace("$__all", ".*")
        for variable in dashboard["templating"]["list"]
        if "current" in variable
    }
    for name, _, value in (one.partition("=") for one in chosen):
        if name not in values:
            raise ValueError(f"--set {name}: no such variable; allowed: {', '.join(values)}")
        values[name] = value
    return values


def fill(text: str, values: Mapping[str, str]) -> str:
    """A text of the dashboard with its variables filled in."""
    return re.sub(r"\$(\w+)", lambda name: values[name[1]], text)


def named(legend: str, labels: Mapping[str, str]) -> str:
    """A legend with the labels of one series filled in."""
    return re.sub(r"{{(\w+)}}", lambda label: labels.get(label[1], ""), legend).strip()


def lines(found: Iterable[Mapping[str, Any]], legend: str, end: float) -> list[Line]:
    """Prometheus's matrix, without what Grafana does not draw: values that are no numbers."""
    drawn = []
    for series in found:
        points = tuple(((at - end) / 60, float(value)) for at, value in series["values"])
        points = tuple(point for point in points if math.isfinite(point[1]))
        if points:
            drawn.append(Line(named(legend, series["metric"]), series["metric"], points))
    return drawn


def readable(value: float, unit: str) -> str:
    """A value with three digits, in one of Grafana's units."""
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit.startswith("suffix:"):
        return f"{value:.3g} {unit.removeprefix('suffix:')}"
    rounded = float(f"{value:.3g}")
    if unit in PREFIXED:
        return EngFormatter(PREFIXED[unit])(rounded)
    return f"{rounded:,g} {PLAIN[unit]}".strip()


def draw_timeseries(axes: Axes, shown: list[Line], unit: str) -> None:
    """Lines over minutes."""
    for line in shown:
        minutes, values = zip(*line.points, strict=True)
        axes.plot(minutes, values, marker=".", markersize=2, linewidth=1, label=line.legend)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: readable(value, unit)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} min"))
    axes.tick_params(labelsize=SMALL)
    axes.grid(alpha=0.3)
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(-0.12, -0.12),
        ncols=3 if max(len(line.legend) for line in shown) <= NARROW else 2,
        fontsize=SMALL,
        frameon=False,
        columnspacing=1,
        handlelength=1,
    )


def draw_stat(axes: Axes, shown: list[Line], unit: str) -> None:
    """The last values, large."""
    axes.axis("off")
    for at, line in enumerate(shown):
        x = (at + 0.5) / len(shown)
        axes.text(x, 0.55, readable(line.last, unit), fontsize=LARGE, ha="center", va="center")
        axes.text(x, 0.2, line.legend, fontsize=SMALL, ha="center")


def draw_bargauge(axes: Axes, shown: list[Line], unit: str) -> None:
    """The last values, as bars."""
    bars = axes.barh([line.legend for line in shown], [line.last for line in shown])
    axes.bar_label(bars, [readable(line.last, unit) for line in shown], fontsize=SMALL, padding=2)
    axes.invert_yaxis()
    axes.tick_params(labelsize=SMALL, bottom=False, labelbottom=False)
    axes.margins(x=0.1)
    # Names are longer than values.
    place = axes.get_position()
    axes.set_position((place.x0 + 0.06, place.y0, place.width - 0.06, place.height))


def draw_table(axes: Axes, shown: list[Line], unit: str) -> None:
    """The labels: a row for each series."""
    axes.axis("off")
    header = list(shown[0].labels)
    rows = [[line.labels.get(label, "") for label in header] for line in shown]
    table = axes.table(rows, colLabels=header, loc="upper center", cellLoc="left")
    table.auto_set_font_size(False)
    table.set_fontsize(SMALL)
    table.auto_set_column_width(range(len(header)))


DRAW = {
    "timeseries": draw_timeseries,
    "stat": draw_stat,
    "bargauge": draw_bargauge,
    "table": draw_table,
}


def picture(panels: list[dict[str, Any]], shown: Mapping[int, list[Line]]) -> Figure:
    """All panels in the dashboard's grid.

    Args:
        shown: the lines of a panel by its id.
    """
    last = panels[-1]["gridPos"]
    width, height = COLUMNS * CELL[0], (last["y"] + last["h"]) * CELL[1]
    figure = Figure(figsize=(width, height))
    for panel in panels:
        place = panel["gridPos"]
        x, top = place["x"] * CELL[0], height - place["y"] * CELL[1]
        if panel["type"] == "row":
            figure.text(0.1 / width, (top - CELL[1]) / height, panel["title"], weight="bold")
            continue
        bottom = top - place["h"] * CELL[1]
        inside = (
            (x + LEFT) / width,
            (bottom + BOTTOM) / height,
            (place["w"] * CELL[0] - LEFT - RIGHT) / width,
            (place["h"] * CELL[1] - TOP - BOTTOM) / height,
        )
        axes = figure.add_axes(inside)
        axes.set_title(panel["title"], fontsize=9, loc="left")
        if shown[panel["id"]]:
            DRAW[panel["type"]](axes, shown[panel["id"]], panel["fieldConfig"]["defaults"]["unit"])
        else:
            axes.axis("off")
            axes.text(0.5, 0.5, "No data", ha="center")
    return figure


def png(figure: Figure) -> bytes:
    """In 64 colours, a quarter of the size: lines need no more."""
    drawn, content = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=100)
    few = Image.open(drawn).convert("RGB").quantize(64, Image.Quantize.MAXCOVERAGE)
    few.save(content, "PNG", optimize=True)
    return content.getvalue()


def ask(server: str, **query: str | float) -> list[dict[str, Any]]:
    """Prometheus's answer to a range query: a matrix.

    Raises:
        OSError: it does not answer, or refuses the query.
    """
    try:
        with open_url(f"{server}/api/v1/query_range?{urlencode(query)}", timeout=60) as reply:
            found: list[dict[str, Any]] = json.load(reply)["data"]["result"]
    except urllib.error.HTTPError as error:
        raise OSError(f"{server}: {error}: {error.read().decode(errors='replace')}") from error
    except urllib.error.URLError as error:
        raise OSError(f"{server} does not answer: {error.reason}") from error
    return found


def main() -> None:
    """Ask, draw, say what is missing."""
    args = _parser().parse_args()
    dashboard = json.loads(DASHBOARD.read_text())
    every, end = args.scrape_interval, args.until or time.time()
    step = max(every, round(60 * args.minutes / POINTS))
    # Grafana's rule: no scrape between two points is left out, and some may fail.
    interval = max(4 * every, step + every)
    values = {**variables(dashboard, args.set), "__rate_interval": f"{interval}s"}
    shown: dict[int, list[Line]] = {}
    missing = []
    for panel in dashboard["panels"]:
        panel["title"] = fill(panel["title"], values)
        shown[panel["id"]] = []
        for target in panel.get("targets", []):
            start = end if target["instant"] else end - 60 * args.minutes
            query = fill(target["expr"], values)
            found = lines(
                ask(args.prometheus, query=query, start=start, end=end, step=step),
                fill(target["legendFormat"], values),
                end,
            )
            shown[panel["id"]] += found
            if not found:
                missing.append(f"{panel['title']}: {query}")
    write_bytes(args.out, png(picture(dashboard["panels"], shown)))
    if missing:
        sys.exit("\n".join(["no data:", *missing]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Draw the dashboard from a Prometheus's answers.")
    parser.add_argument("prometheus", help="its address, http://localhost:9090")
    parser.add_argument("--out", type=Path, default=Path("dashboard.png"), help="(dashboard.png)")
    parser.add_argument("--minutes", type=float, default=5, help="to look back (5)")
    parser.add_argument("--until", type=float, metavar="TIME", help="Unix time of the end (now)")
    parser.add_argument(
        "--scrape-interval", type=int, default=15, metavar="SECONDS", help="of the Prometheus (15)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a dashboard's variable"
    )
    return parser


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
