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
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median_high
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout: this is a script

from benchmarks import common
from vllm_depthpar.bench import memory
from vllm_depthpar.bench.memory import GIB
from vllm_depthpar.bench.stages import started
from vllm_depthpar.checkpoint import bundled
from vllm_depthpar.checkpoint.config import read_config
from vllm_depthpar.cli.types import at_least
from vllm_depthpar.launch import kv_cache
from vllm_depthpar.launch.engine import Worker, flags_of, make_engine
from vllm_depthpar.launch.variants import Variant
from vllm_depthpar.metrics import metric_files
from vllm_depthpar.plan import resolve
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.util import markdown

if TYPE_CHECKING:
    from vllm import LLM

OFF = "0"
HOOKS = ("hook_seconds", "pass_seconds", "passes")


@dataclass(frozen=True)
class Setting:
    """What DEPTHPAR_METRICS is."""

    label: str


@dataclass(frozen=True)
class Turn:
    """The load: some steps of a batch that decodes."""

    batch: int
    steps: int

    @property
    def key(self) -> str:
        """Names it in a record."""
        return f"batch {self.batch}"


class Decoding:
    """An engine for each, which decodes one batch from its start on; see `turns.Stage`.

    Args:
        flags: of the engine, but for what it has to bear.
        tokens: that the engine can generate.
    """

    def __init__(
        self, args: argparse.Namespace, model: str, variant: Variant, batch: int, tokens: int
    ) -> None:
        self._args, self._model, self._variant = args, model, variant
        numbers = random.Random(batch)
        vocab = read_config(model)["vocab_size"]
        self._prompts = [numbers.choices(range(vocab), k=args.prompt_tokens) for _ in range(batch)]
        self._tokens = tokens

    def start(self, variant: Setting, stack: ExitStack) -> tuple[Worker, dict[str, Any]]:
        """See `turns.Stage`."""
        args = self._args
        flags = [*self._variant.flags]
        flags += flags_of(
            {
                "dtype": args.dtype,
                "tensor_parallel_size": args.tp,
                "enforce_eager": args.eager,
                "max_model_len": args.prompt_tokens + self._tokens,
                "max_num_seqs": max(args.batches),
            }
        )
        env = {**common.environment(self._variant, args.tp), metric_files.ENV: variant.label}
        engine = Worker(variant.label, serve, self._model, flags, args.eager, env=env)
        stack.callback(engine.stop)
        took = started(engine, engine.receive)
        engine.ask((self._prompts, self._tokens))
        return engine, took

    def measure(self, running: Worker, load: Turn, _: int) -> dict[str, float]:
        """Seconds of a turn, and what hooks took of them: `seconds` and `HOOKS`."""
        found: dict[str, float] = running.ask(load.steps)
        return found


def main() -> None:
    """Measure, print a table, write the JSON."""
    args = _parser().parse_args()
    model = str(args.model or bundled.prepare())
    (plan,) = args.plans
    (variant,) = [one for one in common.beside_plain(model, [plan]) if one.spec is not None]
    tokens = (args.rounds + 2) * args.steps + 1
    settings = [Setting(label) for label in (OFF, *args.every)]
    empty = {"batches": {str(batch): common.NO_ROUNDS for batch in args.batches}}
    plans = {variant.label: variant.digest}
    record = common.open_record(args, model, empty=empty, plans=plans)
    save = common.saver(record, args.out)
    shape = ModelShape.from_config(read_config(model)).in_dtype(args.dtype)
    resolved = resolve(variant.spec, shape.layers)
    kv_bytes, processes = kv_cache.reserved_bytes(GIB), args.tp + int(args.tp > 1)
    each = memory.estimate(shape, resolved, args.tp, kv_bytes, processes)
    needed = {one.label: each for one in settings}
    rows: list[list[str]] = []
    results: dict[str, dict[int, dict[str, float]]] = {}
    for batch in args.batches:
        known, turn = record["batches"][str(batch)], Turn(batch, args.steps)
        if len(known["rounds"]) < args.rounds:
            memory.check(needed, len(settings), "fewer --every")
        stage = Decoding(args, model, variant, batch, tokens)
        common.take_turns(stage, settings, [turn], known, args.rounds, save)
        without = common.figures_of(known, OFF, turn.key, "seconds")
        for setting in args.every:
            seconds, *hooks = (
                common.figures_of(known, setting, turn.key, name) for name in ("seconds", *HOOKS)
            )
            one = {**compared(without, seconds), **dict(zip(HOOKS, map(sum, hooks), strict=True))}
            results.setdefault(setting, {})[batch] = one
            rows.append(
                [
                    setting,
                    f"{batch}",
                    f"{1e3 * median_high(without) / args.steps:.1f}",
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
    record |= {
        "model": Path(model).name,
        "plan": variant.plan,
        "tp": args.tp,
        "eager": args.eager,
        "dtype": args.dtype,
        "steps_of_a_turn": args.steps,
        "to_off": results,
    }
    save()


def compared(without: list[float], with_: list[float]) -> dict[str, float]:
    """Speed to that without, turn by turn: the median, and the 95 % interval of the median, which
    is between two order statistics whatever the distribution."""
    ratios = sorted(a / b for a, b in zip(without, with_, strict=True))
    count = len(ratios)
    half = 0.98 * math.sqrt(count)
    low, high = max(0, math.floor(count / 2 - half)), min(count - 1, math.ceil(count / 2 + half))
    return {"median": median_high(ratios), "low": ratios[low], "high": ratios[high]}


def _share(one: dict[str, float]) -> str:
    if not one["passes"]:  # other processes' hooks
        return ""
    each = 1e6 * one["hook_seconds"] / one["passes"]
    return f"{each:.0f} us a pass, {one['hook_seconds'] / one['pass_seconds']:.3%}"


def serve(connection: Connection, model: str, flags: list[str], eager: bool) -> None:
    """One engine: takes (prompts, tokens), which it prefills; then a number of steps, of which it
    sends `seconds` and `HOOKS`."""
    if eager:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    engine = make_engine(model, flags)
    add(engine, [[1]], tokens=1)  # the model has its hooks from its first step on
    while engine.llm_engine.has_unfinished_requests():
        engine.llm_engine.step()
    spent = watch_hooks(engine)
    connection.send("ready")
    while True:
        try:
            job = connection.recv()
        except EOFError:  # the benchmark is over
            return
        if not isinstance(job, int):
            add(engine, *job)
            connection.send(None)
            continue
        spent.update(dict.fromkeys(spent, 0.0))
        begun = time.perf_counter()
        for _ in range(job):
            engine.llm_engine.step()
        connection.send({"seconds": time.perf_counter() - begun, **spent})


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
    """Time the hooks of the model, where it is in this process: `HOOKS`, which grow with every
    forward pass."""
    spent = dict.fromkeys(HOOKS, 0.0)
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
