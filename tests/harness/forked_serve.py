"""`vllm serve` many times over, paying for its imports once.

The real command in a real process of its own, which runs vLLM's `main` as the console script does.
It is forked from a process that has imported what the command imports, and so are its engine and
workers from it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest.mock import patch

import fork_server
import pytest

from vllm_depthpar.launch.process_group import ProcessGroup


class Process:
    """`vllm serve *args` with `env` as its environment and its output appended to `log`.

    It leads a process group of its own. With the methods of `subprocess.Popen` that `Server` uses.
    """

    def __init__(
        self, args: Sequence[str], env: Mapping[str, str], log: Path, compiled: bool = False
    ) -> None:
        forked = fork_server.fork(_vllm_serve, args, dict(env), str(log), compiled=compiled)
        self._process = forked
        assert self._process.pid
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        """To it alone."""
        os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once it has ended; subprocess.TimeoutExpired after `timeout` seconds."""
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired("vllm serve", timeout or 0)
        return code


@contextmanager
def forked_servers(compiled: bool = False) -> Iterator[None]:
    """Every `Server` is started like this meanwhile."""
    start = partial(Process, compiled=compiled)
    with patch("vllm_depthpar.launch.server.start_vllm_serve", start):
        yield


@contextmanager
def quick_servers(folder: Path) -> Iterator[None]:
    """`forked_servers` that compile nothing, with caches and logs in a folder."""
    with pytest.MonkeyPatch.context() as patching:
        patching.setenv("DEPTHPAR_CACHE", str(folder / "cache"))
        patching.setenv("TORCHDYNAMO_DISABLE", "1")
        patching.setattr(tempfile, "tempdir", str(folder))
        with forked_servers():
            yield


@dataclass(frozen=True)
class Call:
    """`vllm serve *args`; ended early once its output contains `until`."""

    args: list[str]
    env: dict[str, str] = field(default_factory=dict)
    until: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a call ended: its exit code (None if it was ended early), and what it printed."""

    code: int | None
    output: str


def run(calls: list[Call], timeout: float = 300) -> list[Outcome]:
    """Make the calls one after the other; each may take `timeout` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        return [
            _outcome(call, Path(folder, str(number)), timeout) for number, call in enumerate(calls)
        ]


def _outcome(call: Call, log: Path, timeout: float) -> Outcome:
    log.touch()
    process = Process(call.args, {**os.environ, **call.env}, log)
    group = ProcessGroup(process.pid)
    deadline = time.monotonic() + timeout
    while (code := process.poll()) is None and time.monotonic() < deadline:
        if call.until and call.until in log.read_text(errors="replace"):
            break
        time.sleep(0.05)
    group.signal(signal.SIGKILL)
    process.wait()
    group.release()
    return Outcome(code, log.read_text(errors="replace"))


def _vllm_serve(args: Sequence[str], env: Mapping[str, str], log: str) -> None:
    os.setsid()
    fork_server.become(env, log)
    sys.argv = ["vllm", "serve", *args]
    from vllm.entrypoints.cli.main import main

    try:
        main()
    except Exception:
        # What the interpreter does with an exception nobody caught.
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
