"""`depthpar eval --generate`: its arguments, and its report as people read it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from vllm_depthpar.cli.types import at_least, path_or_name
from vllm_depthpar.errors import UserError
from vllm_depthpar.evaluate.generation import LENGTHS, GenerationSettings
from vllm_depthpar.util.markdown import table


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `generation_settings` reads."""
    group = parser.add_argument_group(
        "generation", "what plans write, over a `vllm serve` for each plan"
    )
    group.add_argument(
        "--generate",
        type=at_least(1),
        nargs="*",
        metavar="N",
        help=f"write answers, and describe them after N tokens ({' '.join(map(str, LENGTHS))})",
    )
    group.add_argument(
        "--prompts", type=at_least(1), default=16, metavar="N", help="of each kind (16)"
    )
    group.add_argument(
        "--questions",
        type=at_least(1),
        default=64,
        metavar="N",
        help="of each task that is made for chat models (64)",
    )
    group.add_argument(
        "--made-from",
        type=path_or_name,
        metavar="M",
        help="folder or hub name of the model that MODEL was recovered from, which then is the "
        "unmodified one that writes beside it and scores (MODEL itself)",
    )


def generation_settings(
    args: argparse.Namespace, server_args: tuple[str, ...]
) -> GenerationSettings | None:
    """Read the settings; None where nothing is to be generated.

    Raises:
        UserError: something is said of what is not to be generated.
    """
    if args.generate is None:
        if args.made_from is not None:
            raise UserError(
                f"--made-from {args.made_from} says who scores what plans write; allowed: beside "
                f"--generate"
            )
        return None
    lengths = tuple(sorted(set(args.generate or LENGTHS)))
    return GenerationSettings(lengths, args.prompts, args.questions, args.seed, server_args)


def generation_tables(report: Mapping[str, Any]) -> str:
    """Make Markdown tables of a report: of the writing, of the drawn answers piece by piece, and of
    the tasks, if there are any."""
    shown = [_writing_table(report), _position_table(report)]
    if report["plans"][0]["tasks"]:
        shown.append(_task_table(report))
    return "\n\n".join(shown)


def _writing_table(report: Mapping[str, Any]) -> str:
    plans = report["plans"]
    rows = []
    for kind, about in plans[0]["writing"].items():
        for length in about["lengths"]:
            for plan in plans:
                found = plan["writing"][kind]["lengths"][length]
                rows.append([kind, length, plan["label"], *_writing_cells(found)])
    header = ["log-prob., drawn", "KL, drawn", "log-prob., greedy", "repeated, drawn"]
    header += ["repeated, greedy", "loops, greedy", "ended, drawn", "ended, greedy"]
    header += ["tokens, drawn", "tokens, greedy", "alike until", "same"]
    return table(["kind", "up to", "plan", *header], rows)


def _writing_cells(found: Mapping[str, Any]) -> list[str]:
    drawn, greedy = found["sampled"], found["greedy"]
    alike = ["", ""]
    if "same" in greedy:
        alike = [f"{greedy['median_tokens_alike']:g}", _percent(greedy["same"])]
    return [
        _with_error(drawn["log_probability"], 2),
        _with_error(drawn["kl"], 3),
        _with_error(greedy["log_probability"], 2),
        *(_percent(one["repeated_4_grams"]) for one in (drawn, greedy)),
        _percent(greedy["loops"]),
        *(_percent(one["ended"]) for one in (drawn, greedy)),
        *(f"{one['median_tokens']:g}" for one in (drawn, greedy)),
        *alike,
    ]


def _position_table(report: Mapping[str, Any]) -> str:
    plans = report["plans"]
    begins = {
        piece["begin"]: None
        for plan in plans
        for about in plan["writing"].values()
        for piece in about["by_position"]
    }
    rows = []
    for kind in plans[0]["writing"]:
        for plan in plans:
            pieces = {one["begin"]: one for one in plan["writing"][kind]["by_position"]}
            cells = [_with_error(pieces[at]["kl"], 3) if at in pieces else "-" for at in begins]
            rows.append([kind, plan["label"], *cells])
    return table(["kind", "KL, drawn, by position", *(f"from {at}" for at in begins)], rows)


def _task_table(report: Mapping[str, Any]) -> str:
    """Make a table with a row for each plan: shares of right answers with their 95 % intervals."""
    plans = report["plans"]
    tasks = plans[0]["tasks"]
    rows = [[plan["label"], *(_interval(plan["tasks"][task]) for task in tasks)] for plan in plans]
    (count,) = {of_task["questions"] for of_task in tasks.values()}
    return f"{table(['right answers', *tasks], rows)}\n\n{count} questions of each task"


def _with_error(figure: Mapping[str, float], digits: int) -> str:
    return f"{figure['value']:.{digits}f} ± {figure['stderr']:.{digits}f}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _interval(figure: Mapping[str, float]) -> str:
    low, high = (_percent(figure[end]) for end in ("low", "high"))
    return f"{_percent(figure['value'])} ({low} to {high})"
