"""`vllm serve` many times over, paying for its imports once.

The real command in a real process of its own: a parent imports what the command imports, then
forks for each call, and the child runs vLLM's `main` as the console script does.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path


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


def run(calls: list[Call], timeout: float = 60) -> list[Outcome]:
    """Make the calls one after the other; each may take `timeout` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder, "calls.json")
        job.write_text(json.dumps([asdict(call) for call in calls]))
        done = subprocess.run(
            [sys.executable, __file__, str(job), str(timeout)],
            capture_output=True,
            text=True,
            timeout=120 + timeout * len(calls),
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return [Outcome(**outcome) for outcome in json.loads(done.stdout.splitlines()[-1])]


def _call(call: Call, timeout: float) -> Outcome:
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            _vllm_serve(call, output.fileno())
        deadline, code, text = time.monotonic() + timeout, None, ""
        while time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            output.seek(0)
            text = output.read().decode(errors="replace")
            if ended:
                code = os.waitstatus_to_exitcode(status)
                break
            if call.until and call.until in text:
                break
            time.sleep(0.05)
        if code is None:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
        return Outcome(code, text)


def _vllm_serve(call: Call, output: int) -> None:
    """Never returns."""
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(call.env)
    sys.argv = ["vllm", "serve", *call.args]
    code = 0
    try:
        from vllm.entrypoints.cli.main import main

        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        # What the interpreter does with an exception nobody caught.
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    import vllm.entrypoints.cli.serve
    import vllm.entrypoints.openai.api_server
    import vllm.model_executor.models.llama  # noqa: F401

    # vLLM collects garbage again and again while it starts: half a second each over these imports.
    gc.freeze()
    job, limit = sys.argv[1:]
    answers = [_call(Call(**call), float(limit)) for call in json.loads(Path(job).read_text())]
    print(json.dumps([asdict(answer) for answer in answers]))
