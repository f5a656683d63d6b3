"""``make demo``: the bundled model's plan, one answer, and its speed beside plain vLLM's.

Two real servers, stopped at the end however it comes: one with ``--model-impl depthpar``, one
without. They take turns, so that a change in the machine's speed meets both, and the one that waits
is paused: both workers are bound to the same cores. Both run eager: compiling two models takes
minutes at the first start.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from openai import DefaultHttpxClient, OpenAI, OpenAIError
from rich.console import Console

from vllm_depthpar.bench.rounds import awake, in_turn, pause, spread
from vllm_depthpar.checkpoint import bundled
from vllm_depthpar.errors import UserError
from vllm_depthpar.launch.server import Server
from vllm_depthpar.util import files

QUESTION = "What is gravity? Answer in two sentences."
TOKENS = 64
ROUNDS = 6
ARGS = ("--served-model-name", bundled.NAME, "--max-model-len", "2048", "--enforce-eager")


def main() -> int:
    """Run the demonstration; the exit code is 1 if a server fails, and then its log is named."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped
    console = Console(highlight=False)
    try:
        with ExitStack() as stack:
            _demonstrate(console, stack)
    except (
        RuntimeError,
        OpenAIError,
        subprocess.CalledProcessError,
        UserError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if (message := files.of_the_system(error)) is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 1
    return 0


def _demonstrate(console: Console, stack: ExitStack) -> None:
    model = bundled.prepare()
    console.rule("The plan")
    subprocess.run([Path(sys.executable).with_name("depthpar"), "plan", "show", model], check=True)

    logs = Path(tempfile.mkdtemp(prefix="depthpar-demo-"))
    console.rule("Two servers")
    start = time.monotonic()
    with console.status("starting vLLM with and without depthpar ..."):
        servers = {}
        for name, more in {"depthpar": ("--model-impl", "depthpar"), "plain": ()}.items():
            servers[name] = Server(
                model, *ARGS, *more, env={"HF_HUB_OFFLINE": "1"}, log=logs / f"{name}.log"
            )
            stack.callback(servers[name].stop)
        for server in servers.values():
            server.wait()
            pause(server)
    console.print(f"up after {time.monotonic() - start:.0f} s; their logs are in {logs}")

    console.rule("One question")
    console.print(f"[bold]{QUESTION}[/bold]")
    with awake(servers["depthpar"]):
        for piece in _answer(servers["depthpar"]):
            print(piece, end="", flush=True)
    print()

    console.rule("Tokens per second")
    with console.status(f"{ROUNDS} rounds of {TOKENS} tokens on each ..."):
        # The one before them is not counted: it has the first requests of their size.
        rounds = [_round(servers, number) for number in range(-1, ROUNDS)][1:]
    for name in servers:
        rates = [one[name] for one in rounds]
        console.print(f"{name:9} {spread(rates, '.1f')} tokens/s at batch 1, eager")
    ratios = [one["depthpar"] / one["plain"] for one in rounds]
    console.print(f"{'ratio':9} {spread(ratios)} (of each round; {ROUNDS} rounds)")


def _client(server: Server) -> OpenAI:
    # No proxy of the environment's lies between this process and 127.0.0.1.
    return OpenAI(
        base_url=f"{server.url}/v1", api_key="none", http_client=DefaultHttpxClient(trust_env=False)
    )


def _answer(server: Server) -> Iterator[str]:
    """Read the server's answer to QUESTION, piece by piece as it comes."""
    stream = _client(server).chat.completions.create(
        model=bundled.NAME,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=200,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        yield chunk.choices[0].delta.content or ""


def _tokens_per_second(server: Server) -> float:
    """Time one whole request for TOKENS tokens, its short prompt included: tokens per second."""
    start = time.perf_counter()
    _client(server).completions.create(
        model=bundled.NAME,
        prompt=QUESTION,
        max_tokens=TOKENS,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    return TOKENS / (time.perf_counter() - start)


def _round(servers: dict[str, Server], number: int) -> dict[str, float]:
    """Measure each server, one after the other, alone: tokens per second."""
    rates = {}
    for name, server in in_turn(list(servers.items()), number):
        with awake(server):
            rates[name] = _tokens_per_second(server)
    return rates


if __name__ == "__main__":
    sys.exit(main())
