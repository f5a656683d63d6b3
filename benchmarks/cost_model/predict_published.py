"""The cost model against published speeds of ladders and parallel layers on GPUs.

The numbers and their sources are in `published.json`. Constants are fitted on rows of Llama 3 70B
without a plan, the authors' "standard" (NVLink and without peer to peer) and "upper bound" (no
communication), with one exception: the share of an all-reduce that a GPU can compute in shows in
ladders alone, and is fitted on those over NVLink. Judged are the ladders without peer to peer, and
all of other models; and the authors' "parallel" variant (attention and MLP of a layer side by side,
one all-reduce for both), which has the constants of no row.

Three ways to say what a hidden all-reduce costs are compared: nothing; a launch; a share of its
time, because its kernel takes multiprocessors from those that compute.
`vllm_depthpar.predict.devices` and `links` have the constants of the last.

Not predicted: models across two hosts, whose link nobody describes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout: this is a script

from benchmarks import common
from benchmarks.cost_model.fitting import fit
from vllm_depthpar.plan import resolve
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.plan.published_shapes import config_named
from vllm_depthpar.predict.cost_model import plain_time, speedup, step_time
from vllm_depthpar.predict.devices import DEVICES
from vllm_depthpar.predict.links import LINKS
from vllm_depthpar.predict.machines import Deployment, Device, Link, Workload
from vllm_depthpar.util import files, markdown
from vllm_depthpar.util.provenance import origin

PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text())
LADDER = PUBLISHED["ladder_residual"]
STANDARD, LADDERS, UPPER, PARALLEL = "standard", "ladder", "upper bound", "parallel"
NVLINK, P2P_OFF = "nvlink", "p2p off"
PEAK = Device("H100 data sheet", 3.35e12, ((1, 989e12),))
START = {
    "bandwidth_achieved": 0.9,
    "flops_achieved": 0.5,
    "layer_seconds": 4e-5,
    "nvlink_latency": 1e-5,
    "nvlink_peer": 1.5e-6,
    "nvlink_bandwidth": 3e11,
    "p2p_off_latency": 2e-5,
    "p2p_off_peer": 7e-6,
    "p2p_off_bandwidth": 2e11,
}
# One launch of a kernel from a CUDA graph, roughly.
LAUNCH_SECONDS = 5e-6
WAYS = {
    "a hidden all-reduce is free": {"reduce_seconds": 0.0, "overlap": 1.0},
    "it costs a launch, 5 us": {"reduce_seconds": LAUNCH_SECONDS, "overlap": 1.0},
    "it takes a share of the processor": {"reduce_seconds": 0.0},
}
Constants = dict[str, float]
# The GPU and the link between, by the link's name in `published.json`.
Machine = Callable[[str], tuple[Device, Link]]


@dataclass(frozen=True)
class Row:
    """One published speed: tokens per second of a model in one of the variants."""

    model: str
    config: dict[str, int]
    link: str
    tp: int
    batch: int
    kind: str
    speed: float


@dataclass(frozen=True)
class Prediction:
    """A speed-up over the standard model, published and predicted."""

    model: str
    link: str
    tp: int
    batch: int
    kind: str
    published: float
    predicted: float

    @property
    def error(self) -> float:
        """Relative: 0.1 is 10 % too fast."""
        return self.predicted / self.published - 1


def rows() -> Iterator[Row]:
    """All published speeds of ladders, and of what stands beside them."""
    for link, batches in LADDER["tokens_per_second"].items():
        for batch, kinds in batches.items():
            for kind, speeds in kinds.items():
                for tp, speed in zip(LADDER["tp"], speeds, strict=True):
                    if speed is not None:
                        yield Row("70B", LADDER["config"], link, tp, int(batch), kind, speed)
    sizes = PUBLISHED["ladder_residual_sizes"]
    for one in sizes["rows"]:
        for kind in (STANDARD, LADDERS):
            where = (sizes["link"], sizes["tp"], sizes["batch"])
            yield Row(one["model"], one["config"], *where, kind, one[kind])


def presets(link: str) -> tuple[Device, Link]:
    """The machine as the package has it: these constants, rounded. The authors' all-reduces are
    NCCL's, not vLLM's."""
    return DEVICES["h100"], LINKS[{NVLINK: "nvlink4-nccl", P2P_OFF: "p2p-off"}[link]]


def machine(constants: Constants, link: str) -> tuple[Device, Link]:
    """The machine with these constants."""
    device = replace(
        PEAK,
        memory_bandwidth=constants["bandwidth_achieved"] * PEAK.memory_bandwidth,
        flops=tuple((rows, constants["flops_achieved"] * rate) for rows, rate in PEAK.flops),
        layer_seconds=constants["layer_seconds"],
        reduce_seconds=constants["reduce_seconds"],
        overlap=constants["overlap"],
    )
    name = link.replace(" ", "_")
    latency = constants[f"{name}_latency"]
    bandwidth, peer = constants[f"{name}_bandwidth"], constants[f"{name}_peer"]
    return device, Link(link, latency, bandwidth, peer)


def predicted_speed(row: Row, on: Machine) -> float:
    """Tokens per second as the authors count: of prefill and decoding together."""
    shape = ModelShape.from_config(row.config)
    return row.batch * LADDER["generated"] / _seconds(row, shape, *on(row.link))


def _seconds(row: Row, shape: ModelShape, device: Device, link: Link) -> float:
    prompt, generated = LADDER["prompt"], LADDER["generated"]
    if row.kind == PARALLEL:
        # One all-reduce a layer instead of two: half of what communication takes. (And fewer
        # kernels, which is left out.)
        sides = [replace(row, kind=kind) for kind in (STANDARD, UPPER)]
        return statistics.mean(_seconds(side, shape, device, link) for side in sides)
    plan = resolve({"ladder": "all"} if row.kind == LADDERS else "identity", shape.layers)
    deployment = Deployment(device, None if row.kind == UPPER else link, row.tp)
    prefill = step_time(shape, plan, deployment, Workload(row.batch, tokens=prompt)).seconds
    # Their attention copies every KV head for all its query heads, over a cache of full length.
    copies = shape.heads // shape.kv_heads
    cache = shape.kv_bytes_per_token(plan, row.tp) * row.batch * (prompt + generated)
    decode = step_time(shape, plan, deployment, Workload(row.batch)).seconds
    decode += (1 if copies == 1 else 1 + copies) * cache / device.memory_bandwidth
    return prefill + (generated - 1) * decode


def fitted(way: Constants) -> Constants:
    """Constants fitted on the rows of 70B that they may see."""
    known = [row for row in rows() if row.model == "70B" and row.kind in (STANDARD, UPPER)]
    start = dict(START)
    if "overlap" not in way:
        known += [
            row
            for row in rows()
            if row.model == "70B" and row.kind == LADDERS and row.link == NVLINK
        ]
        start["overlap"] = 0.8

    def residuals(one: Constants) -> list[float]:
        on = partial(machine, {**way, **one})
        return [math.log(predicted_speed(row, on) / row.speed) for row in known]

    found = fit(residuals, start)
    return {**way, **found}


def predictions(on: Machine) -> list[Prediction]:
    """Speed-ups over the standard model, all of them."""
    standard = {
        (row.model, row.link, row.tp, row.batch): row for row in rows() if row.kind == STANDARD
    }
    found = []
    for row in rows():
        if row.kind != STANDARD:
            beside = standard[row.model, row.link, row.tp, row.batch]
            found.append(
                Prediction(
                    row.model,
                    row.link,
                    row.tp,
                    row.batch,
                    row.kind,
                    row.speed / beside.speed,
                    predicted_speed(row, on) / predicted_speed(beside, on),
                )
            )
    return found


def judged(found: Iterable[Prediction], way: Constants) -> list[Prediction]:
    """Those among ladders and parallel layers that no constant was fitted on."""
    seen = "overlap" not in way
    return [
        one
        for one in found
        if one.kind == PARALLEL
        or (one.kind == LADDERS and not (seen and one.model == "70B" and one.link == NVLINK))
    ]


@dataclass(frozen=True)
class Known:
    """A published point of a known model, and what the model predicts of it.

    Attributes:
        depth: blocks of its plan.
        ratio: of pairs, layers over blocks: the limit in which nothing but the number of blocks
            counts.
        launches: predicted for a machine whose layers wait for Python to launch their kernels; None
            for code with CUDA graphs.
        graphs: predicted with CUDA graphs and vLLM's all-reduces.
        nccl: with NCCL's in their place, if that is what the authors had and could have.
        milliseconds: of a token of plain vLLM with CUDA graphs.
    """

    model: str
    plan: dict[str, Any]
    depth: int
    published: float
    ratio: float | None
    launches: float | None
    graphs: float
    nccl: float | None
    milliseconds: float


def known_points() -> list[Known]:
    """Layer Parallelism on two A100s, and the hybrid ladder on eight H100s."""
    lp, hybrid = PUBLISHED["layer_parallelism"], PUBLISHED["ladder_hybrid"]
    workload = Workload(context=lp["tokens"] // 2)
    device, link = DEVICES["a100-80g"], LINKS["nvlink3"]
    graphs = Deployment(device, link, lp["tp"])
    # The authors' code is eager: Python launches every kernel, and the GPU waits for it. In the
    # limit nothing but the number of layers counts.
    eager = Deployment(replace(device, layer_seconds=1.0), link, lp["tp"])
    found = [_known(one, workload, graphs, eager, None) for one in lp["points"]]
    workload = Workload(hybrid["batch"], context=LADDER["prompt"] + LADDER["generated"] // 2)
    nccl, vllm = (
        Deployment(DEVICES["h100"], LINKS[name], hybrid["tp"])
        for name in ("nvlink4-nccl", "nvlink4")
    )
    return [*found, _known(hybrid, workload, vllm, None, nccl)]


def _known(
    one: dict[str, Any],
    workload: Workload,
    graphs: Deployment,
    eager: Deployment | None,
    nccl: Deployment | None,
) -> Known:
    shape = ModelShape.from_config(config_named(one["model"]))
    plan = resolve(one["plan"], shape.layers)

    def on(deployment: Deployment | None) -> float | None:
        return None if deployment is None else speedup(shape, plan, deployment, workload)

    return Known(
        one["model"],
        one["plan"],
        plan.depth,
        one["speedup"],
        None if plan.ladder else shape.layers / plan.depth,
        on(eager),
        speedup(shape, plan, graphs, workload),
        on(nccl),
        1e3 * plain_time(shape, graphs, workload).seconds,
    )


def known_table(points: Iterable[Known]) -> str:
    """Markdown: a row a published point, speed-ups over the unmodified model."""

    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    header = ["model", "plan", "blocks", "published", "layers / blocks", "bound by launches"]
    header += ["CUDA graphs, vLLM's all-reduces", "NCCL's", "ms a token, plain"]
    rows = [
        [
            *(one.model, f"`{json.dumps(one.plan)}`", str(one.depth)),
            *map(cell, (one.published, one.ratio, one.launches, one.graphs, one.nccl)),
            cell(one.milliseconds),
        ]
        for one in points
    ]
    return markdown.table(header, rows)


def main() -> None:
    """Fit, predict, print tables, write the JSON."""
    parser = argparse.ArgumentParser(description="The cost model against published speeds.")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON")
    args = parser.parse_args()
    report: dict[str, Any] = {**origin(common.program()), "ways": {}}
    lines = []
    for name, way in WAYS.items():
        constants = fitted(way)
        on = partial(machine, constants)
        found = predictions(on)
        unseen = judged(found, way)
        report["ways"][name] = {
            "constants": constants,
            "predictions": [
                {**asdict(one), "error": one.error, "judged": one in unseen} for one in found
            ],
        }
        parts = {
            "70B ladders, NVLink": [
                one for one in found if _is(one, LADDERS, NVLINK) and one.model == "70B"
            ],
            "70B ladders, P2P off": [one for one in found if _is(one, LADDERS, P2P_OFF)],
            "other sizes' ladders": [one for one in found if one.model != "70B"],
            "parallel": [one for one in found if one.kind == PARALLEL],
            "upper bound (fitted)": [one for one in found if one.kind == UPPER],
        }
        lines.append([name, *(errors(part) for part in parts.values())])
    # Of the last way, which is the package's.
    report["speeds"] = [{**asdict(row), "predicted": predicted_speed(row, on)} for row in rows()]
    points = known_points()
    report["known_points"] = [asdict(one) for one in points]
    print("Errors of speed-ups over the standard model, mean (largest):\n")
    print(markdown.table(["", *parts], lines))
    print(
        f"\nSpeed-ups of ladders, published, predicted (error); {name}:\n\n{table(found, LADDERS)}"
    )
    speeds = [abs(one["predicted"] / one["speed"] - 1) for one in report["speeds"]]
    mean, largest = statistics.mean(speeds), max(speeds)
    print(f"\nErrors of tokens per second: mean {mean:.1%}, largest {largest:.1%}")
    print(f"\nSpeed-ups of published plans:\n\n{known_table(points)}")
    print(
        "\n"
        + markdown.table(
            ["constant", "value"], [[key, f"{value:.3g}"] for key, value in constants.items()]
        )
    )
    if args.out:
        files.write_json(args.out, report)


def _is(one: Prediction, kind: str, link: str) -> bool:
    return (one.kind, one.link) == (kind, link)


def errors(found: list[Prediction]) -> str:
    """Mean and largest error for people."""
    sizes = [abs(one.error) for one in found]
    return f"{statistics.mean(sizes):.1%} ({max(sizes):.1%})"


def table(found: list[Prediction], kind: str) -> str:
    """Markdown: one row a model and batch, one column a link and TP."""
    of_kind = [one for one in found if one.kind == kind]
    columns = list(dict.fromkeys((one.link, one.tp) for one in of_kind))
    cells = {
        (
            one.model,
            one.batch,
            one.link,
            one.tp,
        ): f"{one.published:.2f}, {one.predicted:.2f} ({one.error:+.0%})"
        for one in of_kind
    }
    lines = [
        [f"{model}, batch {batch}", *(cells.get((model, batch, *column), "") for column in columns)]
        for model, batch in dict.fromkeys((one.model, one.batch) for one in of_kind)
    ]
    return markdown.table(["", *(f"{link}, TP = {tp}" for link, tp in columns)], lines)


if __name__ == "__main__":
    common.run_main(main)
