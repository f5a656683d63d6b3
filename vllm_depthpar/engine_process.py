"""vLLM's engine for a while, in a process of its own: it changes what it runs in, prints, and keeps
its memory until the process ends."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Plain vLLM, its engine in the process that asks for it.
_ENV = {"VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
_STOP_SECONDS = 10
_PR_SET_PDEATHSIG = 1


class EngineError(Exception):
    """The process ended without an answer; the message is the last line that it printed."""


def call(target: Callable[..., Any], *args: object, progress: bool = False) -> Any:
    """What `target(*args)` returns, called in a new process.

    Args:
        target: a function of a module; it imports vLLM itself.
        args: can be pickled, as the answer.
        progress: leave stderr, on which tqdm draws, to the user; else it is kept for the message.

    Raises:
        EngineError: the function raised, or its process was ended.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile(prefix="depthpar-engine-", suffix=".log") as log:
        process = context.Process(
            target=_answer, args=(theirs, log.name, progress, target, args), daemon=True
        )
        process.start()
        theirs.close()
        try:
            return ours.recv()
        except EOFError:
            lines = Path(log.name).read_text(errors="replace").splitlines()
            last = next((line for line in reversed(lines) if line.strip()), "no output")
            raise EngineError(last) from None
        finally:
            process.join(_STOP_SECONDS)
            process.kill()
            process.join()


def _answer(
    connection: Connection,
    log: str,
    progress: bool,
    target: Callable[..., Any],
    args: tuple[object, ...],
) -> None:
    if sys.platform == "linux":  # end with the caller, even if that is killed
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with open(log, "wb") as output:
        os.dup2(output.fileno(), 1)
        if not progress:
            os.dup2(output.fileno(), 2)
    os.environ.update(_ENV)
    connection.send(target(*args))
