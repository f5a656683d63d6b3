"""Starting and stopping real servers and engines: what one says that fails, and what remains."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import models
import psutil
import pytest
from forked_serve import forked_servers

from vllm_depthpar.launch.server import HOST, post_json, serve


def test_failure_shows_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        forked_servers(),
        pytest.raises(RuntimeError, match=r"^vllm serve ended with exit code 1: ") as error,
        serve(tmp_path / "no-such-model", log=log),
    ):
        pytest.fail("a server of nothing came up")
    assert str(log) in str(error.value)
    assert "no-such-model" in str(error.value)


def test_too_late(smollm2: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match=r"^vllm serve not up after 0\.1 s"),
        serve(smollm2, log=tmp_path / "log", timeout=0.1),
    ):
        pytest.fail("a server came up in no time")


def test_nothing_remains(tmp_path: Path) -> None:
    """A server answers, and once stopped none of its processes is left."""
    model = models.write_llama(tmp_path / "model", layers=2)
    arguments = ["--skip-tokenizer-init", "--enforce-eager"]
    with forked_servers(), serve(model, *arguments, log=tmp_path / "log") as server:
        assert server.healthy()
        assert "Application startup complete" in server.log_text()
        leader = psutil.Process(server.process.pid)
        processes = [leader, *leader.children(recursive=True)]
        assert len(processes) > 1, "vLLM runs its engine in a process of its own"
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert alive == []
    assert not server.healthy()
    server.stop()  # once more, which is harmless


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", "IncompleteRead"),
        (b"", "RemoteDisconnected"),
        (b"HTTP/1.1 400 Bad\r\nContent-Length: 10\r\n\r\ntoo\n  long", "^too long$"),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", "503"),
    ],
)
def test_a_server_that_does_not_answer_is_an_os_error(reply: bytes, said: str) -> None:
    """One that dies within its answer, before it, and one that refuses, with and without words."""
    with socket.create_server((HOST, 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(reply)

        serving = threading.Thread(target=answer)
        serving.start()
        with pytest.raises(OSError, match=said):
            post_json(f"http://{HOST}:{listening.getsockname()[1]}/", {"asked": 1}, timeout=20)
        serving.join()


SERVER = """
from vllm_depthpar.launch.server import Server
started = Server(model)
"""
# With a worker of vLLM's.
ENGINE = """
from vllm_depthpar.bench import engine_load
from vllm_depthpar.launch.engine import Worker
flags = ["--enforce-eager", "--load-format", "dummy"]
flags += ["--distributed-executor-backend", "mp"]
started = Worker("an engine", engine_load.run_engine, model, flags)
started.receive()
"""
CALLER = """
import signal, sys, time
model = sys.argv[1]
{start}
started.signal(signal.SIGSTOP)
print(started.process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(("start", "least"), [(SERVER, 1), (ENGINE, 2)], ids=["server", "engine"])
def test_ends_with_a_killed_caller(start: str, least: int, tmp_path: Path) -> None:
    """Even while it is stopped, as the variants of a benchmark are that wait."""
    model = models.write_llama(tmp_path / "model", layers=2)
    command = [sys.executable, "-c", CALLER.format(start=start), str(model)]
    env = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        leader = psutil.Process(int(process.stdout.readline()))
        processes = [leader, *leader.children(recursive=True)]
        assert len(processes) >= least
        process.kill()
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert alive == []
