"""`depthpar predict`: how fast plans would be on a machine, before anything is loaded."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from dataclasses import dataclass, replace
from typing import Any

from vllm_depthpar.checkpoint.config import read_config
from vllm_depthpar.cli.types import MODEL_HELP, PLAN_HELP, at_least
from vllm_depthpar.errors import UserError
from vllm_depthpar.launch.variants import PLAIN
from vllm_depthpar.plan import Plan, precedence, read_spec, resolve
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.plan.published_shapes import CONFIGS, config_named
from vllm_depthpar.predict import devices, links
from vllm_depthpar.predict.cost_model import StepTime, check, plain_time, step_time
from vllm_depthpar.predict.machines import Deployment, Device, Link, Workload

DECODE, PREFILL = "decode", "prefill"
LOADS = {DECODE: "decoding", PREFILL: "prefill"}
# Speed-ups below these are none, and none that a ladder's loss of quality is worth.
_A_GAIN, _A_LADDERS_GAIN = 1.005, 1.03


def add(commands: Any) -> None:
    """Register the subcommand."""
    predict = commands.add_parser("predict", help="predict how fast plans are on a machine")
    which = predict.add_mutually_exclusive_group(required=True)
    which.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    which.add_argument(
        "--shape",
        metavar="S",
        help=f"no checkpoint, but a model's published sizes: {', '.join(CONFIGS)}",
    )
    predict.add_argument(
        "--plan",
        action="append",
        metavar="P",
        help=f"{PLAN_HELP}; may be repeated (the plan that would be served)",
    )
    positive = at_least(1)
    predict.add_argument("--tp", type=positive, default=1, metavar="N", help="ranks (1)")
    predict.add_argument(
        "--link",
        metavar="L",
        help=f"between the ranks: {', '.join(links.LINKS)}, or latency=0.2ms,bandwidth=1gbit",
    )
    predict.add_argument("--batch", type=positive, default=1, metavar="B", help="sequences (1)")
    predict.add_argument(
        "--context",
        type=at_least(0),
        default=1024,
        metavar="C",
        help="tokens in the KV cache of each sequence when decoding (1024)",
    )
    predict.add_argument(
        "--prompt", type=positive, metavar="T", help="also the prefill of one prompt of T tokens"
    )
    predict.add_argument(
        "--device",
        default=devices.THIS,
        metavar="D",
        help=f"{', '.join(devices.DEVICES)}, or {devices.THIS}: what --calibrate measured "
        f"({devices.THIS})",
    )
    predict.add_argument(
        "--calibrate", action="store_true", help="measure this machine first (two minutes)"
    )
    predict.add_argument(
        "--eager",
        action="store_true",
        help="calibrate for --enforce-eager (compiled, vLLM's default)",
    )
    predict.add_argument("--json", action="store_true", help="print the numbers as JSON")
    predict.set_defaults(run=_predict)


@dataclass(frozen=True)
class _Row:
    """One plan's numbers, each by load.

    Attributes:
        speedups: over plain vLLM; empty where that can't be cut into so many ranks.
        ladder_speedups: over the same blocks without the ladder; empty where there is none.
    """

    label: str
    plan: Plan
    times: dict[str, StepTime]
    speedups: dict[str, float]
    ladder_speedups: dict[str, float]


def _predict(args: argparse.Namespace) -> str:
    config = config_named(args.shape) if args.shape else read_config(args.model)
    shape = ModelShape.from_config(config)
    specs = [(text, read_spec(text)) for text in args.plan or []]
    environ = os.environ.get(precedence.ENV)
    chosen = {text: precedence.choose(config, spec, environ, "--plan")[0] for text, spec in specs}
    if not chosen:
        served, source = precedence.choose(config, None, environ)
        chosen = {source: served}
    link = links.link_named(args.link) if args.link else None
    if link is None and args.tp > 1:
        raise UserError(f"--tp {args.tp} needs a --link; allowed: {', '.join(links.LINKS)}")
    if args.calibrate and args.device != devices.THIS:
        raise UserError(f"--calibrate measures this machine; allowed: --device {devices.THIS}")
    for plan in chosen.values():
        check(shape, plan, args.tp)
    if args.eager and not args.calibrate:
        raise UserError("--eager says what --calibrate measures; allowed: beside it")
    device = _calibrated(shape, args) if args.calibrate else devices.device_named(args.device)
    deployment = Deployment(device, link, args.tp)
    workloads = {DECODE: Workload(args.batch, args.context)}
    if args.prompt:
        workloads[PREFILL] = Workload(tokens=args.prompt)

    plain = None
    if shape.fits(1, args.tp):
        times = {load: plain_time(shape, deployment, work) for load, work in workloads.items()}
        plain = _Row(PLAIN, resolve("identity", shape.layers), times, {}, {})

    def times_of(plan: Plan) -> dict[str, StepTime]:
        return {load: step_time(shape, plan, deployment, work) for load, work in workloads.items()}

    rows = []
    for label, plan in chosen.items():
        times = times_of(plan)
        without = times_of(replace(plan, ladder=frozenset())) if plan.ladder else {}
        over_plain = _ratios(plain.times if plain else {}, times)
        rows.append(_Row(label, plan, times, over_plain, _ratios(without, times)))
    form = _json if args.json else _text
    return form(deployment, workloads, plain, rows)


def _ratios(base: dict[str, StepTime], times: dict[str, StepTime]) -> dict[str, float]:
    return {load: base[load].seconds / times[load].seconds for load in base}


def _calibrated(shape: ModelShape, args: argparse.Namespace) -> Device:
    from vllm_depthpar.predict.calibrate import measure

    print("Measuring this machine (about two minutes) ...", file=sys.stderr, flush=True)
    device = measure(shape, args.tp, args.eager)
    print(f"Saved in {devices.save(device)}", file=sys.stderr)
    return device


def _warnings(row: _Row) -> list[str]:
    """Say what to think of before serving a plan: it costs quality."""
    found = []
    for load in row.times:
        name, ratio = LOADS[load], row.speedups.get(load, math.inf)
        ladder = row.ladder_speedups.get(load, math.inf)
        if ratio < 1:
            found.append(f"{row.label} is predicted to be slower than plain in {name}")
        elif ratio < _A_GAIN and not row.plan.is_identity:
            found.append(f"{row.label} is predicted to gain nothing over plain in {name}")
        elif ladder < _A_LADDERS_GAIN:
            found.append(
                f"the ladder of {row.label} is predicted to gain {ladder - 1:.1%} in {name}: "
                "it pays where all-reduces are slow"
            )
    return [f"warning: {text}" for text in found]


def _json(
    deployment: Deployment, workloads: dict[str, Workload], plain: _Row | None, rows: list[_Row]
) -> str:
    def loads(row: _Row) -> dict[str, Any]:
        return {
            load: {
                "seconds": time.seconds,
                **vars(time),
                "shares": time.shares,
                "speedup": row.speedups.get(load),
                "ladder_speedup": row.ladder_speedups.get(load),
            }
            for load, time in row.times.items()
        }

    def named(one: Device | Link | None) -> dict[str, str] | None:
        return {"name": one.name, "source": one.source} if one else None

    prefill = workloads.get(PREFILL)
    return json.dumps(
        {
            "device": named(deployment.device),
            "link": named(deployment.link),
            "tp": deployment.tp,
            "batch": workloads[DECODE].batch,
            "context": workloads[DECODE].context,
            "prompt": prefill and prefill.tokens,
            PLAIN: plain and loads(plain),
            "plans": [
                {
                    "label": row.label,
                    "plan": row.plan.to_spec(),
                    "digest": row.plan.digest,
                    "name": row.plan.name,
                    **loads(row),
                    "slower_than_plain": [
                        LOADS[load] for load, ratio in row.speedups.items() if ratio < 1
                    ],
                }
                for row in rows
            ],
        },
        indent=2,
    )


def _text(
    deployment: Deployment, workloads: dict[str, Workload], plain: _Row | None, rows: list[_Row]
) -> str:
    device, link, tp = deployment.device, deployment.link, deployment.tp
    over = f" over {link.name}" if link and tp > 1 else ""
    lines = [f"Predicted, not measured: {tp} x {device.name}{over}"]
    lines += [f"  {one.name}: {one.source}" for one in (device, link) if one]
    for load, work in workloads.items():
        lines += ["", _heading(load, work)]
        lines += _table(load, work, [plain, *rows] if plain else rows)
    if plain is None:
        lines += ["", f"plain vLLM can't be cut into {tp} ranks: nothing to compare with"]
    for row in rows:
        lines += _warnings(row)
    return "\n".join(lines)


def _heading(load: str, work: Workload) -> str:
    if load == DECODE:
        return f"decoding, batch {work.batch}, context {work.context}"
    return f"prefill, one prompt of {work.tokens} tokens"


def _table(load: str, work: Workload, rows: list[_Row]) -> list[str]:
    """Numbers to the right, labels to the left, and a header."""
    cells = [["ms", "tokens/s", "speed-up", *rows[0].times[load].shares, "blocks", ""]]
    for row in rows:
        seconds = row.times[load].seconds
        cells.append(
            [
                f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}",
                f"{work.rows / seconds:.1f}",
                f"{row.speedups[load]:.2f}x" if load in row.speedups else "",
                *(f"{share:.0%}" for share in row.times[load].shares.values()),
                str(row.plan.depth),
                row.label,
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for *numbers, label in cells:
        padded = [f"{cell:>{width}}" for cell, width in zip(numbers, widths, strict=False)]
        lines.append("  ".join(["", *padded, label]).rstrip())
    return lines
