"""A ``vllm serve`` process: start it, wait until it answers, stop it with everything it started."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vllm_depthpar.launch.process_group import ProcessGroup, last_lines

HOST = "127.0.0.1"

# For a small CPU machine: one GiB of KV cache, and nothing sent anywhere. The environment wins.
DEFAULT_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
# A large model is read and compiled before its server answers.
START_SECONDS = 1800
SHUTDOWN_SECONDS = 15
# Below those that Linux gives to connections: what asks for one may listen minutes later.
_PORTS = range(20000, 32768)


class Server:
    """A started ``vllm serve MODEL *args``; `stop` must be called, or use `serve`.

    The server is the leader of a process group of its own, so that its workers end with it. They
    also end if this process is killed.
    """

    def __init__(
        self,
        model: str | Path,
        *args: str,
        env: Mapping[str, str] | None = None,
        port: int | None = None,
        log: Path | None = None,
    ) -> None:
        self.port = port or free_port()
        self.url = f"http://{HOST}:{self.port}"
        if log is None:
            handle, name = tempfile.mkstemp(prefix="vllm-serve-", suffix=".log")
            os.close(handle)
            log = Path(name)
        self.log = log
        self.log.write_bytes(b"")
        self.process = start_vllm_serve(
            [str(model), "--host", HOST, "--port", str(self.port), *args],
            {**DEFAULT_ENV, **os.environ, **(env or {})},
            self.log,
        )
        self._group = ProcessGroup(self.process.pid)

    def wait(self, timeout: float = START_SECONDS) -> None:
        """Wait until the server answers; RuntimeError if it ends or takes `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not self.healthy():
            if (code := self.process.poll()) is not None:
                raise RuntimeError(f"vllm serve ended with exit code {code}: {self.end_of_log()}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"vllm serve not up after {timeout} s: {self.end_of_log()}")
            time.sleep(0.25)

    def healthy(self) -> bool:
        """Say whether the server answers requests now."""
        try:
            with self._get("/health") as reply:
                return bool(reply.status == 200) and self.process.poll() is None
        except OSError:
            return False

    def model(self) -> dict[str, Any]:
        """Ask the server about the model that it serves: `id`, `max_model_len`, ..."""
        with self._get("/v1/models") as reply:
            served: dict[str, Any] = json.load(reply)["data"][0]
        return served

    def _get(self, path: str) -> Any:
        return open_url(f"{self.url}{path}", timeout=5)

    def signal(self, number: signal.Signals) -> None:
        """Signal the server and all processes it started."""
        self._group.signal(number)

    def stop(self) -> None:
        """End the server and all processes it started; harmless when it has ended already."""
        self.signal(signal.SIGCONT)
        for sent in (signal.SIGTERM, signal.SIGKILL):
            self.signal(sent)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(SHUTDOWN_SECONDS)
        self._group.release()

    def log_text(self) -> str:
        """Read all that the server has written so far."""
        return self.log.read_text(errors="replace")

    def end_of_log(self) -> str:
        """Name the file, and show its last lines."""
        return f"the end of {self.log}\n{last_lines(self.log_text())}"


def start_vllm_serve(
    args: Sequence[str], env: Mapping[str, str], log: Path
) -> subprocess.Popen[bytes]:
    """Start ``vllm serve *args`` as the leader of a session; its output is appended to `log`."""
    with open(log, "ab") as output:
        return subprocess.Popen(
            [str(Path(sys.executable).with_name("vllm")), "serve", *args],
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@contextmanager
def serve(
    model: str | Path,
    *args: str,
    env: Mapping[str, str] | None = None,
    port: int | None = None,
    log: Path | None = None,
    timeout: float = START_SECONDS,
) -> Iterator[Server]:
    """Run ``vllm serve MODEL *args`` on 127.0.0.1, ready for requests, for the body of a `with`.

    `env` adds to the environment; `port` is a free one by default; `log` is the file for what the
    server writes, by default a new one in the temporary folder. RuntimeError, with the last lines
    of that file, if the server ends or is not up within `timeout` seconds.
    """
    server = Server(model, *args, env=env, port=port, log=log)
    try:
        server.wait(timeout)
        yield server
    finally:
        server.stop()


def post_json(url: str, body: Mapping[str, Any], timeout: float) -> Any:
    """Post JSON, and read the JSON that a server answers.

    Args:
        timeout: of the request, in seconds.

    Raises:
        OSError: no answer, half of one, or the server refuses; then with what it says of it.
    """
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with open_url(request, timeout) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        # The server says why in the body, which the exception does not show.
        why = " ".join(error.read().decode(errors="replace").split())
        raise OSError(why[:500] or str(error)) from error
    except http.client.HTTPException as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def open_url(url: str | urllib.request.Request, timeout: float) -> Any:
    """Open a URL as `urllib.request.urlopen` does, without the environment's proxies: they would be
    asked for localhost."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(url, timeout=timeout)


def free_port() -> int:
    """Find a TCP port of 127.0.0.1 that nothing listens on at this moment."""
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with suppress(OSError), socket.socket() as probe:
            probe.bind((HOST, port))
            return port
