"""vLLM's engine for a while, in a process of its own: it changes what it runs in, prints, and keeps
its memory until the process ends."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_depthpar.errors import UserError
from vllm_depthpar.launch.process_group import ProcessGroup, last_lines

if TYPE_CHECKING:
    from vllm import LLM

# The engine in the very process that is started: it sleeps between requests, which vLLM's worker
# processes, polling shared memory, need not do.
_ENV = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
_PLAIN = {"VLLM_PLUGINS": ""}
# vLLM gives its workers ten seconds to end.
_STOP_SECONDS = 30


class EngineError(RuntimeError):
    """The process ended without an answer; the message has the last lines that it printed.

    Attributes:
        last: the last of them.
    """

    def __init__(self, message: str, last: str) -> None:
        super().__init__(message)
        self.last = last


class Worker:
    """A new process that runs `target(connection, *args)`; its output goes to a file.

    It leads a process group of its own, so that processes of vLLM's pause and end with it. They
    also end if this process is killed. `stop` must be called.

    Args:
        label: for messages.
        target: a function of a module, with its end of the pipe as the first argument.
        args: can be pickled.
        env: added to the environment.
        progress: leave stderr, on which tqdm draws, to the user.
    """

    def __init__(
        self,
        label: str,
        target: Callable[..., None],
        *args: object,
        env: Mapping[str, str] | None = None,
        progress: bool = False,
    ) -> None:
        self.label = label
        self._busy = True
        self._log = tempfile.NamedTemporaryFile(prefix="depthpar-engine-", suffix=".log")  # noqa: SIM115
        self.connection, theirs = multiprocessing.Pipe()
        given = {**_ENV, **(env or {})}
        self.process = spawn(_run, given, self._log.name, progress, target, theirs, *args)
        assert self.process.pid
        self._group = ProcessGroup(self.process.pid)
        theirs.close()

    def receive(self) -> Any:
        """Receive the next object that the process sends; an exception is raised.

        Raises:
            EngineError: the process ended instead.
        """
        try:
            found = self.connection.recv()
        except (EOFError, ConnectionResetError):
            last = self.end_of_log()
            shown = f"the engine of {self.label} ended:\n{last}"
            raise EngineError(shown, last.rpartition("\n")[2] or "no output") from None
        self._busy = False
        if isinstance(found, Exception):
            raise found
        return found

    def ask(self, request: object) -> Any:
        """Send a request and wait for the answer; raises as `receive`."""
        self._busy = True
        self.connection.send(request)
        return self.receive()

    def log_text(self) -> str:
        """Read all that the process has written so far."""
        return Path(self._log.name).read_text(errors="replace")

    def end_of_log(self) -> str:
        """Its last lines."""
        return last_lines(self.log_text())

    def signal(self, number: signal.Signals) -> None:
        """Signal the process and those that it started."""
        self._group.signal(number)

    def stop(self) -> None:
        """End the process: by itself if it waits for a request, else in the middle of its work."""
        self.signal(signal.SIGCONT)
        self.connection.close()
        if self._busy:
            self.signal(signal.SIGTERM)
        self.process.join(_STOP_SECONDS)
        self.signal(signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self._group.release()
        self._log.close()


def spawn(target: Callable[..., None], *args: object) -> BaseProcess:
    """Start a new process that runs `target(*args)`."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=args)
    process.start()
    return process


def call(
    target: Callable[..., Any],
    *args: object,
    env: Mapping[str, str] | None = None,
    progress: bool = False,
) -> Any:
    """Call `target(*args)` in a new process for plain vLLM; returns its result.

    Args:
        target: a function of a module; it imports vLLM itself.
        args: can be pickled, as the answer.
        env: see `Worker`.
        progress: see `Worker`; else stderr is kept for the message.

    Raises:
        EngineError: the function raised, or its process was ended; the message is the last line
            that it printed.
    """
    given = {**_PLAIN, **(env or {})}
    worker = Worker("a call", _answer, target, args, env=given, progress=progress)
    try:
        return worker.receive()
    except EngineError as error:
        raise EngineError(error.last, error.last) from None
    finally:
        worker.stop()


def make_engine(model: str, flags: Sequence[str]) -> LLM:
    """Make vLLM's engine on a checkpoint, in this process: prompts are token ids, nothing is
    cached from one to the next.

    Args:
        flags: as of ``vllm serve``, those of the engine.
    """
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    own = ["--model", model, "--skip-tokenizer-init", "--no-enable-prefix-caching"]
    parsed = _engine_parser().parse_args([*own, "--disable-log-stats", "--seed", "0", *flags])
    return LLM.from_engine_args(EngineArgs.from_cli_args(parsed))


def check_flags(flags: Sequence[str]) -> None:
    """Raise EngineError, with vLLM's own words, unless its engine knows these flags; takes as long
    as vLLM's imports."""
    call(_parse, list(flags))


def _parse(flags: Sequence[str]) -> None:
    _engine_parser().parse_args(flags)


def _engine_parser() -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return EngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm"))


def flags_of(options: Mapping[str, object]) -> list[str]:
    """Write the flags of ``vllm serve`` for options by their names in Python: {"dtype": "float32",
    "enforce_eager": True}. None and False leave a flag out; a dictionary is JSON."""
    flags = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            flags.append(flag)
        elif value is not None and value is not False:
            flags += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


def _run(
    env: Mapping[str, str], log: str, progress: bool, target: Callable[..., None], *args: object
) -> None:
    os.setsid()
    with open(log, "wb") as output:
        os.dup2(output.fileno(), 1)
        if not progress:
            os.dup2(output.fileno(), 2)
    os.environ.update(env)
    target(*args)


def _answer(connection: Connection, target: Callable[..., Any], args: tuple[object, ...]) -> None:
    try:
        answer = target(*args)
    except UserError as error:  # its line is not the last that the process prints
        answer = error
    connection.send(answer)
