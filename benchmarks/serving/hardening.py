"""What a server takes: many clients for minutes, thousands of requests, a worker that dies.

A real `vllm serve` with one plan. Clients stream answers, and each answer has to be, token for
token, what the same prompt gave alone; an answer that another prompt gave is *mixed*, one that
nobody's prompt gave *different*, one without its end *lost*. Parts are written as they are done,
and the same command goes on with those that are missing; plain vLLM is one more plan.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout: this is a script

import aiohttp
import psutil
from tqdm.asyncio import tqdm

from benchmarks import common
from vllm_depthpar.bench import memory
from vllm_depthpar.bench.memory import GIB
from vllm_depthpar.bench.turns import named
from vllm_depthpar.checkpoint import bundled
from vllm_depthpar.checkpoint.config import read_config
from vllm_depthpar.cli.types import at_least
from vllm_depthpar.launch import kv_cache
from vllm_depthpar.launch.server import Server, serve
from vllm_depthpar.launch.variants import Variant
from vllm_depthpar.plan import resolve
from vllm_depthpar.plan.model_shape import ModelShape

NAME = "model"
# Said of a place, so that the answers differ.
WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "haven", "inlet", "jetty")
DTYPE = "float32"
FLAGS = ["--served-model-name", NAME, "--dtype", DTYPE, "--enforce-eager"]
FLAGS += ["--max-model-len", "256", "--max-num-seqs", "256"]
HEALTH_SECONDS = 30
MOST_GROWTH = 0.05


def main() -> None:
    """Run the parts, print what they found, write the JSON."""
    args = _parser().parse_args()
    model = str(args.model or bundled.prepare())
    variant = common.beside_plain(model, args.plans)[-1]  # plain vLLM is the first
    plans = {variant.label: variant.digest}
    record = common.open_record(args, model, empty={"parts": {}}, plans=plans)
    save = common.saver(record, args.out)
    for part in args.parts:
        if part not in record["parts"]:
            record["parts"][part] = _run(part, model, variant, args)
            save()
        print(part, json.dumps(record["parts"][part], indent=1))


def _run(part: str, model: str, variant: Variant, args: argparse.Namespace) -> dict[str, Any]:
    """What a part finds.

    Raises:
        UserError: the server did not bear it.
    """
    tp = args.tp if part == "kill" else 1
    shape = ModelShape.from_config(read_config(model)).in_dtype(DTYPE)
    plan, kv_bytes = resolve(variant.spec or "identity", shape.layers), kv_cache.reserved_bytes(GIB)
    needed = memory.estimate(shape, plan, tp, kv_bytes, processes=2 + tp)
    memory.check({variant.label: needed}, alive=1)
    flags = [*FLAGS, "--tensor-parallel-size", str(tp), *variant.flags]
    with ExitStack() as stack:
        with named(f"{part}: starting {variant.label}"):
            server = stack.enter_context(serve(model, *flags, env=common.environment(variant, tp)))
        with named(f"{part}: {variant.label}", server):
            try:
                return asyncio.run(PARTS[part](server, args))
            except (aiohttp.ClientError, ValueError, TimeoutError) as error:
                raise RuntimeError(f"{type(error).__name__}: {error}") from error


# ------------------------------------------------------------------------------------ streams


async def streams(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """`args.clients` streams at any time for `args.minutes`, a third of whose clients leave now
    and then in the middle."""
    prompts = _marked(args.prompts)
    numbers = random.Random(0)
    outcomes: Counter[str] = Counter()
    different: list[dict[str, str]] = []
    async with _session(server, args.clients + 1) as session:
        alone = [await _ask(session, prompt, args.tokens) for prompt in tqdm(prompts, "alone")]
        answers = set(alone)
        if len(answers) < len(alone):
            raise ValueError("prompts with the same answer can't show whose it is")
        end = time.monotonic() + 60 * args.minutes
        progress = tqdm(desc="answers")

        async def client(number: int) -> None:
            while time.monotonic() < end:
                index = numbers.randrange(len(prompts))
                leaves = number % 3 == 0 and numbers.random() < 0.25
                try:
                    answer = await _ask(session, prompts[index], args.tokens, leaves)
                except (aiohttp.ClientError, ConnectionError, ValueError, TimeoutError) as error:
                    outcomes[f"lost: {type(error).__name__}"] += 1
                    continue
                progress.update()
                if answer is None:
                    outcomes["left by the client"] += 1
                elif answer == alone[index]:
                    outcomes["equal"] += 1
                elif answer in answers:
                    outcomes["mixed"] += 1
                else:
                    outcomes["different"] += 1
                    different.append({"alone": alone[index] or "", "under load": answer})

        start = time.monotonic()
        await asyncio.gather(*(client(number) for number in range(args.clients)))
        seconds = time.monotonic() - start
        progress.close()
        idle = await _seconds_until_idle(session)
        after = [await _ask(session, prompt, args.tokens) for prompt in prompts]
    return {
        "clients": args.clients,
        "prompts": len(prompts),
        "tokens": args.tokens,
        "seconds": round(seconds),
        "outcomes": dict(outcomes),
        "different": different[:20],
        "seconds_until_idle": idle,
        "equal_alone_afterwards": sum(a == b for a, b in zip(alone, after, strict=True)),
    }


def _marked(number: int) -> list[str]:
    """Prompts that begin with a number of their own."""
    numbers = random.Random(1)
    return [
        f"Parcel {1000 + 37 * index}. It goes from {' to '.join(numbers.sample(WORDS, 3))}. "
        f"Tell me about parcel {1000 + 37 * index}:"
        for index in range(number)
    ]


def _session(server: Server, connections: int) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        server.url,
        connector=aiohttp.TCPConnector(limit=connections),
        timeout=aiohttp.ClientTimeout(total=600),
    )


async def _ask(
    session: aiohttp.ClientSession, prompt: str, tokens: int, leaves: bool = False
) -> str | None:
    """The whole text of a stream, or None where the client leaves after the first piece.

    Raises:
        ValueError: the stream has an error in it, or no end, or does not begin with the prompt.
    """
    body = {
        "model": NAME,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "echo": True,
    }
    text, ended = "", False
    async with session.post("/v1/completions", json=body) as reply:
        reply.raise_for_status()
        async for line in reply.content:
            if line.startswith(b"data: [DONE]"):
                ended = True
            elif line.startswith(b"data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    raise ValueError(event)
                text += event["choices"][0]["text"]
                if leaves and len(text) > len(prompt):
                    return None
    if not ended:
        raise ValueError("no end")
    if not text.startswith(prompt):
        raise ValueError("another's prompt")
    return text


async def _seconds_until_idle(session: aiohttp.ClientSession) -> float:
    start = time.monotonic()
    while time.monotonic() < start + 60:
        async with session.get("/metrics") as reply:
            lines = (await reply.text()).splitlines()
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage")
        if not sum(float(line.split()[-1]) for line in lines if line.startswith(names)):
            return round(time.monotonic() - start, 2)
        await asyncio.sleep(0.1)
    raise RuntimeError("requests are still there a minute after all clients have gone")


# ------------------------------------------------------------------------------------- memory


async def requests(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """`args.requests` short ones, `args.at_once` at a time; the server's memory every tenth."""
    numbers = random.Random(2)
    sizes = []
    async with _session(server, args.at_once) as session:

        async def client(left: Iterator[int]) -> None:
            for _ in left:
                prompt = [numbers.randrange(1000, 40000) for _ in range(8)]
                body = {"model": NAME, "prompt": prompt, "max_tokens": 2, "ignore_eos": True}
                async with session.post("/v1/completions", json=body) as reply:
                    reply.raise_for_status()
                    assert (await reply.json())["usage"]["completion_tokens"] == 2
                progress.update()

        start = time.monotonic()
        progress = tqdm(total=args.requests, desc="requests")
        for _ in range(10):
            left = iter(range(args.requests // 10))  # of all clients
            await asyncio.gather(*(client(left) for _ in range(args.at_once)))
            sizes.append(memory.of_group(server.process.pid))
        progress.close()
        seconds = time.monotonic() - start
    growth = sizes[-1] / sizes[0] - 1
    return {
        "requests": args.requests,
        "at_once": args.at_once,
        "seconds": round(seconds),
        "anonymous_bytes_each_tenth": sizes,
        "growth_after_first_tenth": growth,
        "allowed": MOST_GROWTH,
    }


# --------------------------------------------------------------------------------------- kill


async def kill(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds from a worker's SIGKILL, with streams running, to /health that fails."""
    async with _session(server, 9) as session:
        asking = [
            asyncio.create_task(_ask(session, prompt, 100)) for prompt in _marked(args.prompts)[:8]
        ]
        await asyncio.sleep(5)
        workers = [
            process
            for process in psutil.Process(server.process.pid).children(recursive=True)
            if "Worker" in " ".join(process.cmdline())
        ]
        workers[-1].send_signal(signal.SIGKILL)
        start = time.monotonic()
        while await asyncio.to_thread(server.healthy):
            if time.monotonic() > start + 10 * HEALTH_SECONDS:
                raise RuntimeError("still healthy")
            await asyncio.sleep(0.1)
        failed = time.monotonic() - start
        ends = await asyncio.gather(*asking, return_exceptions=True)
    return {
        "workers": len(workers),
        "seconds_until_unhealthy": round(failed, 2),
        "allowed": HEALTH_SECONDS,
        "streams_that_ended_in_an_error": sum(isinstance(end, Exception) for end in ends),
    }


PARTS = {"streams": streams, "requests": requests, "kill": kill}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help=common.MODEL_HELP)
    parser.add_argument("--plans", nargs=1, default=["auto"], metavar="PLAN", help="one (auto)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(all)")
    positive = at_least(1)
    parser.add_argument("--clients", type=positive, default=200, help="(200)")
    parser.add_argument("--minutes", type=float, default=5, help="of streams (5)")
    parser.add_argument("--prompts", type=positive, default=64, help="different ones (64)")
    parser.add_argument("--tokens", type=positive, default=16, help="of an answer (16)")
    parser.add_argument("--requests", type=at_least(10), default=10_000, help="(10000)")
    parser.add_argument("--at-once", type=positive, default=32, help="short requests (32)")
    parser.add_argument("--tp", type=positive, default=3, help="ranks, of `kill` (3)")
    common.add_out(parser)
    return parser


if __name__ == "__main__":
    common.run_main(main)
