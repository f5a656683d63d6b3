"""`depthpar eval`: what plans cost in quality."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_depthpar.checkpoint.config import read_config
from vllm_depthpar.cli.generation import (
    add_generation_arguments,
    generation_settings,
    generation_tables,
)
from vllm_depthpar.cli.quality_table import quality_table
from vllm_depthpar.cli.types import DTYPES, MODEL_HELP, PLAN_HELP, at_least, out_file, path_or_name
from vllm_depthpar.errors import UserError
from vllm_depthpar.evaluate import answers, generation, lm_eval_tasks, served
from vllm_depthpar.launch.variants import Variant, usual, variants
from vllm_depthpar.plan import Plan, resolve
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.util import files
from vllm_depthpar.util.provenance import origin

# The prompts of `evaluate.answers`.
_TWENTY = ""


def add(commands: Any) -> None:
    """Register the subcommand."""
    evaluate = commands.add_parser("eval", help="measure what plans cost in quality")
    evaluate.add_argument("model", type=path_or_name, metavar="MODEL", help=MODEL_HELP)
    evaluate.add_argument(
        "--plan",
        action="append",
        metavar="P",
        help=f"{PLAN_HELP}, 'carried' for the checkpoint's own, or 'plain' for vLLM's own model; "
        "repeatable (plain and auto, or carried)",
    )
    evaluate.add_argument(
        "--out", type=out_file(), metavar="FILE", help="write the numbers as JSON"
    )
    evaluate.add_argument(
        "--seed",
        type=int,
        default=1234,
        help="of all that is drawn: tasks' examples, prompts, questions, answers (1234)",
    )
    evaluate.add_argument(
        "--server-args",
        default="",
        metavar="ARGS",
        help="more flags for vllm serve, as one argument: --server-args='--dtype float32 ...'",
    )
    add_text_arguments(evaluate)
    add_task_arguments(evaluate)
    add_generation_arguments(evaluate)
    evaluate.add_argument(
        "--answers",
        type=path_or_name,
        nargs="?",
        const=_TWENTY,
        metavar="FILE",
        help="answers side by side, over a `vllm serve` for each plan, to twenty prompts of many "
        "kinds, or to those of FILE, one a line",
    )
    evaluate.set_defaults(run=_run)


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `measure_texts` needs to know."""
    group = parser.add_argument_group(
        "text", "perplexity, and KL divergence from the unmodified model"
    )
    group.add_argument(
        "--text", type=path_or_name, nargs="+", default=[], metavar="FILE", help="UTF-8 text"
    )
    group.add_argument("--window", type=at_least(2), default=512, help="tokens a window (512)")
    group.add_argument(
        "--stride", type=at_least(1), metavar="N", help="from window to window (no overlap)"
    )
    group.add_argument(
        "--tokens", type=at_least(1), metavar="N", help="count at most N of each text (all)"
    )
    group.add_argument(
        "--tp",
        type=at_least(1),
        metavar="N",
        help="tensor-parallel size, on which drop_sync and desync depend (the plans' own, else 1)",
    )
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="(auto)")


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run_tasks` needs to know."""
    group = parser.add_argument_group(
        "tasks", "lm-evaluation-harness, over a `vllm serve` for each plan; needs the extra `eval`"
    )
    group.add_argument(
        "--tasks",
        type=path_or_name,
        nargs="+",
        metavar="T",
        help="names that lm-eval knows, or YAML files",
    )
    group.add_argument(
        "--limit", type=at_least(1), metavar="N", help="only the first N documents of each task"
    )
    group.add_argument(
        "--num-fewshot", type=at_least(0), metavar="K", help="examples in a prompt (the task's own)"
    )


def _run(args: argparse.Namespace) -> str:
    if not (args.tasks or args.text or args.generate is not None or args.answers is not None):
        raise UserError(
            "nothing to measure; allowed: --text FILE ..., --tasks NAME ..., --answers, --generate"
        )
    plans = variants(args.model, args.plan or usual(read_config(args.model)))
    loaded = lm_eval_tasks.load_tasks(args.tasks) if args.tasks else {}
    server_args = _server_args(args)
    writing = generation_settings(args, server_args)
    prompts = None if args.answers is None else answers.read_prompts(args.answers or None)
    report: dict[str, Any] = {}
    shown = []
    if args.text:
        report["text"] = measure_texts(args, plans)
        shown.append(text_table(report["text"]))
    if args.tasks:
        settings = lm_eval_tasks.TaskSettings(args.limit, args.num_fewshot, args.seed, server_args)
        report["tasks"] = lm_eval_tasks.run_tasks(args.model, plans, loaded, settings)
        shown.append(lm_eval_tasks.task_table(report["tasks"]))
    if prompts is not None:
        report["answers"] = answers.ask(args.model, plans, prompts, server_args)
        shown.append(answers.shown(report["answers"]))
    if writing:
        report["generate"] = generation.run_generation(
            args.model, plans, writing, made_from=args.made_from
        )
        shown.append(generation_tables(report["generate"]))
    if args.out:
        files.write_json(args.out, report)
    return "\n\n".join(shown)


def measure_texts(args: argparse.Namespace, plans: Sequence[Variant]) -> dict[str, Any]:
    """Measure plans on the texts. The report is JSON-ready: what was measured with what, and for
    each plan and text the perplexity and the KL divergence from the unmodified model, nats per
    token."""
    from vllm_depthpar.evaluate.suite import Suite, open_model, read_texts, reported

    layers = ModelShape.from_config(read_config(args.model)).layers
    resolved = [resolve(one.spec or "identity", layers) for one in plans]
    ranks = _ranks(args.tp, resolved)
    texts = read_texts(args.model, args.text, args.window, args.stride, args.tokens)
    suite = Suite(open_model(args.model, args.dtype, ranks=ranks), texts)
    found = suite.measure(resolved, "Text")
    return {
        **origin("depthpar"),
        "model": Path(args.model).name,
        "seed": args.seed,
        "tp": ranks,
        **suite.described(),
        "plans": [
            {**asdict(one), "depth": plan.depth, "results": reported(of_plan)}
            for one, plan, of_plan in zip(plans, resolved, found, strict=True)
        ],
    }


def _ranks(given: int | None, plans: Sequence[Plan]) -> int:
    """Choose the tensor-parallel size whose models to measure.

    Raises:
        UserError: the plans were made for several.
    """
    sizes = sorted({plan.tp or 1 for plan in plans if plan.depends_on_ranks})
    if given is None and len(sizes) > 1:
        raise UserError(
            f"the plans were made for the tensor-parallel sizes {', '.join(map(str, sizes))}; "
            f"allowed: --tp for all of them"
        )
    return given or (sizes[0] if sizes else 1)


def text_table(report: dict[str, Any]) -> str:
    """Make a Markdown table of a texts' report, a row for each plan."""
    rows = [([plan["label"], str(plan["depth"])], plan["results"]) for plan in report["plans"]]
    counted = "; ".join(
        f"{text['text']}: {text['tokens_counted']} tokens counted, in {text['windows']} windows of "
        f"{text['window']}, {text['counted_per_window']} of each"
        for text in report["texts"]
    )
    return f"{quality_table(['plan', 'blocks'], rows)}\n\n{counted}; {report['dtype']}"


def _server_args(args: argparse.Namespace) -> tuple[str, ...]:
    try:
        return served.check_server_args(shlex.split(args.server_args))
    except ValueError as error:
        raise UserError(f"--server-args: {error}") from None
