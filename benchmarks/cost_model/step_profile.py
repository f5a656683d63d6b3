"""What a decoding step is made of: operators and their time, a plan beside plain vLLM.

Each variant has an engine of its own, one after the other; PyTorch's profiler sees some steps of
one batch, and others run without it, for the time that a step really takes. An operator counts if
it calls no other (a kernel, or on a CPU the loop that it is); views, which compute nothing, count
apart. Compiled code shows the operators that it calls, not the kernels that it is.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout: this is a script

from benchmarks import common
from vllm_depthpar.checkpoint import bundled
from vllm_depthpar.checkpoint.config import read_config
from vllm_depthpar.cli.types import at_least
from vllm_depthpar.launch.engine import Worker, flags_of, make_engine
from vllm_depthpar.launch.variants import PLAIN
from vllm_depthpar.plan import resolve
from vllm_depthpar.util import files, markdown
from vllm_depthpar.util.progress import step_bar

if TYPE_CHECKING:
    from torch.autograd.profiler_util import FunctionEvent
    from vllm import LLM

PROMPT_TOKENS = 32
WARM_UP = 4
# Operators that compute nothing: they describe memory in another way, or reserve it.
VIEWS = (
    "_reshape_alias", "alias", "as_strided", "chunk", "detach", "empty", "empty_like",
    "empty_strided", "expand", "narrow", "permute", "reshape", "resolve_conj", "resolve_neg",
    "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind",
    "unsqueeze", "view",
)  # fmt: skip


def main() -> None:
    """Profile, print a table, write the JSON."""
    args = _parser().parse_args()
    model = str(args.model or bundled.prepare())
    layers = read_config(model)["num_hidden_layers"]
    options = {
        "dtype": args.dtype,
        "enforce_eager": args.eager,
        "max_model_len": PROMPT_TOKENS + 2 * (WARM_UP + args.steps) + 1,
        "max_num_seqs": args.batch,
    }
    chosen = common.beside_plain(model, args.plans)
    found: dict[str, dict[str, Any]] = {}
    with step_bar() as progress:
        task = progress.add_task("", total=len(chosen))
        for one in chosen:
            progress.update(task, description=one.label)
            flags = [*flags_of(options), *one.flags]
            worker = Worker(one.label, serve, model, flags, args, env=common.environment(one))
            try:
                found[one.label] = worker.receive()
            finally:
                worker.stop()
            depth = layers if one.spec is None else resolve(one.spec, layers).depth
            found[one.label]["blocks"] = depth
            progress.advance(task)
    print(table(found))
    if args.out:
        mode = "eager" if args.eager else "compiled"
        setting = {"batch": args.batch, "steps": args.steps, "mode": mode, "dtype": args.dtype}
        files.write_json(
            args.out, {**common.facts(), "model": Path(model).name, **setting, "variants": found}
        )


def serve(connection: Connection, model: str, flags: list[str], args: argparse.Namespace) -> None:
    """One engine: send what its steps are made of."""
    if args.eager:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    connection.send(profiled(make_engine(model, flags), args.batch, args.steps))


def profiled(engine: LLM, batch: int, steps: int) -> dict[str, Any]:
    """Steps of one decoding batch.

    Returns:
        seconds: of a step, without the profiler (median).
        seconds_in_operators: the sum of their own times in a step, with the profiler.
        operators: {name: times in a step}, of those that call no other and are no views.
        views: their number in a step.
        operator_seconds: {name: own seconds in a step}, the ten largest.
    """
    from torch.profiler import ProfilerActivity, profile
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    params = SamplingParams(
        temperature=0, max_tokens=2 * (WARM_UP + steps), ignore_eos=True, detokenize=False
    )
    for index in range(batch):
        prompt = TokensPrompt(prompt_token_ids=[1 + index] * PROMPT_TOKENS)
        engine.llm_engine.add_request(f"{index}", prompt, params)
    # One step prefills; the rest decode.
    for _ in range(1 + WARM_UP):
        engine.llm_engine.step()
    seconds = []
    for _ in range(steps):
        begun = time.perf_counter()
        engine.llm_engine.step()
        seconds.append(time.perf_counter() - begun)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            engine.llm_engine.step()
    counts: Counter[str] = Counter()
    own: Counter[str] = Counter()
    views = 0
    for event in profiler.events():
        own[event.name] += event.self_cpu_time_total / 1e6
        if not list(_operators(event)):
            short = event.name.rpartition("::")[2]
            if short in VIEWS:
                views += 1
            else:
                counts[event.name] += 1
    return {
        "seconds": statistics.median(seconds),
        "seconds_in_operators": sum(own.values()) / steps,
        "operators": {name: number / steps for name, number in counts.most_common()},
        "views": views / steps,
        "operator_seconds": {name: value / steps for name, value in own.most_common(10)},
    }


def _operators(event: FunctionEvent) -> Iterator[FunctionEvent]:
    """Those that an operator calls and that compute."""
    for child in event.cpu_children:
        if child.name.rpartition("::")[2] not in VIEWS:
            yield child
        yield from _operators(child)


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown, a row for each variant."""
    header = ["", "blocks", "operators a step", "of them a block", "views", "ms a step"]
    header += ["in operators, profiled"]
    plain = found[PLAIN]
    rows = []
    for label, one in found.items():
        total, whole = (sum(of["operators"].values()) for of in (one, plain))
        fewer = plain["blocks"] - one["blocks"]
        rows.append(
            [
                label,
                f"{one['blocks']}",
                f"{total:.0f}",
                f"{(whole - total) / fewer:.1f}" if fewer else "",
                f"{one['views']:.0f}",
                f"{1e3 * one['seconds']:.1f}",
                f"{1e3 * one['seconds_in_operators']:.1f}",
            ]
        )
    return markdown.table(header, rows)


def _parser() -> argparse.ArgumentParser:
    positive = at_least(1)
    parser = argparse.ArgumentParser(description="Operators of a decoding step.")
    parser.add_argument("model", nargs="?", help=common.MODEL_HELP)
    parser.add_argument("--plans", nargs="+", default=["auto"], metavar="PLAN", help="(auto)")
    parser.add_argument("--batch", type=positive, default=1, help="(1)")
    parser.add_argument("--steps", type=positive, default=20, help="(20)")
    parser.add_argument("--dtype", default="bfloat16", help="(bfloat16)")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON")
    return parser


if __name__ == "__main__":
    common.run_main(main)
