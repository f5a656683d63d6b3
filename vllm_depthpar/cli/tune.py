"""`depthpar tune`: from a model to a faster one, by the other commands, one after the other.

What they make is kept beside the result (see `vllm_depthpar.cli.steps`).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vllm_depthpar.checkpoint import export
from vllm_depthpar.checkpoint.config import fingerprint, read_original_config
from vllm_depthpar.cli.steps import Step, keep_settings, run_steps
from vllm_depthpar.cli.types import MODEL_HELP, at_least, path_or_name
from vllm_depthpar.errors import UserError
from vllm_depthpar.launch.hardware import CORES, gpus
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.predict.devices import THIS, device_named, is_measured
from vllm_depthpar.predict.links import LINKS
from vllm_depthpar.util import files

REPORT = "report.html"
# On one rank a dropped sync point is none, and parallel residual saves nothing.
ALONE = "pair,group,skip,drop_attention,drop_mlp"
BETWEEN_RANKS = "pair,drop_sync,drop_attention,drop_mlp"
# Shares of the minutes; the rest is for loading, checking and measuring.
_SEARCH, _RECOVERY = 0.3, 0.4
# Of own text, for each minute of recovery: writing them takes a part of it.
_OWN_TOKENS = 2048
_LEAST_OWN_TOKENS, _MOST_OWN_TOKENS = 16384, 131072
# A few minutes on two cores for a small model; eager servers are up in seconds.
_GENERATE = ("--generate", "128", "--prompts", "8", "--questions", "12")


def add(commands: Any) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "tune", help="search, recover, check and measure: a faster checkpoint in one command"
    )
    parser.add_argument("model", type=path_or_name, metavar="MODEL", help=MODEL_HELP)
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument(
        "--speedup", type=float, metavar="S", help="S times plain vLLM's predicted decoding speed"
    )
    goal.add_argument(
        "--max-loss",
        type=float,
        metavar="PCT",
        help="the fastest plan whose perplexity, before recovery, is at most PCT percent above the "
        "model's",
    )
    parser.add_argument("--tp", type=at_least(1), default=1, metavar="N", help="ranks (1)")
    parser.add_argument("--link", metavar="L", help="between them: see depthpar predict")
    parser.add_argument(
        "--device", default=THIS, metavar="D", help="see depthpar predict (this machine)"
    )
    parser.add_argument(
        "--text", type=path_or_name, nargs="+", default=[], metavar="FILE", help="UTF-8 text"
    )
    parser.add_argument(
        "--minutes", type=float, default=60, help="about so many, on an idle machine (60)"
    )
    parser.add_argument("--out", type=files.expanded, required=True, metavar="DIR", help="to make")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> str:
    _check(args)
    kept = _kept(args)
    busy = f"--out {args.out} is being made by another command; allowed: another folder"
    with files.only_one(kept / ".lock", busy):
        settings = {name: value for name, value in vars(args).items() if name not in ("run", "out")}
        keep_settings(kept, {**settings, "checkpoint": fingerprint(args.model)}, "--out")
        run_steps(steps(args, kept, is_measured(), _can_measure(args)))
    ranks = f" --tensor-parallel-size {args.tp}" if args.tp > 1 else ""
    return f"{args.out / REPORT}: what was found, and how\nserve it: vllm serve {args.out}{ranks}"


def steps(args: argparse.Namespace, kept: Path, measured: bool, can_measure: bool) -> list[Step]:
    """Say what is to be done.

    Args:
        args: the command's.
        kept: where all goes but the result.
        measured: whether this machine is.
        can_measure: whether it can run the result as it is meant to run.
    """
    model, tp = args.model, ["--tp", f"{args.tp}"]
    text = ["--text", *args.text] if args.text else []
    found = []
    if args.device == THIS and not measured:
        arguments = ["predict", model, "--calibrate", "--plan", "identity"]
        found.append(Step("measure this machine", arguments, None))
    if args.tp > 1:
        ordered = kept / "ordered"
        arguments = ["order", model, *tp, *text, "--out", f"{ordered}"]
        found.append(Step("put neurons where their heads are", arguments, ordered))
        model = f"{ordered}"
    plan = kept / "plan.json"
    if args.speedup is None:
        goal = ["--max-ppl-increase", f"{args.max_loss:g}"]
    else:
        goal = ["--speedup", f"{args.speedup:g}"]
    arguments = ["search", model, *goal, *tp, *text, "--device", args.device]
    arguments += ["--link", args.link] if args.link else []
    arguments += ["--methods", ALONE if args.tp == 1 else BETWEEN_RANKS]
    arguments += ["--minutes", f"{_SEARCH * args.minutes:g}", "--out", f"{plan}"]
    found.append(Step("search a plan", arguments, plan))

    minutes = _RECOVERY * args.minutes
    own = max(_LEAST_OWN_TOKENS, min(_MOST_OWN_TOKENS, int(minutes) * _OWN_TOKENS))
    arguments = ["recover", model, "--plan", f"{plan}", *tp, *text]
    arguments += ["--own-text", f"{own}", "--minutes", f"{minutes:g}", "--out", f"{args.out}"]
    found.append(Step("win quality back", arguments, args.out))
    shown = [kept / "plan-report.json", args.out / "recovery.json"]
    if can_measure:
        out = kept / "verify.json"
        arguments = ["verify", f"{args.out}", *tp, "--out", f"{out}"]
        found.append(Step("check it on this machine", arguments, out))
        arguments = ["bench", model, "--plans", f"plain,{plan}", *tp, "--parts", "throughput"]
        bench = kept / "bench.json"
        arguments += ["--rounds", "3", "--out", f"{bench}"]
        found.append(Step("measure it beside plain vLLM", arguments, None))
        shown.append(bench)
        for name, asked, plan_of in (
            ("plain", model, "plain"),
            ("tuned", f"{args.out}", "carried"),
        ):
            out = kept / f"answers-{name}.json"
            arguments = ["eval", asked, "--plan", plan_of, "--answers", "--out", f"{out}"]
            if args.tp > 1:
                arguments += [f"--server-args=--tensor-parallel-size {args.tp}"]
            found.append(Step(f"ask {name} twenty prompts", arguments, out))
            shown.append(out)
        out = kept / "generation.json"
        arguments = ["eval", f"{args.out}", "--plan", "carried", "--made-from", model, *_GENERATE]
        flags = ["--enforce-eager", *["--tensor-parallel-size", f"{args.tp}"] * (args.tp > 1)]
        arguments += [f"--server-args={' '.join(flags)}", "--out", f"{out}"]
        found.append(Step("let both write, and judge it", arguments, out))
        shown.append(out)
    arguments = ["report", *map(str, shown), "--out", f"{args.out / REPORT}"]
    found.append(Step("write the page", arguments, None))
    return found


def _check(args: argparse.Namespace) -> None:
    """Refuse what is wrong before anything long begins."""
    ModelShape.from_config(read_original_config(args.model))
    if args.device != THIS:
        device_named(args.device)
    if args.minutes <= 0:
        raise UserError(f"--minutes {args.minutes:g} is too short; allowed: more than 0")
    if args.tp > 1 and not args.link:
        raise UserError(f"--tp {args.tp} needs a --link; allowed: {', '.join(LINKS)}")
    if not _kept(args).exists():
        export.check_out(args.out)


def _kept(args: argparse.Namespace) -> Path:
    """Name the folder beside the result where all else is kept."""
    out: Path = args.out
    return out.with_name(f"{out.name}.tune")


def _can_measure(args: argparse.Namespace) -> bool:
    return args.device == THIS and args.tp <= (len(gpus()) or CORES)
