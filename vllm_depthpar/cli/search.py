"""`depthpar search`: find the plan that costs the least quality at a depth, a speed or a loss."""

from __future__ import annotations

import argparse
import time
from typing import Any

from vllm_depthpar.checkpoint.config import read_original_config
from vllm_depthpar.cli import calibration
from vllm_depthpar.cli.types import MODEL_HELP, at_least, out_file, path_or_name
from vllm_depthpar.errors import UserError
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.predict.devices import THIS, device_named
from vllm_depthpar.predict.links import LINKS, link_named
from vllm_depthpar.predict.machines import Deployment, Workload
from vllm_depthpar.search.run import METHODS, Effort, Goal, Space, run
from vllm_depthpar.search.target import Machine


def add(commands: Any) -> None:
    """Register the subcommand."""
    search = commands.add_parser("search", help="find the best plan for a depth, speed or loss")
    search.add_argument("model", type=path_or_name, metavar="MODEL", help=MODEL_HELP)
    goals = search.add_mutually_exclusive_group(required=True)
    goals.add_argument("--depth", type=at_least(1), metavar="D", help="run D blocks")
    goals.add_argument(
        "--speedup", type=float, metavar="S", help="S times plain vLLM's predicted decoding speed"
    )
    goals.add_argument(
        "--all-reduces",
        type=at_least(1),
        metavar="N",
        help="at most N all-reduces a forward pass at TP > 1",
    )
    goals.add_argument(
        "--max-ppl-increase",
        type=float,
        metavar="PCT",
        help="the shortest plan whose perplexity is at most PCT percent above the model's",
    )
    calibration.add(search)
    search.add_argument(
        "--methods",
        default="pair,group,skip",
        metavar="M",
        help=f"any of {', '.join(METHODS)} (pair,group,skip)",
    )
    search.add_argument("--group", type=at_least(3), default=4, help="the widest group (4)")
    search.add_argument(
        "--out",
        type=out_file(
            *("{stem}-front.png", "{stem}-report.html", "{stem}-report.json", "{stem}-report.md")
        ),
        required=True,
        metavar="FILE",
        help="the plan file; beside it a report (.md, .html), numbers, a picture",
    )
    search.add_argument("--rounds", type=at_least(0), default=6, help="at most (6)")
    search.add_argument("--proposals", type=at_least(1), default=6, help="a round (6)")
    search.add_argument("--minutes", type=float, default=20, help="begin no round after (20)")
    search.add_argument("--seed", type=int, default=0, help="(0)")
    where = search.add_argument_group("where it will run, for predicted speed-ups")
    where.add_argument("--tp", type=at_least(1), default=1, metavar="N", help="ranks (1)")
    where.add_argument("--link", metavar="L", help="between them: see depthpar predict")
    where.add_argument("--device", metavar="D", help="see depthpar predict (this machine)")
    where.add_argument("--batch", type=at_least(1), default=1, metavar="B", help="sequences (1)")
    where.add_argument("--context", type=at_least(0), default=1024, help="tokens before (1024)")
    search.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> str:
    started = time.monotonic()
    shape = ModelShape.from_config(read_original_config(args.model))
    goal = Goal(args.depth, args.speedup, args.all_reduces, args.max_ppl_increase)
    machine = _machine(args)
    space = Space(shape, goal, _methods(args.methods, args.tp), args.group, args.tp, machine)
    _ = space.target  # raises what is wrong with it, before anything long begins
    texts = calibration.read(args)  # before the weights load

    from vllm_depthpar.evaluate.suite import Suite, open_model
    from vllm_depthpar.search.report import SearchReport

    effort = Effort(args.rounds, args.proposals, args.minutes, args.seed)
    evaluator = open_model(args.model, args.dtype, ranks=args.tp)
    outcome = run(space, Suite(evaluator, texts), effort, started)
    return SearchReport(args.model, outcome, effort).write(args.out)


def _methods(text: str, tp: int) -> list[str]:
    methods = [method.strip() for method in text.split(",")]
    for method in methods:
        if method not in METHODS:
            raise UserError(f"method {method!r} is unknown; allowed: {', '.join(METHODS)}")
    if "drop_sync" in methods and tp == 1:
        raise UserError("method 'drop_sync' changes nothing on one rank; allowed: --tp 2 or more")
    return [method for method in METHODS if method in methods]


def _machine(args: argparse.Namespace) -> Machine | None:
    """Find the machine that plans will run on; None if nothing asks for it."""
    if args.speedup is None and not (args.device or args.link):
        return None
    if args.tp > 1 and not args.link:
        raise UserError(f"--tp {args.tp} needs a --link; allowed: {', '.join(LINKS)}")
    device = device_named(args.device or THIS)
    link = link_named(args.link) if args.link else None
    return Machine(Deployment(device, link, args.tp), Workload(args.batch, args.context))
