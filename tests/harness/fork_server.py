"""Processes forked from one that has imported vLLM, which takes longer than most tests do.

From one of two: whether anything is compiled is decided when PyTorch is imported.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import setproctitle

# It finds a process's title now, and not once the environment has been exchanged.
setproctitle.getproctitle()

_EAGER = [
    "engine_runs",
    "forked_serve",
    "vllm.entrypoints.llm",
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.openai.api_server",
    "vllm.model_executor.models.llama",
    "vllm.v1.worker.cpu_worker",
]
_forks = multiprocessing.get_context("forkserver")
# By whether what they fork compiles; each begins with the first call.
_servers = {compiled: forkserver.ForkServer() for compiled in (False, True)}
_servers[False].set_forkserver_preload(_EAGER)
_servers[True].set_forkserver_preload([*_EAGER, "torch._inductor.compile_fx"])


def fork(target: Callable[..., None], *args: object, compiled: bool = False) -> BaseProcess:
    """As `launch.engine.spawn`, and `target` finds vLLM imported.

    The process's environment is that of the first call; it must `become` what it is to be.
    """
    server = _servers[compiled]
    with patch.dict(os.environ, TORCHDYNAMO_DISABLE=str(int(not compiled))):
        server.ensure_running()
    process = _forks.Process(target=target, args=args)
    with patch.object(forkserver, "connect_to_new_process", server.connect_to_new_process):
        process.start()
    return process


def call(function: Callable[..., Any], *args: object, **env: str) -> Any:
    """What a function that needs a process of its own returns there, with `env` in addition."""
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder, "answer"), Path(folder, "log")
        environment = {**os.environ, **env}
        process = fork(_answer, environment, str(log), answer, function, *args)
        process.join()
        if process.exitcode != 0:
            raise RuntimeError(log.read_text()[-4000:])
        return pickle.loads(answer.read_bytes())


def _answer(
    env: Mapping[str, str], log: str, answer: Path, function: Callable[..., Any], *args: object
) -> None:
    become(env, log)
    answer.write_bytes(pickle.dumps(function(*args)))


@contextmanager
def forked_engines(compiled: bool = False) -> Iterator[None]:
    """Every `launch.engine.Worker` is forked like this meanwhile."""

    def start(target: Callable[..., None], *args: object) -> BaseProcess:
        return fork(_with, dict(os.environ), target, *args, compiled=compiled)

    with patch("vllm_depthpar.launch.engine.spawn", start):
        yield


def _with(env: Mapping[str, str], target: Callable[..., None], *args: object) -> None:
    become(env)
    target(*args)


def become(env: Mapping[str, str], log: str | None = None) -> None:
    """What a new program would begin with: an environment, and a file that takes its output."""
    if log is not None:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
    os.environ.clear()
    os.environ.update(env)
    forking = multiprocessing.get_context("fork")
    # vLLM's workers, too: on a CPU it sets "spawn", whatever the environment says.
    multiprocessing.get_context = lambda method=None: forking  # type: ignore[assignment]
    from vllm.logger import _configure_vllm_root_logger
    from vllm.model_executor.models import registry

    _configure_vllm_root_logger()
    # Of each class of a model vLLM asks, once, a new program that imports vLLM, lest CUDA is
    # initialized: on a slow machine a minute.
    registry._run_in_subprocess = lambda ask: ask()
    # vLLM collects garbage several times in every start: half a second each over what it imports.
    gc.freeze()
