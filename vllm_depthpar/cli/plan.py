"""`depthpar plan show | schema`: plans, before anything is loaded."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from vllm_depthpar.checkpoint.config import read_config
from vllm_depthpar.cli.types import MODEL_HELP, PLAN_HELP, at_least, path_or_name
from vllm_depthpar.plan import drawing, json_schema, precedence, read_spec
from vllm_depthpar.plan.model_shape import ModelShape


def add(commands: Any) -> None:
    """Register the subcommand."""
    plans = commands.add_parser("plan", help="show plans and their schema")
    plan_commands = plans.add_subparsers(required=True, metavar="COMMAND")
    show = plan_commands.add_parser("show", help="draw a plan for a model")
    show.add_argument("model", type=path_or_name, metavar="MODEL", help=MODEL_HELP)
    show.add_argument("--plan", metavar="P", help=PLAN_HELP)
    show.add_argument("--tp", type=at_least(1), default=1, metavar="N", help="tensor-parallel size")
    show.add_argument("--json", action="store_true", help="print the numbers as JSON")
    show.set_defaults(run=_show)
    schema = plan_commands.add_parser("schema", help="print the JSON Schema of a plan")
    schema.set_defaults(run=lambda _: json.dumps(json_schema(), indent=2))


def _show(args: argparse.Namespace) -> str:
    config = read_config(args.model)
    override = read_spec(args.plan) if args.plan is not None else None
    chosen, source = precedence.choose(config, override, os.environ.get(precedence.ENV), "--plan")
    shape = ModelShape.from_config(config)
    if args.json:
        return json.dumps({**drawing.effects(chosen, shape, args.tp), "source": source}, indent=2)
    return drawing.draw(chosen, shape, args.tp, source)
