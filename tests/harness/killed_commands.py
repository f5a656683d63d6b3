"""Commands of `depthpar` that are killed at whatever moment, and started again."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import fork_server


def start(words: Sequence[str], env: Mapping[str, str], log: Path) -> BaseProcess:
    """`depthpar *words` in a process of its own that leads a group, without the time of imports."""
    return fork_server.fork(_main, list(words), {**os.environ, **env}, str(log))


def kill_after(process: BaseProcess, seconds: float) -> bool:
    """Kill a command (-9) so long after its start; whether it was still at work."""
    process.join(seconds)
    running = process.exitcode is None
    if running and process.pid is not None:
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return running


def finish(words: Sequence[str], env: Mapping[str, str], log: Path) -> float:
    """Run a command to its end, which must be a good one; the seconds that it took."""
    begun = time.monotonic()
    process = start(words, env, log)
    process.join()
    assert process.exitcode == 0, log.read_text()[-3000:]
    return time.monotonic() - begun


def _main(words: Sequence[str], env: Mapping[str, str], log: str) -> None:
    os.setsid()
    fork_server.become(env, log)
    from vllm_depthpar.cli.main import main

    sys.exit(main(list(words)))
