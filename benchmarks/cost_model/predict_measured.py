"""The cost model against this repository's own measurements: speed-ups of plans it never saw.

Two hosts, one table a link (`network/results/cluster-*.json`). The machine's constants are fitted
on rows without any plan: plain vLLM, plain vLLM without communication, and `identity`, which is
plain vLLM with this package's all-reduces; the latency is half the round trip that was measured.
What a layer takes whatever its size is not in those rows: it is the median of what the pairs of the
*other* links give. All plans of the link are predicted.

From one link to another: all constants from the plain link, its pairs among them; of the other
links only the latency and the nominal bandwidth. Everything on them is predicted, plain vLLM too.

One host, one rank (`serving/results/throughput-*.json`): fitted on plain vLLM and one plan at
batch 1; all else is predicted, with each plan as the one in turn.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout: this is a script

from benchmarks import common
from benchmarks.cost_model import shapes
from benchmarks.cost_model.fitting import fit
from vllm_depthpar.launch.variants import PLAIN
from vllm_depthpar.plan import read_spec, resolve
from vllm_depthpar.plan.auto import auto_spec
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.predict.cost_model import step_time
from vllm_depthpar.predict.machines import Deployment, Device, Link, Workload
from vllm_depthpar.util import files, markdown
from vllm_depthpar.util.provenance import origin

PLAIN_LINK = "cluster-eager-plain"
COMPILED = "cluster-compiled-plain"
CLUSTERS = (PLAIN_LINK, "cluster-eager-0.2ms", "cluster-eager-1gbit", "cluster-eager-shm", COMPILED)
# Of one machine and link each.
BELOW_THE_LAYER = (
    ("cluster-dropped-0.2ms", "cluster-pairs-0.2ms", "cluster-desync-0.2ms"),
    ("cluster-dropped-plain", "cluster-pairs-plain"),
)
NONE = "no communication"
IDENTITY = "identity"
PAIRS = '{"pair": [0, 24]}'
WITHOUT_PLAN = (PLAIN, NONE, IDENTITY)
START = {
    "memory_bandwidth": 1e10,
    "flops_few": 1e10,
    "flops_many": 2e10,
    "layer_seconds": 1e-3,
    "reduce_seconds": 3e-4,
    "plain_reduce_seconds": 1e-3,
    "latency_seconds": 1e-4,
    "bandwidth": 2e8,
    "reduce_bandwidth": 2e8,
}
Constants = dict[str, float]


@dataclass(frozen=True)
class Row:
    """One measurement: seconds of a forward pass, and the speed-up over plain that goes with it."""

    label: str
    load: str
    workload: Workload
    seconds: float
    speedup: float


@dataclass(frozen=True)
class Prediction:
    """A speed-up over plain vLLM, measured and predicted."""

    where: str
    label: str
    load: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Relative: 0.1 is 10 % too fast."""
        return self.predicted / self.measured - 1


class Cluster:
    """The measurements on one link, and the model of the machine they were made on."""

    def __init__(self, name: str, *more: str) -> None:
        """Read the measurements `name`, and others of the same machine, link and mode."""
        report, *others = (common.result(f"network/{one}") for one in (name, *more))
        self.name = name
        self.shape = ModelShape.from_config(report["model"])
        self.trip_seconds = (report["link"]["round_trip_ms"] or 0.0) / 1e3
        self.nominal = (report["link"]["mbit"] or math.inf) * 1e6 / 8
        self.shared_memory = report["link"]["round_trip_ms"] is None
        self.many = max(batch * prompt for batch, prompt, _, _ in report["loads"].values())
        self.eager = report["mode"] == "eager"
        self.rows = [
            _cluster_row(one, load, run["variants"][0], *numbers)
            for run in (report, *others)
            for one in run["variants"]
            for load, numbers in run["loads"].items()
        ]
        self.few = max(row.workload.batch for row in self.rows if row.workload.tokens == 1)

        self.plain = [row for row in self.rows if row.label == PLAIN]
        self.without_plan = [row for row in self.rows if row.label in WITHOUT_PLAN]
        # Pairs at batch 1, where the fixed cost of layers weighs most.
        self.pairs = [row for row in self.rows if row.label == PAIRS and row.workload.rows == 1]

    def known(self) -> Constants:
        """What was measured apart from the rows."""
        if self.shared_memory:
            return {
                "reduce_seconds": 0.0,
                "plain_reduce_seconds": 0.0,
                "reduce_bandwidth": math.inf,
            }
        return {"latency_seconds": self.trip_seconds / 2, "bandwidth": self.nominal}

    def fitted(self, rows: Iterable[Row], fixed: Constants, start: Constants = START) -> Constants:
        """All constants, those that are not fixed fitted on rows, from first guesses."""
        rows = list(rows)
        found = fit(
            lambda one: [
                math.log(self.seconds(row, {**fixed, **one}) / row.seconds) for row in rows
            ],
            {name: start[name] for name in start.keys() - fixed.keys()},
        )
        return {**fixed, **found}

    def deployment(self, constants: Constants, communicates: bool) -> Deployment:
        """Two ranks of the machine with these constants."""
        one = constants
        device = Device(
            self.name,
            one["memory_bandwidth"],
            ((self.few, one["flops_few"]), (self.many, one["flops_many"])),
            layer_seconds=one["layer_seconds"],
            step_seconds=one.get("step_seconds", 0.0),
            reduce_seconds=one["reduce_seconds"],
            plain_reduce_seconds=one["plain_reduce_seconds"],
            reduce_bandwidth=one["reduce_bandwidth"],
        )
        link = Link(
            self.name, one["latency_seconds"], one["bandwidth"], shared_memory=self.shared_memory
        )
        return Deployment(device, link if communicates else None, tp=2)

    def seconds(self, row: Row, constants: Constants) -> float:
        """What the model says that a row takes."""
        plain = row.label in (PLAIN, NONE)
        plan = resolve(
            "identity" if row.label in WITHOUT_PLAN else json.loads(row.label), self.shape.layers
        )
        deployment = self.deployment(constants, communicates=row.label != NONE)
        return step_time(self.shape, plan, deployment, row.workload, plain=plain).seconds

    def predictions(self, constants: Constants, known: list[Row]) -> list[Prediction]:
        """Speed-ups of all rows that are not known, nor plain vLLM's."""
        plain = {row.load: self.seconds(row, constants) for row in self.plain}
        return [
            Prediction(
                self.name,
                row.label,
                row.load,
                row.speedup,
                plain[row.load] / self.seconds(row, constants),
            )
            for row in self.rows
            if row not in known and row not in self.plain
        ]


def _cluster_row(
    one: dict[str, Any],
    load: str,
    plain: dict[str, Any],
    batch: int,
    prompt: int,
    tokens: int,
    counted: str,
) -> Row:
    # A ratio is taken within a round, so that the machine's drift is not in it: the seconds that
    # go with it are plain vLLM's over the ratio.
    speedup = one["loads"][load]["ratio_to_plain"]["median"]
    speed = plain["loads"][load]["tokens_per_second"]["median"] * speedup
    if counted == "prefill":
        workload = Workload(batch, tokens=prompt)
    else:
        workload = Workload(batch, context=prompt + tokens // 2)
    return Row(one["label"], load, workload, workload.rows / speed, speedup)


def within_a_link(clusters: dict[str, Cluster]) -> list[Prediction]:
    """Each link fitted on rows without a plan; layers' fixed cost from the other links' pairs."""
    found: list[Prediction] = []
    eager = {name: one for name, one in clusters.items() if one.eager}
    layer = {
        name: one.fitted(one.without_plan + one.pairs, one.known())["layer_seconds"]
        for name, one in eager.items()
    }
    for name, one in eager.items():
        others = statistics.median(layer[other] for other in eager if other != name)
        constants = one.fitted(one.without_plan, {**one.known(), "layer_seconds": others})
        found += one.predictions(constants, one.without_plan)
    return found


def compiled(clusters: dict[str, Cluster]) -> list[Prediction]:
    """The compiled run: no other was compiled, so that layers' cost is from its own pairs.

    `identity` was not among its variants: this package's all-reduces are as on the same link
    in eager mode.
    """
    same, one = clusters[PLAIN_LINK], clusters[COMPILED]
    ours = same.fitted(same.without_plan + same.pairs, same.known())
    fixed = {name: ours[name] for name in ("reduce_seconds", "reduce_bandwidth")}
    rows = one.without_plan + one.pairs
    return one.predictions(one.fitted(rows, {**one.known(), **fixed}), rows)


def between_links(clusters: dict[str, Cluster]) -> list[Prediction]:
    """All constants from the plain link; of the others their latency and nominal bandwidth."""
    own = clusters[PLAIN_LINK]
    constants = own.fitted(own.without_plan + own.pairs, own.known())
    return [
        prediction
        for name, one in clusters.items()
        if one.eager and not one.shared_memory and name != PLAIN_LINK
        for prediction in one.predictions({**constants, **one.known()}, one.plain)
    ]


def below_the_layer(_: dict[str, Cluster]) -> list[Prediction]:
    """All-reduces left out: each machine by its rows without a plan and its pairs at batch 1.

    A step costs something besides its layers: the scheduler and the server run on the ranks' cores,
    which shows where products are fast.
    """
    start, found = {**START, "step_seconds": 1e-3}, []
    for names in BELOW_THE_LAYER:
        one = Cluster(*names)
        rows = one.without_plan + one.pairs
        found += one.predictions(one.fitted(rows, one.known(), start), rows)
    return found


def one_host() -> list[Prediction]:
    """SmolLM2 on one rank: fitted on plain vLLM and on one plan at batch 1, each plan in turn."""
    shape = ModelShape.from_config(shapes.config("smollm2-135m"))
    name = "throughput-smollm2-eager"
    report = common.result(f"serving/{name}")
    length = report["job"]["prompt_tokens"] + report["job"]["tokens"] // 2
    plain, *given = report["variants"]

    specs: dict[str, object] = {PLAIN: "identity", "auto": auto_spec(shape)[0]}
    specs |= {one["label"]: read_spec(one["label"]) for one in given if one["label"] != "auto"}

    def speedup_of(one: dict[str, Any], batch: str) -> float:
        return float(one["batches"][batch]["ratio_to_plain"]["median"])

    def seconds_of(one: dict[str, Any], batch: str) -> float:
        speed = plain["batches"][batch]["tokens_per_second"]["median"]
        return int(batch) / speed / speedup_of(one, batch)

    def predicted(one: dict[str, Any], batch: str, constants: Constants) -> float:
        device = Device(
            name,
            constants["memory_bandwidth"],
            ((8, constants["flops_few"]),),
            layer_seconds=constants["layer_seconds"],
        )
        resolved = resolve(specs[one["label"]], shape.layers)
        return step_time(shape, resolved, Deployment(device), Workload(int(batch), length)).seconds

    def residuals(known: dict[str, Any], constants: Constants) -> list[float]:
        rows = [(plain, "1"), (plain, "8"), (known, "1")]
        return [math.log(predicted(*row, constants) / seconds_of(*row)) for row in rows]

    found = []
    for known in given:
        names = ("memory_bandwidth", "flops_few", "layer_seconds")
        constants = fit(partial(residuals, known), {name: START[name] for name in names})
        found += [
            Prediction(
                f"{name}, fitted on {known['label']}",
                one["label"],
                f"decode, batch {batch}",
                speedup_of(one, batch),
                predicted(plain, batch, constants) / predicted(one, batch, constants),
            )
            for one in given
            for batch in plain["batches"]
            if (one, batch) != (known, "1")
        ]
    return found


CHECKS = {
    "Each link by rows without a plan, layers by the other links": within_a_link,
    "Compiled, by rows without a plan and its own pairs at batch 1": compiled,
    "From the plain link to the others, by latency and bandwidth alone": between_links,
    "All-reduces left out, each machine by rows without a plan and its pairs at batch 1": (
        below_the_layer
    ),
    "One host, one rank, by plain vLLM and one plan": lambda _: one_host(),
}


def main() -> None:
    """Fit, predict, print tables, write the JSON."""
    parser = argparse.ArgumentParser(description="The cost model against our own measurements.")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON")
    args = parser.parse_args()
    clusters = {name: Cluster(name) for name in CLUSTERS}
    checks = {title: check(clusters) for title, check in CHECKS.items()}
    for title, predictions in checks.items():
        print(f"\n{title}: {summary(predictions)}\n\n{table(predictions)}")
    if args.out:
        content = {
            **origin(common.program()),
            "checks": {
                title: [{**asdict(one), "error": one.error} for one in predictions]
                for title, predictions in checks.items()
            },
        }
        files.write_json(args.out, content)


def summary(predictions: list[Prediction]) -> str:
    """Mean and largest error, and how many are within 10 %."""
    errors = [abs(one.error) for one in predictions]
    within = sum(error <= 0.1 for error in errors)
    return (
        f"{within} of {len(errors)} within 10 %, "
        f"mean {statistics.mean(errors):.1%}, largest {max(errors):.1%}"
    )


def table(predictions: list[Prediction]) -> str:
    """Markdown: one row a plan, one column a load; measured, predicted (error)."""
    loads = list(dict.fromkeys(one.load for one in predictions))
    cells = {
        (
            one.where,
            one.label,
            one.load,
        ): f"{one.measured:.2f}, {one.predicted:.2f} ({one.error:+.0%})"
        for one in predictions
    }
    rows = [
        [where, f"`{label}`", *(cells.get((where, label, load), "fitted") for load in loads)]
        for where, label in dict.fromkeys((one.where, one.label) for one in predictions)
    ]
    return markdown.table(["", "plan", *loads], rows)


if __name__ == "__main__":
    common.run_main(main)
