"""What the metrics cost: decoding steps of one plan with them beside steps without, in short turns.

An engine for each setting of DEPTHPAR_METRICS; all decode batches of the same prompts at once, and
take turns of a few steps, all but one stopped. What slows a machine down for longer than a turn
meets them all. A turn has as many steps as every how many one is timed, or a multiple. The other
figure is direct: seconds inside the package's hooks, of those in forward passes.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout: this is a script

from benchmarks import common
from vllm_depthpar.bench.rounds import awake, in_turn, pause
from vllm_depthpar.checkpoint import bundled
from vllm_depthpar.checkpoint.config import read_config
from vllm_depthpar.cli.types import at_least
from vllm_depthpar.launch.engine import Worker, flags_of, make_engine
from vllm_depthpar.metrics import metric_files
from vllm_depthpar.util import files, markdown
from vllm_depthpar.util.progress import step_bar

if TYPE_CHECKING:
    from vllm import LLM

OFF = "0"


def main() -> None:
    """Measure, print a table, write the JSON."""
    args = _parser().parse_args()
    model = str(args.model or bundled.prepare())
    (plan,) = args.plans
    (variant,) = [one for one in common.beside_plain(model, [plan]) if one.spec is not None]
    tokens = (args.rounds + 2) * args.steps + 1
    flags = [*variant.flags]
    flags += flags_of(
        {
            "dtype": args.dtype,
            "tensor_parallel_size": args.tp,
            "enforce_eager": args.eager,
            "max_model_len": args.prompt_tokens + tokens,
            "max_num_seqs": max(args.batches),
        }
    )
    vocab = read_config(model)["vocab_size"]
    settings = [OFF, *args.every]
    turns: dict[str, dict[int, list[float]]] = {one: {} for one in settings}
    hooks: dict[str, dict[int, dict[str, float]]] = {one: {} for one in settings}
    with ExitStack() as stack, step_bar() as progress:
        total = len(settings) * (1 + (2 + args.rounds) * len(args.batches))
        task = progress.add_task("", total=total)
        engines = []
        for setting in settings:
            progress.update(task, description=f"starting {metric_files.ENV}={setting}")
            env = {**common.environment(variant, args.tp), metric_files.ENV: setting}
            engine = Worker(setting, serve, model, flags, args.eager, env=env)
            stack.callback(engine.stop)
            engine.receive()
            pause(engine)
            engines.append(engine)
            progress.advance(task)
        for batch in args.batches:
            found: dict[str, list[float]] = {setting: [] for setting in settings}
            numbers = random.Random(batch)
            prompts = [numbers.choices(range(vocab), k=args.prompt_tokens) for _ in range(batch)]
            for engine in engines:
                _resumed(engine, (prompts, tokens))
                progress.advance(task)
            for number in range(-1, args.rounds):
                for engine in in_turn(engines, number):
                    progress.update(task, description=f"batch {batch}")
                    seconds = _resumed(engine, args.steps)
                    if number >= 0:
                        found[engine.label].append(seconds)
                    progress.advance(task)
            for engine in engines:
                turns[engine.label][batch] = found[engine.label]
                hooks[engine.label][batch] = _resumed(engine, None)

    rows, results = [], {}
    for setting in settings[1:]:
        results[setting] = {
            batch: {**compared(turns[OFF][batch], turns[setting][batch]), **hooks[setting][batch]}
            for batch in args.batches
        }
        for batch, one in results[setting].items():
            rows.append(
                [
                    setting,
                    f"{batch}",
                    f"{1e3 * middle(turns[OFF][batch]) / args.steps:.1f}",
                    "{median:.4f} ({low:.4f} to {high:.4f})".format(**one),
                    _share(one),
                ]
            )
    header = [metric_files.ENV, "batch", "ms a step, without", "speed, to without", "in hooks"]
    print(markdown.table(header, rows))
    print(
        f"\n{Path(model).name}, {variant.plan}, TP = {args.tp}, {args.rounds} turns of "
        f"{args.steps} steps; in brackets the 95 % interval of the median"
    )
    if args.out:
        report = {
            **common.facts(),
            "model": Path(model).name,
            "plan": variant.plan,
            "tp": args.tp,
            "eager": args.eager,
            "dtype": args.dtype,
            "steps_of_a_turn": args.steps,
            "to_off": results,
            "seconds_of_turns": turns,
        }
        files.write_json(args.out, report)


def compared(without: list[float], with_: list[float]) -> dict[str, float]:
    """Speed to that without, turn by turn: the median, and the 95 % interval of the median, which
    is between two order statistics whatever the distribution."""
    ratios = sorted(a / b for a, b in zip(without, with_, strict=True))
    count = len(ratios)
    half = 0.98 * math.sqrt(count)
    low, high = max(0, math.floor(count / 2 - half)), min(count - 1, math.ceil(count / 2 + half))
    return {"median": middle(ratios), "low": ratios[low], "high": ratios[high]}


def middle(values: list[float]) -> float:
    """The middle one."""
    return sorted(values)[len(values) // 2]


def _share(one: dict[str, float]) -> str:
    if not one["passes"]:  # other processes' hooks
        return ""
    each = 1e6 * one["hook_seconds"] / one["passes"]
    return f"{each:.0f} us a pass, {one['hook_seconds'] / one['pass_seconds']:.3%}"


def _resumed(engine: Worker, request: object) -> Any:
    with awake(engine):
        return engine.ask(request)


def serve(connection: Connection, model: str, flags: list[str], eager: bool) -> None:
    """One engine: takes (prompts, tokens), which it prefills; a number of steps, of which it sends
    the seconds; None, for what the hooks took since it took prompts."""
    if eager:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    engine = make_engine(model, flags)
    spent = watch_hooks(engine)
    connection.send("ready")
    while True:
        try:
            job = connection.recv()
        except EOFError:  # the benchmark is over
            return
        if job is None:
            answer: object = dict(spent)
            while engine.llm_engine.has_unfinished_requests():
                engine.llm_engine.step()
        elif isinstance(job, int):
            begun = time.perf_counter()
            for _ in range(job):
                engine.llm_engine.step()
            answer = time.perf_counter() - begun
        else:
            answer = None
            add(engine, *job)
            spent.update(dict.fromkeys(spent, 0))
        connection.send(answer)


def add(engine: LLM, prompts: list[list[int]], tokens: int) -> None:
    """Requests that decode together from the next step on."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    for index, prompt in enumerate(prompts):
        name = f"{time.monotonic_ns()}-{index}"
        engine.llm_engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), params)
    engine.llm_engine.step()


def watch_hooks(engine: LLM) -> dict[str, float]:
    """Time the hooks of the model, where it is in this process: {"hook_seconds", "pass_seconds",
    "passes"}, which grow with every forward pass."""
    spent = {"hook_seconds": 0.0, "pass_seconds": 0.0, "passes": 0.0}
    executor: Any = engine.llm_engine.model_executor
    worker = getattr(getattr(executor, "driver_worker", None), "worker", None)
    if worker is None:  # tensor-parallel ranks have processes of their own
        return spent
    model = worker.model_runner.model
    begun = 0.0

    def timed(hook: Callable[..., None], before: bool) -> Callable[..., None]:
        def run(*args: object) -> None:
            nonlocal begun
            start = time.perf_counter()
            hook(*args)
            end = time.perf_counter()
            spent["hook_seconds"] += end - start
            if before:
                begun = end
            else:
                spent["pass_seconds"] += start - begun
                spent["passes"] += 1

        return run

    for hooks, before in ((model._forward_pre_hooks, True), (model._forward_hooks, False)):
        for key, hook in hooks.items():
            hooks[key] = timed(hook, before)
    return spent


def _parser() -> argparse.ArgumentParser:
    parser = common.arguments("Decoding steps with metrics beside steps without.", rounds=200)
    positive = at_least(1)
    parser.add_argument("model", nargs="?", help=common.MODEL_HELP)
    parser.add_argument("--every", nargs="+", default=[str(metric_files.EVERY)], help="(8)")
    parser.add_argument("--steps", type=positive, default=8, help="of a turn (8)")
    parser.add_argument("--tp", type=positive, default=1, help="(1)")
    parser.add_argument("--batches", nargs="+", type=positive, default=[1, 8], help="(1 8)")
    parser.add_argument("--prompt-tokens", type=positive, default=32, help="a sequence (32)")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    return parser


if __name__ == "__main__":
    common.run_main(main)
