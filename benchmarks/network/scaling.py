"""Decode time against what the cost model says it depends on, one thing at a time.

Layers in pairs, tensor-parallel ranks, batch and context, around one centre: one sequence with 128
tokens on one rank. The predictions are those of `depthpar predict --calibrate` on the same machine,
for each number of ranks: nothing is fitted on what is measured here.

The model has SmolLM2's sizes and dummy weights, but 12 heads and 12 KV heads of 64, which 1 to 4
ranks can share. Every rank has one thread. Ranks that outnumber the cores take turns on them, and
are predicted as if each had its share of a core. They reduce over vLLM's shared memory where its
build has that, as on CPUs with AVX-512, else over the host's loopback.

Engines are alive together in lots, all but the one that is measured stopped. Every figure is
written down as it comes: a run that was ended goes on where it was, and a report has what is there.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import threading
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout: this is a script

from matplotlib.figure import Figure

from benchmarks import common
from benchmarks.cost_model import shapes
from benchmarks.serving import completions_client
from vllm_depthpar.bench import memory
from vllm_depthpar.bench.rounds import awake, in_turn, pause, summary, written
from vllm_depthpar.bench.settings import THROUGHPUT, BenchSettings, Load, Setup
from vllm_depthpar.bench.stages import Engines
from vllm_depthpar.bench.turns import Steps, steps
from vllm_depthpar.cli.types import at_least
from vllm_depthpar.launch import hardware
from vllm_depthpar.launch.engine import Worker, call
from vllm_depthpar.launch.server import HOST, free_port
from vllm_depthpar.launch.variants import PLAIN, Variant
from vllm_depthpar.plan import resolve
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.predict import calibrate
from vllm_depthpar.predict.cost_model import step_time
from vllm_depthpar.predict.links import LINKS
from vllm_depthpar.predict.machines import Deployment, Device, Link, Workload
from vllm_depthpar.util import files, markdown, plots
from vllm_depthpar.util.result_cache import Journal

CONFIG = shapes.config("smollm2-135m") | {
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "torch_dtype": "float32",
}
SHAPE = ModelShape.from_config(CONFIG)
# Of an answer: so many steps but one are timed.
TOKENS = 16
# Tokens in a block of the KV cache: every prompt but its last token fills some, so that it is
# prefilled once for all rounds.
BLOCK = 32
MOST_ROUNDS = 99
# In the journal: whether ranks reduce over shared memory, and the round trip of a message if not.
SHARED_MEMORY, LOOPBACK = "shared memory", "loopback"


@dataclass(frozen=True)
class Point:
    """One thing to measure: the first `paired` layers in pairs, and how it is run."""

    tp: int
    paired: int
    batch: int
    context: int

    @property
    def prompt(self) -> int:
        """Its tokens. The last one is always computed, and ends no block of the KV cache."""
        return self.context + 1

    @property
    def label(self) -> str:
        """The plan."""
        return f'{{"pair": [0, {self.paired}]}}' if self.paired else PLAIN


@dataclass(frozen=True)
class Sweep:
    """What is measured together: engines of so many ranks, and their loads."""

    tp: int
    paired: tuple[int, ...]
    batches: tuple[int, ...] = (1,)
    contexts: tuple[int, ...] = (128,)

    def points(self) -> list[Point]:
        """All of them, load by load."""
        return [
            Point(self.tp, paired, batch, context)
            for batch, context, paired in product(self.batches, self.contexts, self.paired)
        ]

    def setup(self, model: str) -> Setup:
        """For engines that get all loads."""
        settings = BenchSettings(
            parts=(THROUGHPUT,),
            output_len=TOKENS,
            batches=self.batches,
            contexts=tuple(context + 1 for context in self.contexts),
            tp=self.tp,
            dtype="float32",
            load_format="dummy",
            eager=True,
            engine_args=("--enable-prefix-caching", "--block-size", f"{BLOCK}"),
        )
        return Setup(model, CONFIG, settings, settings.loads(), gpu_share=None)


FEW = (0, 16, SHAPE.layers)
MANY = (*range(0, SHAPE.layers, 4), SHAPE.layers)
SWEEPS = {
    "paired-1": Sweep(1, MANY),
    "paired-2": Sweep(2, MANY[::2]),
    "batch": Sweep(1, FEW, batches=(1, 2, 4, 8, 16, 32, 64)),
    "context": Sweep(1, FEW, contexts=(128, 256, 512, 1024, 2048, 4096)),
    "ranks-3": Sweep(3, FEW),
    "ranks-4": Sweep(4, FEW),
}


@dataclass(frozen=True)
class Axis:
    """Decode time against one number of a point, in series by another.

    Attributes:
        sweeps: where its points are measured.
        paired: of them those with so many layers in pairs.
    """

    title: str
    x: str
    series: str
    sweeps: tuple[str, ...]
    paired: tuple[int, ...] = FEW

    def points(self) -> list[tuple[str, Point]]:
        """Each with its sweep."""
        return [
            (sweep, point)
            for sweep in self.sweeps
            for point in SWEEPS[sweep].points()
            if point.paired in self.paired
        ]


AXES = {
    "paired": Axis("layers in pairs", "paired", "tp", ("paired-1", "paired-2"), MANY),
    "ranks": Axis("ranks", "tp", "paired", ("paired-1", "paired-2", "ranks-3", "ranks-4")),
    "batch": Axis("sequences", "batch", "paired", ("batch",)),
    "context": Axis("tokens of a sequence in the KV cache", "context", "paired", ("context",)),
}
SERIES = {"tp": "TP = {}", "paired": "{} layers in pairs"}


def main() -> None:
    """Measure what is missing, print tables, write JSON and PNG."""
    args = _parser().parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    facts = common.facts()
    journal = Journal(["scaling", CONFIG, TOKENS, facts["versions"], facts["cpu"]])
    if SHARED_MEMORY not in journal:
        journal.add({SHARED_MEMORY: call(_reduces_over_shared_memory)})
    if LOOPBACK not in journal:
        journal.add({LOOPBACK: _loopback()})
    for name in args.sweeps:
        measure(name, args.rounds, journal)
    axes = {name: judged(axis, journal) for name, axis in AXES.items()}
    report = {**facts, "model": CONFIG}
    report |= {name: journal[name] for name in (SHARED_MEMORY, LOOPBACK)}
    report["machine"] = {tp: journal[_rank(tp)] for tp in (1, 2, 3, 4) if _rank(tp) in journal}
    report["axes"] = axes = {name: axis for name, axis in axes.items() if axis["points"]}
    for name, axis in axes.items():
        print(f"\nAgainst {AXES[name].title}: {said(axis)}\n\n{table(AXES[name], axis)}")
    if args.out:
        files.write_json(args.out, report)
        plot(axes, journal, args.out.with_suffix(".png"))


def measure(name: str, rounds: int, journal: Journal) -> None:
    """What the journal lacks of a sweep, the calibration for its ranks among it."""
    sweep = SWEEPS[name]
    missing = [
        point
        for point in sweep.points()
        if any(_key(name, point, number) not in journal for number in range(rounds))
    ]
    labels = list(dict.fromkeys(point.label for point in missing))
    total = 1 + 2 * len(labels) + rounds * len(missing)
    with steps(total, name) as bar, tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        if _rank(sweep.tp) not in journal:
            with bar.doing("calibrating"):
                journal.add(
                    {_rank(sweep.tp): asdict(calibrate.measure(SHAPE, sweep.tp, eager=True))}
                )
        if not missing:
            return
        files.write_json(Path(folder, "config.json"), CONFIG)
        setup = sweep.setup(folder)
        chosen = [one for one in common.beside_plain(folder, labels) if one.label in labels]
        alive = memory.fitting({one.label: setup.memory_bytes(one) for one in chosen})
        lots = -(-len(chosen) // alive)
        # Neighbours are in different lots: what changes between lots must bend no curve.
        for lot in (chosen[at::lots] for at in range(lots)):
            in_lot = {one.label for one in lot}
            points = [point for point in missing if point.label in in_lot]
            _measure_lot(name, setup, lot, points, rounds, journal, bar)


def _measure_lot(
    name: str,
    setup: Setup,
    variants: list[Variant],
    points: list[Point],
    rounds: int,
    journal: Journal,
    bar: Steps,
) -> None:
    """Points whose engines are alive at once, in turns within every round of a load."""
    engines = Engines(setup)
    with ExitStack() as stack:
        running: dict[str, Worker] = {}
        for one in variants:
            with bar.doing(f"starting {one.label}"):
                running[one.label], _ = engines.start(one, stack)
            pause(running[one.label])
        # The largest load, uncounted: its prompts, of which all others' are beginnings, stay in the
        # KV cache.
        for label, engine in running.items():
            with bar.doing(f"{label}, prefill", engine):
                _step_seconds(engines, engine, setup.loads[-1])
        for number, load in product(range(rounds), setup.loads):
            turns = [p for p in points if (p.batch, p.prompt) == (load.batch, load.prompt_tokens)]
            for point in in_turn(turns, number):
                if (key := _key(name, point, number)) not in journal:
                    engine = running[point.label]
                    with bar.doing(f"{point.label}, {load.name}", engine):
                        journal.add({key: _step_seconds(engines, engine, load)})


def _step_seconds(engines: Engines, running: Worker, load: Load) -> float:
    """Of a step in which all sequences get a token."""
    with awake(running):
        found = engines.measure(running, load, seed=0)
    return load.batch / found["decode_tokens_per_second"]


def _reduces_over_shared_memory() -> bool:
    from vllm_depthpar import vllm_compat

    return vllm_compat.has_shared_memory_all_reduce()


def _loopback() -> float:
    """Seconds that a message takes there and back."""
    address = (HOST, free_port())
    threading.Thread(target=completions_client.echo, args=address, daemon=True).start()
    return completions_client.round_trip(*address)


def _key(sweep: str, point: Point, number: int) -> str:
    return f"{sweep}, {point}, {number}"


def _rank(tp: int) -> str:
    return f"calibration, TP = {tp}"


def predicted(point: Point, journal: Journal) -> float:
    """Seconds of a step, by the machine that was calibrated."""
    fields = journal[_rank(point.tp)]
    device = Device(**{**fields, "flops": tuple(map(tuple, fields["flops"]))})
    plan = resolve({"pair": [0, point.paired]} if point.paired else "identity", SHAPE.layers)
    rank = shared(device, min(1.0, hardware.CORES / point.tp))
    deployment = Deployment(rank, _link(journal) if point.tp > 1 else None, point.tp)
    workload = Workload(point.batch, point.context + TOKENS // 2)
    return step_time(SHAPE, plan, deployment, workload, plain=not point.paired).seconds


def shared(device: Device, share: float) -> Device:
    """A rank that has only this share of its core."""
    return replace(
        device,
        memory_bandwidth=share * device.memory_bandwidth,
        flops=tuple((rows, share * rate) for rows, rate in device.flops),
        layer_seconds=device.layer_seconds / share,
        reduce_seconds=device.reduce_seconds / share,
        plain_reduce_seconds=device.plain_reduce_seconds / share,
    )


def _link(journal: Journal) -> Link:
    """Between the ranks; on the loopback what counts is the ranks' own work."""
    if journal[SHARED_MEMORY]:
        return LINKS["shm"]
    return Link("loopback", journal[LOOPBACK] / 2, math.inf)


def judged(axis: Axis, journal: Journal) -> dict[str, Any]:
    """The points of an axis that were measured, what was predicted, and the errors: predicted over
    measured, less 1."""
    points = []
    for sweep, point in axis.points():
        keys = [_key(sweep, point, number) for number in range(MOST_ROUNDS)]
        if seconds := [journal[key] for key in keys if key in journal]:
            says = predicted(point, journal)
            error = says / statistics.median(seconds) - 1
            points.append(
                {
                    **asdict(point),
                    "seconds": summary(seconds),
                    "rounds": seconds,
                    "predicted": says,
                    "error": error,
                }
            )
    sizes = [abs(point["error"]) for point in points]
    errors = {"mean_error": statistics.mean(sizes), "worst_error": max(sizes)} if sizes else {}
    return {**errors, "points": points}


def said(axis: dict[str, Any]) -> str:
    """Mean and largest error, for people."""
    return f"mean error {axis['mean_error']:.1%}, largest {axis['worst_error']:.1%}"


def table(axis: Axis, found: dict[str, Any]) -> str:
    """Milliseconds of a step, Markdown: measured (spread), predicted (error)."""
    cells = {}
    for point in found["points"]:
        spread = written({name: 1e3 * value for name, value in point["seconds"].items()}, ".1f")
        says = f"{1e3 * point['predicted']:.1f} ({point['error']:+.0%})"
        cells[point[axis.x], point[axis.series]] = f"{spread}, {says}"
    columns = list(dict.fromkeys(series for _, series in cells))
    return markdown.table(
        [axis.title, *(SERIES[axis.series].format(one) for one in columns)],
        [
            [f"{x}", *(cells.get((x, one), "") for one in columns)]
            for x in dict.fromkeys(x for x, _ in cells)
        ],
    )


def plot(axes: dict[str, Any], journal: Journal, path: Path) -> None:
    """Medians with their spread, and what the model says as lines: a panel for each axis."""
    figure = Figure(figsize=(12, 8.4), layout="constrained")
    for place, (name, found) in enumerate(axes.items(), start=1):
        axis, panel = AXES[name], figure.add_subplot(2, 2, place)
        series = dict.fromkeys(point[axis.series] for point in found["points"])
        for colour, one in enumerate(series):
            points = [point for point in found["points"] if point[axis.series] == one]
            x = [point[axis.x] for point in points]
            median, low, high = (
                [1e3 * point["seconds"][which] for point in points]
                for which in ("median", "min", "max")
            )
            panel.errorbar(
                x,
                median,
                (
                    [m - a for m, a in zip(median, low, strict=True)],
                    [b - m for m, b in zip(median, high, strict=True)],
                ),
                fmt="o",
                color=f"C{colour}",
                capsize=3,
                label=f"{SERIES[axis.series].format(one)}: measured",
            )
            at = Point(**{field: points[0][field] for field in Point.__annotations__})
            line = _line(axis, min(x), max(x))
            panel.plot(
                line,
                [1e3 * predicted(replace(at, **{axis.x: value}), journal) for value in line],
                color=f"C{colour}",
                label="predicted",
            )
        if axis.x in ("batch", "context"):
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter("{x:.0f}")
        else:
            panel.set_xticks(x)
        panel.set_ylim(bottom=0)
        panel.set(xlabel=axis.title, ylabel="milliseconds of a decoding step")
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small", ncols=2)
    figure.suptitle("Measured, and predicted by the calibrated cost model")
    plots.save(figure, path)


def _line(axis: Axis, low: int, high: int) -> list[int]:
    """Where a prediction is drawn: also between points, where that means something."""
    step = {"paired": 2, "tp": 1, "batch": 1, "context": 32}[axis.x]
    return list(range(low, high + 1, step))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Decode time, measured and predicted.")
    parser.add_argument(
        "--sweeps",
        nargs="*",
        choices=SWEEPS,
        default=list(SWEEPS),
        metavar="SWEEP",
        help=f"what to measure now, of {', '.join(SWEEPS)} (all); the report has all there is",
    )
    parser.add_argument("--rounds", type=at_least(1), default=5, help="(5)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON, and a PNG beside it")
    return parser


if __name__ == "__main__":
    common.run_main(main)
