"""What runs of `depthpar recover` won back, side by side: a table, one JSON, curves.

The runs are made by the command itself; see README.md here.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout: this is a script

import matplotlib

from vllm_depthpar.util import files, markdown

matplotlib.use("Agg")
from matplotlib import pyplot


def main() -> None:
    """Read, print a table, write the JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "runs", nargs="+", metavar="NAME=FILE", help="a name, and the recovery.json of a run"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON, and PNG")
    args = parser.parse_args()
    runs = {}
    for run in args.runs:
        name, _, path = run.partition("=")
        runs[name] = json.loads(Path(path).read_text())
    rows = []
    for name, record in runs.items():
        for text in record["quality"]["unmodified"]:
            found = {stage: record["quality"][stage][text] for stage in record["quality"]}
            rows.append(
                [
                    name,
                    text,
                    *(f"{of_stage['perplexity']:.2f}" for of_stage in found.values()),
                    f"{closed(record, text, 'refit'):.0%}",
                    f"{closed(record, text, 'end'):.0%}",
                    f"{found['plan']['kl']:.3f}",
                    f"{found['end']['kl']:.3f}",
                ]
            )
    header = ["run", "text", "unmodified", "plan", "refitted", "recovered"]
    header += ["gap closed: refit", "in the end", "KL: plan", "KL: recovered"]
    print(markdown.table(header, rows))
    files.write_json(args.out, runs)
    draw(runs, args.out.with_suffix(".png"))


def closed(record: dict[str, Any], text: str, stage: str) -> float:
    """The share of the gap in log-perplexity between plan and unmodified model that is gone."""
    loss = {
        stage: math.log(figures[text]["perplexity"]) for stage, figures in record["quality"].items()
    }
    return (loss["plan"] - loss[stage]) / (loss["plan"] - loss["unmodified"])


def draw(runs: dict[str, Any], path: Path) -> None:
    """Perplexity against tokens learned from, one panel a text."""
    texts = list(next(iter(runs.values()))["quality"]["unmodified"])
    figure, panels = pyplot.subplots(1, len(texts), figsize=(6 * len(texts), 4.5), squeeze=False)
    for panel, text in zip(panels[0], texts, strict=True):
        for name, record in runs.items():
            quality = record["quality"]
            points = [(0, quality["refit"][text]["perplexity"])]
            points += [(point["tokens"], point[text]["perplexity"]) for point in record["curve"]]
            (line,) = panel.plot(*zip(*points, strict=True), marker=".", label=name)
            panel.plot(0, quality["plan"][text]["perplexity"], "x", color=line.get_color())
        unmodified = next(iter(runs.values()))["quality"]["unmodified"][text]["perplexity"]
        panel.axhline(unmodified, color="gray", linestyle=":", label="unmodified")
        panel.set(title=text, xlabel="tokens learned from", ylabel="perplexity (×: the plan alone)")
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:.0f}")
        panel.yaxis.set_minor_formatter("{x:.0f}")
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
