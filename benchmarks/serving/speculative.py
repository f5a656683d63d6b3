"""The unmodified model, with a restructured one as its draft: what speculation gains.

Verified tokens are the unmodified model's own, so that whatever is gained loses no quality. Plain
vLLM and every (draft, tokens ahead) have an engine each and take turns, as in `depthpar bench`, all
but one paused.
The draft "ngram" is vLLM's prompt lookup: what followed the last tokens where they stood before.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout: this is a script

from benchmarks import common
from vllm_depthpar.bench.rounds import awake, in_turn, pause, spread, summary
from vllm_depthpar.checkpoint import bundled
from vllm_depthpar.cli.types import at_least
from vllm_depthpar.evaluate import texts
from vllm_depthpar.launch.engine import Worker, flags_of, make_engine
from vllm_depthpar.launch.variants import PLAIN, Variant
from vllm_depthpar.util import files, markdown
from vllm_depthpar.util.progress import step_bar

if TYPE_CHECKING:
    from vllm import LLM


NGRAM = "ngram"
# As in vLLM's documentation.
_LOOKUP = {"method": NGRAM, "prompt_lookup_max": 4}


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help=common.MODEL_HELP)
    parser.add_argument(
        "--drafts",
        nargs="+",
        required=True,
        metavar="DIR",
        help=f"of depthpar export or recover, or '{NGRAM}'",
    )
    positive = at_least(1)
    parser.add_argument("--ahead", nargs="+", type=positive, default=[1, 2, 4], help="(1 2 4)")
    parser.add_argument("--text", required=True, metavar="FILE", help="prompts are parts of it")
    parser.add_argument(
        "--ask", metavar="REQUEST", help="about each part, as a chat (go on with it)"
    )
    parser.add_argument("--prompts", type=positive, default=4, help="a round, in turn (4)")
    parser.add_argument("--prompt-tokens", type=positive, default=128, help="(128)")
    parser.add_argument("--tokens", type=at_least(2), default=64, help="an answer (64)")
    parser.add_argument("--rounds", type=positive, default=3, help="(3)")
    parser.add_argument("--dtype", default="bfloat16", help="(bfloat16)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON")
    args = parser.parse_args()
    model = str(args.model or bundled.prepare())
    prompts = _prompts(model, args)
    options = {
        "dtype": args.dtype,
        "enforce_eager": True,
        "max_model_len": max(map(len, prompts)) + args.tokens + max(args.ahead) + 1,
        "max_num_seqs": 1,
    }
    setups: list[tuple[str, dict[str, Any]]] = [(PLAIN, {})]
    for draft in args.drafts:
        for ahead in args.ahead:
            of_model = {"method": "draft_model", "model": str(Path(draft).resolve())}
            config = _LOOKUP if draft == NGRAM else of_model
            config = {**config, "num_speculative_tokens": ahead}
            setups.append((f"{Path(draft).name}, {ahead} ahead", {"speculative_config": config}))
    found: dict[str, list[dict[str, float]]] = {label: [] for label, _ in setups}
    with ExitStack() as stack, step_bar() as progress:
        task = progress.add_task("", total=len(setups) * (args.rounds + 2))
        workers = []
        for label, config in setups:
            progress.update(task, description=f"starting {label}")
            # A spec of any kind: the draft needs the plugin.
            env = common.environment(Variant(label, spec={} if config else None))
            worker = Worker(label, serve, model, flags_of({**options, **config}), env=env)
            stack.callback(worker.stop)
            worker.receive()
            pause(worker)
            workers.append(worker)
            progress.advance(task)
        for number in range(-1, args.rounds):
            for worker in in_turn(workers, number):
                progress.update(task, description=worker.label)
                with awake(worker):
                    answer = worker.ask((prompts, args.tokens))
                if number >= 0:
                    found[worker.label].append(answer)
                progress.advance(task)
    _report(args, model, options, found)


def _prompts(model: str, args: argparse.Namespace) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    windows = texts.cut(
        "prompts",
        texts.read(args.text),
        tokenizer,
        args.prompt_tokens,
        limit=args.prompts * args.prompt_tokens,
    )
    prompts: list[list[int]] = windows.tokens[: args.prompts].tolist()
    if args.ask:
        parts = tokenizer.batch_decode(prompts)
        chats = [[{"role": "user", "content": f"{args.ask}\n\n{part}"}] for part in parts]
        prompts = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_dict=False
        )
    return prompts


def serve(connection: Connection, model: str, flags: list[str]) -> None:
    """One engine: answer each job with its figures."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    engine = make_engine(model, flags)
    connection.send("ready")
    while True:
        try:
            prompts, tokens = connection.recv()
        except EOFError:  # the benchmark is over
            return
        connection.send(decode(engine, prompts, tokens))


def decode(engine: LLM, prompts: list[list[int]], tokens: int) -> dict[str, float]:
    """Decode greedily, one prompt after the other: tokens per second after each first token, and
    how many tokens a step of the unmodified model gave."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    seconds, steps, made = 0.0, 0, 0
    for index, prompt in enumerate(prompts):
        engine.llm_engine.add_request(
            f"{time.monotonic_ns()}-{index}", TokensPrompt(prompt_token_ids=prompt), params
        )
        count, begun = 0, 0.0
        while engine.llm_engine.has_unfinished_requests():
            for output in engine.llm_engine.step():
                if not count:
                    begun = time.perf_counter()
                    made -= len(output.outputs[0].token_ids)
                else:
                    steps += 1
                count = len(output.outputs[0].token_ids)
        seconds += time.perf_counter() - begun
        made += count
    return {"tokens_per_second": made / seconds, "tokens_per_step": made / steps}


def _report(
    args: argparse.Namespace,
    model: str,
    options: dict[str, Any],
    found: dict[str, list[dict[str, float]]],
) -> None:
    plain = [one["tokens_per_second"] for one in found[PLAIN]]
    rows, results = [], {}
    for label, rounds in found.items():
        speeds = [one["tokens_per_second"] for one in rounds]
        ratios = [speed / of_plain for speed, of_plain in zip(speeds, plain, strict=True)]
        per_step = rounds[0]["tokens_per_step"]
        _, _, ahead = label.removesuffix(" ahead").rpartition(", ")
        accepted = f"{(per_step - 1) / int(ahead):.0%}" if ahead.isdigit() else ""
        rows.append(
            [
                label,
                f"{per_step:.2f}",
                accepted,
                spread(speeds, ".1f"),
                spread(ratios) if ahead.isdigit() else "",
            ]
        )
        results[label] = {"rounds": rounds, "ratio_to_plain": summary(ratios)}
    header = ["draft", "tokens a step", "of the drafted accepted", "tokens/s", "to plain"]
    print(markdown.table(header, rows))
    if args.out:
        settings = {"prompts": args.prompts, "prompt_tokens": args.prompt_tokens}
        settings |= {"tokens": args.tokens, "ask": args.ask}
        report = {**common.facts(), "model": Path(model).name, "engine": options, "job": settings}
        files.write_json(args.out, {**report, "variants": results})


if __name__ == "__main__":
    common.run_main(main)
