"""`depthpar verify`: whether this machine serves the models that plans mean."""

from __future__ import annotations

import argparse
import json
from typing import Any

from vllm_depthpar.cli.types import (
    DTYPES,
    MODEL_HELP,
    PLAN_HELP,
    RESERVED_FLAGS,
    at_least,
    engine_flags,
    out_file,
    path_or_name,
)
from vllm_depthpar.errors import UserError
from vllm_depthpar.util import files
from vllm_depthpar.util.markdown import table
from vllm_depthpar.verify.rounding import PHASES
from vllm_depthpar.verify.run import VerifySettings, verify

# With these there are other log-probabilities than the model's, or none.
_RESERVED = (*RESERVED_FLAGS, "--logprobs-mode", "--runner", "--convert")


def add(commands: Any) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "verify", help="check that vLLM serves the model that a plan means, on this machine"
    )
    parser.add_argument("model", type=path_or_name, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--plan",
        action="append",
        default=[],
        metavar="P",
        help=f"{PLAN_HELP}, or 'carried' for the checkpoint's own; repeatable (what would be "
        "served)",
    )
    parser.add_argument("--tp", type=at_least(1), default=1, metavar="N", help="ranks (1)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="(auto)")
    parser.add_argument("--eager", action="store_true", help="without torch.compile, CUDA graphs")
    parser.add_argument(
        "--engine-args",
        default="",
        metavar="ARGS",
        help="more flags that you serve with, as one argument: "
        "--engine-args='--max-num-batched-tokens 512 ...'",
    )
    parser.add_argument(
        "--out", type=out_file(), metavar="FILE.json", help="write the numbers as JSON"
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> str:
    flags = engine_flags(args.engine_args, _RESERVED)
    record = verify(args.model, args.plan, VerifySettings(args.tp, args.dtype, args.eager, flags))
    if args.out:
        files.write_json(args.out, record)
    shown = json.dumps(record, indent=2) if args.json else _table(record)
    control, *plans = record["rows"]
    faults = [_fault(row, row is control) for row in record["rows"] if row["fault"]]
    if faults:
        print(shown)
        raise UserError(f"verify: {faults[0]}")
    names = ", ".join(row["label"] for row in plans)
    return shown if args.json else f"{shown}\n\nverify: {names} ok"


def _fault(row: dict[str, Any], is_control: bool) -> str:
    how = f"{row['label']} ({row['dtype']}, {row['mode']}, --tp {row['tp']})"
    if is_control:
        return f"{how}, the control, is off itself, so that no plan can be judged: {row['fault']}"
    return f"{how} is not the model that its plan means: {row['fault']}"


def _table(record: dict[str, Any]) -> str:
    control = record["rows"][0]
    rows = []
    for row in record["rows"]:
        for phase in PHASES:
            found, explained = row[phase]["difference"], row[phase]["explained"]
            unit = control[phase]["difference"]["mean"]
            cells = [row["label"], str(row["blocks"]), row["dtype"], row["mode"], str(row["tp"])]
            rows.append(
                [
                    *(cells if phase == PHASES[0] else [""] * len(cells)),
                    phase,
                    f"{found['mean']:.1e}",
                    f"{found['worst']:.1e}",
                    *_in_units(found["mean"], explained["mean"], unit),
                    f"{found['gap']:.1e}" if phase == PHASES[1] else "",
                    ("WRONG" if row["fault"] else "ok") if phase == PHASES[0] else "",
                ]
            )
    header = ["plan", "blocks", "dtype", "mode", "TP", "tokens", "mean", "worst", "of the control"]
    header += ["rounding explains", "token behind the best", ""]
    quantized = f", quantized: {control['quantized']}" if control["quantized"] else ""
    return (
        f"{table(header, rows)}\n\n"
        f"Differences of log-probabilities from transformers in float32, in nats; "
        f"{record['prompt_tokens']} prompt tokens and {record['generated_tokens']} generated ones "
        f"of {record['passages']} passages{quantized}"
    )


def _in_units(mean: float, explained: float, unit: float) -> list[str]:
    """Write differences as multiples of the control's; empty where it has none."""
    return [f"{value / unit:.2f}x" if unit > 0 else "" for value in (mean, explained)]
