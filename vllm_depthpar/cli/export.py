"""`depthpar export`: a checkpoint folder that carries its plan."""

from __future__ import annotations

import argparse
from typing import Any

from vllm_depthpar.checkpoint import export
from vllm_depthpar.checkpoint.config import read_config
from vllm_depthpar.cli.types import MODEL_HELP, PLAN_HELP, out_folder, path_or_name
from vllm_depthpar.plan import precedence, read_spec


def add(commands: Any) -> None:
    """Register the subcommand."""
    parser = commands.add_parser("export", help="write a checkpoint that serves with no flag")
    parser.add_argument("model", type=path_or_name, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--plan", required=True, metavar="P", help=PLAN_HELP)
    parser.add_argument(
        "--out", type=out_folder, required=True, metavar="DIR", help="folder to make"
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> str:
    config = read_config(args.model)
    chosen, _ = precedence.choose(config, read_spec(args.plan), override_name="--plan")
    export.export(args.model, chosen, args.out)
    return f"{args.out}: {chosen.name}\nserve it: vllm serve {args.out}"
