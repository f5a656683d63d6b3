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
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout: this is a script

from benchmarks import common
from vllm_depthpar.bench import memory
from vllm_depthpar.bench.memory import GIB
from vllm_depthpar.bench.rounds import spread, summary
from vllm_depthpar.bench.stages import started
from vllm_depthpar.checkpoint import bundled
from vllm_depthpar.checkpoint.config import read_config
from vllm_depthpar.cli.types import at_least
from vllm_depthpar.evaluate import texts
from vllm_depthpar.launch import kv_cache
from vllm_depthpar.launch.engine import Worker, flags_of, make_engine
from vllm_depthpar.launch.variants import PLAIN, Variant
from vllm_depthpar.plan import resolve
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.util import markdown

if TYPE_CHECKING:
    from vllm import LLM


NGRAM = "ngram"
# As in vLLM's documentation.
_LOOKUP = {"method": NGRAM, "prompt_lookup_max": 4}


@dataclass(frozen=True)
class Speculation:
    """Plain vLLM, or a draft.

    Attributes:
        config: vLLM's `speculative_config`; empty for none.
    """

    label: str
    config: dict[str, Any]
    ahead: int = 0


@dataclass(frozen=True)
class Answers:
    """The load: prompts, one after the other, and so many tokens of each answer."""

    prompts: list[list[int]]
    tokens: int
    key: str = "answers"


class Speculating:
    """An engine for each, see `turns.Stage`.

    Args:
        options: of all engines.
    """

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        self._model, self._options = model, options

    def start(self, variant: Speculation, stack: ExitStack) -> tuple[Worker, dict[str, Any]]:
        """See `turns.Stage`."""
        more = {"speculative_config": variant.config} if variant.config else {}
        # A spec of any kind: the draft needs the plugin.
        env = common.environment(Variant(variant.label, spec=more or None))
        worker = Worker(
            variant.label, serve, self._model, flags_of({**self._options, **more}), env=env
        )
        stack.callback(worker.stop)
        return worker, started(worker, worker.receive)

    def measure(self, running: Worker, load: Answers, _: int) -> dict[str, float]:
        """See `decode`."""
        found: dict[str, float] = running.ask((load.prompts, load.tokens))
        return found


def main() -> None:
    """Measure, print a table, write the JSON."""
    args = _parser().parse_args()
    model = str(args.model or bundled.prepare())
    load = Answers(_prompts(model, args), args.tokens)
    options = {
        "dtype": args.dtype,
        "enforce_eager": True,
        "max_model_len": max(map(len, load.prompts)) + args.tokens + max(args.ahead) + 1,
        "max_num_seqs": 1,
    }
    chosen = [Speculation(PLAIN, {}), *_speculations(args.drafts, args.ahead)]
    drafts = [draft for draft in args.drafts if draft != NGRAM]
    record = common.open_record(args, model, *drafts, texts=common.digest(load.prompts))
    save = common.saver(record, args.out)
    if len(record["rounds"]) < args.rounds:
        needed = {one.label: _memory_bytes(one, model, args.dtype) for one in chosen}
        instead = "--one-at-a-time, or fewer --drafts"
        memory.check(needed, 1 if args.one_at_a_time else len(chosen), instead)
    common.take_turns(
        Speculating(model, options),
        chosen,
        [load],
        record,
        args.rounds,
        save,
        one_at_a_time=args.one_at_a_time,
    )
    job = {"prompts": args.prompts, "prompt_tokens": args.prompt_tokens}
    job |= {"tokens": args.tokens, "ask": args.ask}
    record |= {"model": Path(model).name, "engine": options, "job": job}
    _report(chosen, load, record)
    save()


def _speculations(drafts: list[str], aheads: list[int]) -> list[Speculation]:
    found = []
    for draft in drafts:
        for ahead in aheads:
            of_model = {"method": "draft_model", "model": str(Path(draft).resolve())}
            config = _LOOKUP if draft == NGRAM else of_model
            config = {**config, "num_speculative_tokens": ahead}
            found.append(Speculation(f"{Path(draft).name}, {ahead} ahead", config, ahead))
    return found


def _memory_bytes(one: Speculation, model: str, dtype: str) -> int:
    """Of the model, and of its draft."""
    folders = [model, *([one.config["model"]] if "model" in one.config else [])]
    shapes = [ModelShape.from_config(read_config(folder)).in_dtype(dtype) for folder in folders]
    kv_bytes = kv_cache.reserved_bytes(GIB)  # of both
    return kv_bytes + sum(
        memory.estimate(shape, resolve("identity", shape.layers), 1, 0, processes=int(not at))
        for at, shape in enumerate(shapes)
    )


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


def _report(chosen: list[Speculation], load: Answers, record: dict[str, Any]) -> None:
    """Print the table, and add the summary to the record."""

    def of(one: Speculation, figure: str) -> list[float]:
        return common.figures_of(record, one.label, load.key, figure)

    rows, record["variants"] = [], {}
    for one in chosen:
        speeds = of(one, "tokens_per_second")
        plain = of(chosen[0], "tokens_per_second")
        ratios = [speed / of_plain for speed, of_plain in zip(speeds, plain, strict=True)]
        per_step = of(one, "tokens_per_step")[0]
        rows.append(
            [
                one.label,
                f"{per_step:.2f}",
                f"{(per_step - 1) / one.ahead:.0%}" if one.ahead else "",
                spread(speeds, ".1f"),
                spread(ratios) if one.ahead else "",
            ]
        )
        record["variants"][one.label] = {"ratio_to_plain": summary(ratios)}
    header = ["draft", "tokens a step", "of the drafted accepted", "tokens/s", "to plain"]
    print(markdown.table(header, rows))


def _parser() -> argparse.ArgumentParser:
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
    common.add_one_at_a_time(parser)
    common.add_out(parser)
    return parser


if __name__ == "__main__":
    common.run_main(main)
