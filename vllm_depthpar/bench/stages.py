"""Variants at work: how one is started, as an engine or as a server, and put under load."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from vllm_depthpar.bench import engine_load, server_load
from vllm_depthpar.bench.memory import GroupPeak
from vllm_depthpar.bench.settings import LATENCY, Load, Setup
from vllm_depthpar.bench.turns import Running
from vllm_depthpar.launch import hardware, kv_cache
from vllm_depthpar.launch.engine import Worker
from vllm_depthpar.launch.server import Server
from vllm_depthpar.launch.variants import Variant

_WEIGHTS = re.compile(r"Loading weights took ([0-9.]+) seconds")


class Started(Running, Protocol):
    """A variant whose processes one of them leads."""

    process: Any

    def log_text(self) -> str:
        """All that they have written so far."""


def started(running: Started, wait: Callable[[], object]) -> dict[str, Any]:
    """Wait until a variant is ready.

    Returns:
        seconds: from now on. weights_seconds: of reading weights, on the slowest rank; None where
        vLLM does not say. peak_bytes: of anonymous memory of all processes.
    """
    begun = time.monotonic()
    with GroupPeak(running.process.pid) as memory:
        wait()
    weights = [float(seconds) for seconds in _WEIGHTS.findall(running.log_text())]
    return {
        "seconds": time.monotonic() - begun,
        "weights_seconds": max(weights, default=None),
        "peak_bytes": memory.bytes,
    }


class Engines:
    """vLLM's engine for each, in a process of its own."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup

    def start(self, variant: Variant, stack: ExitStack) -> tuple[Worker, dict[str, Any]]:
        """See `turns.Stage`."""
        setup = self._setup
        flags, env = setup.flags(variant), _environment(setup, variant)
        engine = Worker(variant.label, engine_load.run_engine, setup.model, flags, env=env)
        stack.callback(engine.stop)
        return engine, started(engine, engine.receive)

    def measure(self, running: Worker, load: Load, seed: int) -> dict[str, float]:
        """TTFT and time per token of one sequence; or tokens per second of many."""
        job = {"batch": load.batch, "prompt_tokens": load.prompt_tokens, "seed": seed}
        job |= {
            "tokens": self._setup.settings.output_len,
            "vocab": self._setup.config["vocab_size"],
        }
        return figures_of(load, running.ask(job))


def figures_of(load: Load, found: dict[str, float]) -> dict[str, float]:
    """Take what a batch through an engine (`engine_load.run_batch`) says of a load: times in ms of
    one sequence, or tokens per second of many."""
    prefill, decoding = found["prefill_seconds"], found["decode_seconds"]
    gpu = {"gpu_bytes": found["gpu_bytes"]} if found["gpu_bytes"] else {}
    if load.part == LATENCY:
        each = decoding / found["decode_tokens"]
        return {"ttft_ms": 1e3 * prefill, "tpot_ms": 1e3 * each, **gpu}
    return {
        "decode_tokens_per_second": found["decode_tokens"] / decoding,
        "prefill_tokens_per_second": load.batch * load.prompt_tokens / prefill,
        **gpu,
    }


class Servers:
    """A real ``vllm serve`` for each, and vLLM's load generator for all.

    Args:
        stack: ends the load generator.
    """

    def __init__(self, setup: Setup, stack: ExitStack) -> None:
        self._setup, self._tokenizer = setup, setup.model
        self._more: list[str] = []
        if not server_load.has_tokenizer(setup.model):
            self._tokenizer = stack.enter_context(tempfile.TemporaryDirectory(prefix="tokenizer-"))
            vocab = setup.config["vocab_size"]
            self._more = server_load.write_tokenizer(Path(self._tokenizer), vocab)
        # Nothing of the environment's lies between it and a server on this machine.
        env = {"VLLM_PLUGINS": "", "NO_PROXY": "*", "no_proxy": "*"}
        self._client = Worker("the load generator", server_load.run_client, env=env)
        stack.callback(self._client.stop)
        self._client.receive()

    def start(self, variant: Variant, stack: ExitStack) -> tuple[Server, dict[str, Any]]:
        """See `turns.Stage`."""
        setup = self._setup
        flags, env = setup.flags(variant), _environment(setup, variant)
        server = Server(setup.model, *flags, *self._more, env=env)

        def end(error: type[BaseException] | None, *_: object) -> None:
            server.stop()
            if error is None:  # else the message names its log
                server.log.unlink(missing_ok=True)

        stack.push(end)
        return server, started(server, server.wait)

    def measure(self, running: Server, load: Load, seed: int) -> dict[str, float]:
        """Ask vLLM's load generator: `server_load.FIGURES`."""
        found: dict[str, float] = self._client.ask(
            server_load.job(
                running.url,
                self._setup.model,
                self._tokenizer,
                rate=load.rate,
                requests=load.batch,
                prompt_tokens=load.prompt_tokens,
                tokens=self._setup.settings.output_len,
                seed=seed,
            )
        )
        return found


def _environment(setup: Setup, variant: Variant) -> dict[str, str]:
    return {
        **hardware.environment(setup.settings.tp, setup.gpu_share is not None),
        **kv_cache.environment(setup.kv_bytes(variant)),
        **variant.env,
    }
