"""A tensor-parallel worker on another host dies or hangs while others wait for its term."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import pytest
import two_nodes
from forked_serve import forked_servers
from models import write_llama
from processes import command_line

from vllm_depthpar.launch.server import Server

# What vLLM gives a step here (300 s by default), and then the time to say so and to end.
STEP_SECONDS = 10
END_SECONDS = 60


@pytest.fixture
def hosts(tmp_path: Path, smollm2: Path) -> Iterator[tuple[Server, Server]]:
    """A ladder served by two nodes, of one rank each, that share no memory."""
    model = write_llama(tmp_path / "model", vocab=49152, layers=4)
    for file in smollm2.glob("*token*.json"):
        shutil.copy(file, model)
    options = ["--model-impl", "depthpar", "--hf-overrides", '{"depthpar": {"ladder": "all"}}']
    options += ["--dtype", "float32", "--enforce-eager", "--served-model-name", "ladder"]
    options += two_nodes.options()
    env = {
        **two_nodes.ENV,
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(STEP_SECONDS),
    }
    with ExitStack() as stack:
        nodes = []
        for rank, role in enumerate(two_nodes.ROLES):
            arguments = [*options, *role]
            with forked_servers():
                node = Server(model, *arguments, env=env, log=tmp_path / f"{rank}.log")
            stack.callback(node.stop)
            nodes.append(node)
        first, second = nodes
        first.wait()
        yield first, second


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        # In one of our all-reduces, or in one of the few collectives that vLLM leaves to Gloo.
        (signal.SIGKILL, r"connection to tensor-parallel rank 1 broke|Connection \w+ by peer"),
        (signal.SIGSTOP, "timed out"),
    ],
    ids=["dies", "hangs"],
)
def test_the_server_says_so_and_ends(
    sent: signal.Signals, said: str, hosts: tuple[Server, Server]
) -> None:
    first, second = hosts
    body = {"model": "ladder", "prompt": [1, 2, 3], "max_tokens": 400, "ignore_eos": True}
    tokens = 0
    with httpx.stream(
        "POST", f"{first.url}/v1/completions", json={**body, "stream": True}, timeout=120
    ) as reply:
        assert reply.status_code == 200
        failed = False
        try:
            for line in reply.iter_lines():
                if not line.startswith("data: {"):
                    continue
                failed = failed or "error" in json.loads(line[6:])
                tokens += 1
                if tokens == 5:
                    _worker(second).send_signal(sent)
                    start = time.monotonic()
        except httpx.HTTPError:
            failed = True
    assert 5 <= tokens < 400
    assert failed
    first.process.wait(END_SECONDS)
    assert time.monotonic() - start < STEP_SECONDS + END_SECONDS
    assert not first.healthy()
    assert re.search(said, first.log_text())


def _worker(node: Server) -> psutil.Process:
    (worker,) = [
        process
        for process in psutil.Process(node.process.pid).children(recursive=True)
        if "Worker" in " ".join(command_line(process))
    ]
    return worker
