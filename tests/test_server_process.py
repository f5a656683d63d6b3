"""Starting and stopping real servers: what one says that fails, and what remains of one."""

import subprocess
import sys
from pathlib import Path

import models
import psutil
import pytest

from vllm_depthpar.server_process import serve


def test_failure_shows_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
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
    with serve(model, "--skip-tokenizer-init", "--enforce-eager", log=tmp_path / "log") as server:
        assert server.healthy()
        assert "Application startup complete" in server.log_text()
        leader = psutil.Process(server.process.pid)
        processes = [leader, *leader.children(recursive=True)]
        assert len(processes) > 1, "vLLM runs its engine in a process of its own"
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert alive == []
    assert not server.healthy()
    server.stop()  # once more, which is harmless


def test_ends_with_a_killed_caller(tmp_path: Path) -> None:
    """Even while it is stopped, as the contenders of a benchmark are that wait."""
    caller = """
import signal, sys, time
from vllm_depthpar.server_process import Server
server = Server(sys.argv[1])
server.signal(signal.SIGSTOP)
print(server.process.pid, flush=True)
time.sleep(600)
"""
    command = [sys.executable, "-c", caller, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        server = psutil.Process(int(process.stdout.readline()))
        assert server.is_running()
        process.kill()
    _, alive = psutil.wait_procs([server], timeout=10)
    assert alive == []
