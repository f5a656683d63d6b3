"""Decode speed of plans beside plain vLLM's, on one machine, in turns.

Every contender has an engine of its own, all of them alive at once and one generating at a time:
A B C, B C A, C A B, ... so that whatever changes on the machine meets them all. A round's ratio
to plain comes from two neighbours in time; the table gives the median and the spread of those.

Speed is that of decoding alone: the tokens that arrive after the first one of every sequence,
over the time from there to the last token. Prompts are random, of one length; greedy sampling;
nothing ends a sequence early; no detokenization. The first run of each batch size is not counted.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common

from vllm_depthpar import bundled
from vllm_depthpar.checkpoint import read_config

if TYPE_CHECKING:
    from vllm import LLM


def main() -> None:
    """Measure, print a table, write the JSON."""
    args = _parser().parse_args()
    model = str(args.model or bundled.prepare())
    contenders = common.contenders(model, args.plans)
    longest = args.prompt_tokens + args.tokens
    options = {
        "dtype": args.dtype,
        "enforce_eager": args.eager,
        "max_model_len": longest,
        "max_num_seqs": max(args.batches),
        # So that all prompts of a batch go through in one step.
        "max_num_batched_tokens": max(longest, max(args.batches) * args.prompt_tokens),
    }
    vocab = read_config(model)["vocab_size"]
    job = {"prompt_tokens": args.prompt_tokens, "tokens": args.tokens, "vocab": vocab}

    # label -> batch -> tokens per second of each round
    speeds: dict[str, dict[int, list[float]]] = {
        one.label: {batch: [] for batch in args.batches} for one in contenders
    }
    idle: list[float] = []
    start = time.monotonic()
    with ExitStack() as stack, common.progress() as progress:
        total = len(contenders) * (1 + (1 + args.rounds) * len(args.batches))
        task = progress.add_task("", total=total)
        workers = []
        for one in contenders:
            progress.update(task, description=f"starting {one.label}")
            worker = common.Worker(one, serve, model, options)
            stack.callback(worker.stop)
            worker.receive()
            workers.append(worker)
            progress.advance(task)
        for number in range(-1, args.rounds):
            for batch in args.batches:
                for worker in common.in_turn(workers, number):
                    progress.update(task, description=f"{worker.label}, batch {batch}")
                    speed, idle_share = worker.ask({**job, "batch": batch, "seed": number})
                    if number >= 0:
                        speeds[worker.label][batch].append(speed)
                        idle.append(idle_share)
                    progress.advance(task)

    plain = speeds[common.PLAIN]
    ratios = {
        label: {
            batch: [a / b for a, b in zip(by_batch[batch], plain[batch], strict=True)]
            for batch in args.batches
        }
        for label, by_batch in speeds.items()
    }
    columns = ["", "blocks"]
    columns += [f"batch {batch}: {what}" for batch in args.batches for what in ("tok/s", "ratio")]
    rows = []
    for one in contenders:
        row = [f"`{one.label}`", one.plan]
        for batch in args.batches:
            row.append(common.spread(speeds[one.label][batch], ".1f"))
            row.append(common.spread(ratios[one.label][batch]) if one.spec else "")
        rows.append(row)
    print(common.markdown(columns, rows))
    print(
        f"\n{Path(model).name}, {args.rounds} rounds, median (min to max); ratios are per round. "
        f"Waiting engines took at most {max(idle):.1%} of a core."
    )
    if args.out:
        report: dict[str, Any] = {
            **common.facts(),
            "model": Path(model).name,
            "engine": options,
            "job": job,
            "seconds": round(time.monotonic() - start),
            "idle_engine_cores_max": max(idle),
            "contenders": [
                {
                    "label": one.label,
                    "plan": one.plan,
                    "batches": {
                        batch: {
                            "tokens_per_second": common.summary(speeds[one.label][batch]),
                            "ratio_to_plain": common.summary(ratios[one.label][batch]),
                            "rounds": speeds[one.label][batch],
                        }
                        for batch in args.batches
                    },
                }
                for one in contenders
            ],
        }
        common.write_json(args.out, report)


def serve(connection: Connection, spec: object, model: str, options: dict[str, Any]) -> None:
    """One engine: answer each job with (tokens per second, cores it used while waiting for it)."""
    engine = common.make_engine(model, spec, **options)
    connection.send("ready")
    while True:
        waited, used = time.perf_counter(), _cpu_seconds()
        try:
            job = connection.recv()
        except EOFError:  # the benchmark is over
            return
        idle = (_cpu_seconds() - used) / (time.perf_counter() - waited)
        connection.send((decode_speed(engine, **job), idle))


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system


def decode_speed(
    engine: LLM, *, batch: int, prompt_tokens: int, tokens: int, vocab: int, seed: int
) -> float:
    """Tokens per second of `batch` sequences together, from their first tokens to their last."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    numbers = random.Random(seed)
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    for index in range(batch):
        prompt = TokensPrompt(prompt_token_ids=numbers.choices(range(vocab), k=prompt_tokens))
        engine.llm_engine.add_request(f"{seed}-{batch}-{index}", prompt, params)
    counts: dict[str, int] = {}
    first, start = 0, 0.0
    while engine.llm_engine.has_unfinished_requests():
        for output in engine.llm_engine.step():
            counts[output.request_id] = len(output.outputs[0].token_ids)
        if not first and len(counts) == batch:
            first, start = sum(counts.values()), time.perf_counter()
    end = time.perf_counter()
    if sum(counts.values()) != batch * tokens:
        raise RuntimeError(f"{batch * tokens} tokens asked for, {sum(counts.values())} came")
    return (batch * tokens - first) / (end - start)


def _parser() -> argparse.ArgumentParser:
    parser = common.arguments("Decode speed of plans beside plain vLLM's.")
    positive = common.at_least(1)
    parser.add_argument("model", nargs="?", help=common.MODEL_HELP)
    parser.add_argument("--batches", nargs="+", type=positive, default=[1, 8], help="(1 8)")
    parser.add_argument("--tokens", type=common.at_least(2), default=64, help="a sequence (64)")
    parser.add_argument("--prompt-tokens", type=positive, default=32, help="a sequence (32)")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    return parser


if __name__ == "__main__":
    common.run_main(main)
