"""What the rounds of a `depthpar bench` say: summaries, and a report in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_depthpar.bench.memory import MIB
from vllm_depthpar.bench.rounds import spread, summary, written
from vllm_depthpar.bench.settings import LATENCY, PARTS, SERVING, THROUGHPUT, Load
from vllm_depthpar.launch.variants import PLAIN
from vllm_depthpar.util.markdown import table


@dataclass(frozen=True)
class Figure:
    """One thing that is measured of a load.

    Attributes:
        key: its name in a record; a speed if it is per second, else a time.
        title: for people, with its unit.
        form: how many digits.
    """

    key: str
    title: str
    form: str = ".1f"

    def speedup(self, both: Iterable[tuple[float, float]]) -> dict[str, float] | None:
        """Summarize how many times as fast as the baseline it was.

        Args:
            both: its values, mine and the baseline's, a pair a round.

        Returns:
            Of the rounds that can tell, None if none can: vLLM's load generator has a TPOT of 0
            where an answer of few tokens came in one piece.
        """
        per_second = self.key.endswith("_per_second")
        ratios = [
            mine / baseline if per_second else baseline / mine
            for mine, baseline in both
            if mine and baseline
        ]
        return summary(ratios) if ratios else None


_TIMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2EL"}
FIGURES = {
    LATENCY: (Figure("ttft_ms", "TTFT, ms"), Figure("tpot_ms", "TPOT, ms", ".2f")),
    THROUGHPUT: (
        Figure("decode_tokens_per_second", "decode, tokens/s"),
        Figure("prefill_tokens_per_second", "prefill, tokens/s"),
    ),
    SERVING: (
        Figure("requests_per_second", "requests/s", ".2f"),
        Figure("tokens_per_second", "tokens/s"),
        *(
            Figure(f"{statistic}_{name}_ms", f"{title} {statistic}, ms")
            for name, title in _TIMES.items()
            for statistic in ("median", "p99")
        ),
    ),
}
# What the picture shows of a part.
SHOWN = {
    LATENCY: ("ttft_ms", "tpot_ms"),
    THROUGHPUT: ("decode_tokens_per_second", "prefill_tokens_per_second"),
    SERVING: ("tokens_per_second", "median_ttft_ms", "median_tpot_ms"),
}


def summarize(record: Mapping[str, Any], loads: Iterable[Load]) -> dict[str, Any]:
    """Medians and spreads over the rounds of a record.

    Returns:
        `baseline`: plain vLLM, or the first variant where it is not among them. `loads`: {load's
        key: {variant: {figure: {"median", "min", "max", "speedup"}}}}; a speed-up has its own
        median and spread, over ratios taken within a round, and is above 1 for what is faster; None
        where a figure of 0 can't tell.
    """
    labels = [one["label"] for one in record["variants"]]
    baseline = PLAIN if PLAIN in labels else labels[0]
    found: dict[str, Any] = {}
    for load in loads:
        rounds = record["stages"][load.stage]["rounds"]
        found[load.key] = {
            label: {
                figure.key: {
                    **summary([one[label][load.key][figure.key] for one in rounds]),
                    "speedup": figure.speedup(
                        (one[label][load.key][figure.key], one[baseline][load.key][figure.key])
                        for one in rounds
                    ),
                }
                for figure in FIGURES[load.part]
            }
            for label in labels
        }
    return {"baseline": baseline, "loads": found}


def title(record: Mapping[str, Any]) -> str:
    """Say what was measured, on one line."""
    settings = record["settings"]
    mode = "eager" if settings["eager"] else "compiled"
    return f"{record['model']}, TP {settings['tp']}, dtype {settings['dtype']}, {mode}"


def markdown(record: Mapping[str, Any], loads: Sequence[Load]) -> str:
    """Write the report: what was compared, then for each part what was measured and the speed-ups.

    Args:
        record: with its `summary`, and perhaps `predicted`: {load's key: {variant: speed-up of
            decoding}}.
    """
    where = record["hardware"]
    machine = f"{record['cpu']}, {where['cores']} cores, {where['threads']} threads"
    if "gpus" in where:
        gpus = f"{len(where['gpus'])} x {where['gpus'][0]}"
        machine = f"{gpus}, driver {where['driver']}, CUDA {where['cuda']}; {machine}"
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    rounds = max(len(stage["rounds"]) for stage in record["stages"].values())
    parts = [
        "# Plans side by side",
        f"{title(record)}, {record['settings']['output_len']} tokens an answer. {rounds} rounds, "
        f"median (min to max). A speed-up is taken within a round, against "
        f"{record['summary']['baseline']}; above 1 is faster.",
        f"{machine}. {versions}. {record['date']}, {record['seconds'] / 60:.0f} minutes.",
        f"    {record['command']}",
        "## Variants",
        _variants(record),
    ]
    for part in PARTS:
        of_part = [load for load in loads if load.part == part]
        if of_part:
            parts += [f"## {part.capitalize()}", _measured(record, part, of_part)]
            if len(record["variants"]) > 1:
                parts.append(_speedups(record, part, of_part))
    return "\n\n".join(parts) + "\n"


def _variants(record: Mapping[str, Any]) -> str:
    rows = []
    for one in record["variants"]:
        for name, stage in record["stages"].items():
            label = one["label"]
            starts = [start for start in stage["starts"] if start["label"] == label]
            if not starts:
                continue
            read = [s["weights_seconds"] for s in starts if s["weights_seconds"] is not None]
            gpu = [
                figures["gpu_bytes"] / MIB
                for found in stage["rounds"]
                for figures in found[label].values()
                if "gpu_bytes" in figures
            ]
            rows.append(
                [
                    f"`{label}`",
                    one["plan"],
                    name.removesuffix("s"),
                    spread([start["seconds"] for start in starts], ".1f"),
                    spread(read) if read else "",
                    spread([start["peak_bytes"] / MIB for start in starts], ".0f"),
                    f"{max(gpu):.0f}" if gpu else "",
                ]
            )
    header = ["plan", "blocks", "as", "start, s", "reading weights, s", "peak memory, MiB"]
    header.append("GPU peak, MiB")
    keep = [at for at in range(len(header)) if any(row[at] for row in rows)]
    note = (
        "Start: until it is ready. Peak memory: anonymous memory of all its processes while it "
        "starts, KV cache included."
    )
    cells = [[row[at] for at in keep] for row in rows]
    return f"{table([header[at] for at in keep], cells)}\n\n{note}"


def _measured(record: Mapping[str, Any], part: str, loads: Sequence[Load]) -> str:
    rows = [
        [
            load.name,
            f"`{one['label']}`",
            *(
                written(record["summary"]["loads"][load.key][one["label"]][figure.key], figure.form)
                for figure in FIGURES[part]
            ),
        ]
        for load in loads
        for one in record["variants"]
    ]
    return table(["prompt", "plan", *(figure.title for figure in FIGURES[part])], rows)


def _speedups(record: Mapping[str, Any], part: str, loads: Sequence[Load]) -> str:
    titles = [figure.title.partition(",")[0] for figure in FIGURES[part]]
    rows = []
    predicted = record.get("predicted", {})
    for load in loads:
        for label, figures in record["summary"]["loads"][load.key].items():
            if label != record["summary"]["baseline"]:
                ratios = [figures[figure.key]["speedup"] for figure in FIGURES[part]]
                cells = [written(one) if one else "" for one in ratios]
                if part == THROUGHPUT and predicted:
                    cells.append(f"{predicted[load.key][label]:.2f}")
                rows.append([load.name, f"`{label}`", *cells])
    if part == THROUGHPUT and predicted:
        titles.append("decode, predicted")
    return table(["prompt", "plan", *(f"{title}, speed-up" for title in titles)], rows)
