"""`depthpar eval`: what plans cost in quality."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

from vllm_depthpar import files, tasks
from vllm_depthpar.commands.types import MODEL_HELP, PLAN_HELP, at_least
from vllm_depthpar.contenders import PLAIN, contenders


def add(commands: Any) -> None:
    """Register the subcommand."""
    evaluate = commands.add_parser("eval", help="measure what plans cost in quality")
    evaluate.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    evaluate.add_argument(
        "--plan",
        action="append",
        metavar="P",
        help=f"{PLAN_HELP}, or 'plain' for vLLM's own model; repeatable (plain and auto)",
    )
    evaluate.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON")
    add_task_arguments(evaluate)
    evaluate.set_defaults(run=_run)


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run_tasks` needs to know."""
    group = parser.add_argument_group(
        "tasks", "lm-evaluation-harness, over a `vllm serve` for each plan; needs the extra `eval`"
    )
    group.add_argument(
        "--tasks", nargs="+", metavar="T", help="names that lm-eval knows, or YAML files"
    )
    group.add_argument(
        "--limit", type=at_least(1), metavar="N", help="only the first N documents of each task"
    )
    group.add_argument(
        "--num-fewshot", type=at_least(0), metavar="K", help="examples in a prompt (the task's own)"
    )
    group.add_argument("--seed", type=int, default=1234, help="chooses the examples (1234)")
    group.add_argument(
        "--server-args",
        default="",
        metavar="ARGS",
        help="more flags for vllm serve, as one argument: --server-args='--dtype float32 ...'",
    )


def _run(args: argparse.Namespace) -> str:
    if not args.tasks:
        raise tasks.TaskError("nothing to measure; allowed: --tasks NAME ...")
    # So that a server is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = run_tasks(args)
    if args.out:
        files.write_json(args.out, report)
    return tasks.table(report)


def run_tasks(args: argparse.Namespace) -> dict[str, Any]:
    """The tasks' report. Everything that can be wrong is checked before a server starts."""
    try:
        server_args = tasks.check_server_args(shlex.split(args.server_args))
    except ValueError as error:
        raise tasks.TaskError(f"--server-args: {error}") from None
    plans = contenders(args.model, args.plan or [PLAIN, "auto"])
    settings = tasks.Settings(args.limit, args.num_fewshot, args.seed, server_args)
    return tasks.run_tasks(args.model, plans, tasks.load_tasks(args.tasks), settings)
