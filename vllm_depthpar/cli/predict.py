"""`depthpar predict`: how fast plans would be on a machine, before anything is loaded."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from typing import Any

from vllm_depthpar.checkpoint.config import read_config
from vllm_depthpar.cli.types import MODEL_HELP, PLAN_HELP, at_least
from vllm_depthpar.errors import UserError
from vllm_depthpar.plan import Plan, precedence, read_spec, resolve
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.predict import machines
from vllm_depthpar.predict.cost_model import StepTime, check, plain_time, step_time
from vllm_depthpar.predict.machines import Device, Link

PLAIN = "plain"
_LOADS = {"decode": "decoding", "prefill": "prefill"}
# A speed-up below this is none.
_A_GAIN = 1.005


def add(commands: Any) -> None:
    """Register the subcommand."""
    predict = commands.add_parser("predict", help="predict how fast plans are on a machine")
    predict.add_argument("model", metavar="MODEL", help=MODEL_HELP)
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
        help=f"between the ranks: {', '.join(machines.LINKS)}, or latency=0.2ms,bandwidth=1gbit",
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
        default=machines.THIS,
        metavar="D",
        help=f"{', '.join(machines.DEVICES)}, or {machines.THIS}: what --calibrate measured "
        f"({machines.THIS})",
    )
    predict.add_argument(
        "--calibrate", action="store_true", help="measure this machine first (a minute)"
    )
    predict.add_argument("--json", action="store_true", help="print the numbers as JSON")
    predict.set_defaults(run=_predict)


@dataclass(frozen=True)
class _Row:
    """One plan's times: a decoding step's, and a prefill's if it was asked for."""

    label: str
    plan: Plan
    decode: StepTime
    prefill: StepTime | None


def _predict(args: argparse.Namespace) -> str:
    config = read_config(args.model)
    shape = ModelShape.from_config(config)
    specs = [(text, read_spec(text)) for text in args.plan or []]
    environ = os.environ.get(precedence.ENV)
    chosen = {text: precedence.choose(config, spec, environ, "--plan")[0] for text, spec in specs}
    if not chosen:
        served, source = precedence.choose(config, None, environ)
        chosen = {source: served}
    link = machines.link_named(args.link) if args.link else None
    if link is None and args.tp > 1:
        raise UserError(f"--tp {args.tp} needs a --link; allowed: {', '.join(machines.LINKS)}")
    if args.calibrate and args.device != machines.THIS:
        raise UserError(f"--calibrate measures this machine; allowed: --device {machines.THIS}")
    for plan in chosen.values():
        check(shape, plan, args.tp)
    device = _calibrated(shape, args.tp) if args.calibrate else machines.device_named(args.device)

    def times(plan: Plan | None) -> tuple[StepTime, StepTime | None]:
        machine = (device, link, args.tp)
        loads = [(args.batch, args.context, 1), (1, 0, args.prompt)]
        found = [
            plain_time(shape, *machine, *load)
            if plan is None
            else step_time(shape, plan, *machine, *load)
            for load in loads
            if load[-1] is not None
        ]
        return found[0], found[1] if args.prompt else None

    rows = [_Row(label, plan, *times(plan)) for label, plan in chosen.items()]
    plain = None
    if shape.fits(1, args.tp):
        plain = _Row(PLAIN, resolve("identity", shape.layers), *times(None))
    form = _json if args.json else _text
    return form(args, device, link, plain, rows)


def _calibrated(shape: ModelShape, tp: int) -> Device:
    from vllm_depthpar.predict.calibrate import measure

    print("Measuring this machine (about a minute) ...", file=sys.stderr, flush=True)
    device = measure(shape, tp)
    print(f"Saved in {machines.save(device)}", file=sys.stderr)
    return device


def _speedup(plain: _Row | None, row: _Row, load: str) -> float | None:
    time, base = getattr(row, load), plain and getattr(plain, load)
    return base.seconds / time.seconds if base and time else None


def _slower(plain: _Row | None, row: _Row) -> list[str]:
    """The loads in which a plan is predicted to be slower than plain vLLM."""
    return [name for load, name in _LOADS.items() if (_speedup(plain, row, load) or 1) < 1]


def _warnings(plain: _Row | None, row: _Row) -> list[str]:
    """What to think of before serving a plan: it costs quality."""
    slower = _slower(plain, row)
    found = [f"{row.label} is predicted to be slower than plain in {name}" for name in slower]
    for load, name in _LOADS.items():
        ratio = _speedup(plain, row, load)
        if ratio and 1 <= ratio < _A_GAIN and not row.plan.is_identity:
            found.append(f"{row.label} is predicted to gain nothing over plain in {name}")
    return [f"warning: {text}" for text in found]


def _json(
    args: argparse.Namespace,
    device: Device,
    link: Link | None,
    plain: _Row | None,
    rows: list[_Row],
) -> str:
    def loads(row: _Row) -> dict[str, Any]:
        return {
            load: {
                "seconds": time.seconds,
                **vars(time),
                "shares": time.shares,
                "speedup": _speedup(plain, row, load),
            }
            for load in _LOADS
            if (time := getattr(row, load))
        }

    return json.dumps(
        {
            "device": {"name": device.name, "source": device.source},
            "link": link and {"name": link.name, "source": link.source},
            "tp": args.tp,
            "batch": args.batch,
            "context": args.context,
            "prompt": args.prompt,
            PLAIN: plain and loads(plain),
            "plans": [
                {
                    "label": row.label,
                    "plan": row.plan.to_spec(),
                    "digest": row.plan.digest,
                    "name": row.plan.name,
                    **loads(row),
                    "slower_than_plain": _slower(plain, row),
                }
                for row in rows
            ],
        },
        indent=2,
    )


def _text(
    args: argparse.Namespace,
    device: Device,
    link: Link | None,
    plain: _Row | None,
    rows: list[_Row],
) -> str:
    where = f"{args.tp} x {device.name}" + (f" over {link.name}" if link and args.tp > 1 else "")
    lines = [f"Predicted, not measured: {where}"]
    lines += [f"  {one.name}: {one.source}" for one in (device, link) if one]
    headings = {
        "decode": f"decoding, batch {args.batch}, context {args.context}",
        "prefill": f"prefill, one prompt of {args.prompt} tokens",
    }
    tokens = {"decode": args.batch, "prefill": args.prompt}
    for load, heading in headings.items():
        found = [row for row in [plain, *rows] if row and getattr(row, load)]
        if not found:
            continue
        cells = [["ms", "tokens/s", "speed-up", *getattr(found[0], load).shares, "blocks", ""]]
        for row in found:
            time, ratio = getattr(row, load), _speedup(plain, row, load)
            cells.append(
                [
                    f"{1e3 * time.seconds:.3g}"
                    if time.seconds < 1
                    else f"{1e3 * time.seconds:.0f}",
                    f"{tokens[load] / time.seconds:.1f}",
                    f"{ratio:.2f}x" if ratio and row is not plain else "",
                    *(f"{share:.0%}" for share in time.shares.values()),
                    str(row.plan.depth),
                    row.label,
                ]
            )
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines += ["", heading]
        for line in cells:
            *numbers, label = line
            padded = [f"{cell:>{width}}" for cell, width in zip(numbers, widths, strict=False)]
            lines.append("  ".join(["", *padded, label]).rstrip())
    if plain is None:
        lines += ["", f"plain vLLM can't be cut into {args.tp} ranks: nothing to compare with"]
    for row in rows:
        lines += _warnings(plain, row)
    return "\n".join(lines)
