"""A benchmark that is killed goes on where it was; one that memory can't hold does not begin."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest
from fork_server import become, fork, forked_engines
from models import write_llama

from benchmarks.common import run_main
from benchmarks.serving import metrics_overhead
from vllm_depthpar.bench import memory
from vllm_depthpar.bench.memory import GIB

ROUNDS = 12


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    model = write_llama(tmp_path_factory.mktemp("model"))
    sizes = ["--plans", '{"pair": [0, 4]}', "--every", "1", "--steps", "2", "--prompt-tokens", "8"]
    return [metrics_overhead.__file__, str(model), *sizes, "--dtype", "float32", "--eager"]


def run(command: list[str]) -> None:
    """As a program does, but that its engines are forked."""
    with patch.object(sys, "argv", command), forked_engines():
        run_main(metrics_overhead.main)


def run_as_leader(env: dict[str, str], command: list[str], log: str) -> None:
    os.setsid()
    become(env, log)
    run(command)


def rounds_in(out: Path) -> dict[str, list[Any]]:
    if not out.exists():
        return {}
    return {batch: one["rounds"] for batch, one in json.loads(out.read_text())["batches"].items()}


def test_a_killed_benchmark_goes_on_with_the_same_settings(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, log = tmp_path / "out.json", tmp_path / "log"
    command = [*command, "--batches", "1", "2", "--rounds", f"{ROUNDS}", "--out", str(out)]
    killed = fork(run_as_leader, dict(os.environ), command, str(log))
    assert killed.pid
    deadline = time.monotonic() + 300
    while not rounds_in(out).get("2"):
        assert killed.exitcode is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    engines = psutil.Process(killed.pid).children(recursive=True)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    _, alive = psutil.wait_procs(engines, timeout=30)
    assert alive == []
    kept = rounds_in(out)
    assert len(kept["1"]) == ROUNDS
    assert 0 < len(kept["2"]) < ROUNDS

    with pytest.raises(SystemExit) as refused:
        run([*command, "--steps", "3"])
    assert f"{out} has rounds of other settings (steps: 2, not 3); allowed: " in str(refused.value)
    assert rounds_in(out) == kept

    run(command)
    found = rounds_in(out)
    assert found["1"] == kept["1"], "was not measured again"
    assert found["2"][: len(kept["2"])] == kept["2"]
    assert len(found["2"]) == ROUNDS
    report = json.loads(out.read_text())
    asked = f"python benchmarks/serving/metrics_overhead.py {Path(command[1]).name} "
    assert report["command"].startswith(asked)
    assert report["to_off"]["1"]["2"]["passes"] == ROUNDS * 2
    assert "| DEPTHPAR_METRICS | batch | ms a step, without |" in capsys.readouterr().out


def test_what_memory_does_not_hold_is_refused_before_it_begins(command: list[str]) -> None:
    have = memory.available()
    assert have is not None
    # Each engine has a GiB of KV cache.
    many = [f"{number}" for number in range(1, have // GIB + 1)]
    begun = time.monotonic()
    with pytest.raises(SystemExit) as refused:
        run([*command, "--every", *many])
    message = str(refused.value)
    assert message.startswith("error: too little memory: about ")
    assert f" GiB for {len(many) + 1} variants at once and 1 to spare, " in message
    assert message.endswith(" available; allowed: fewer --every")
    assert "\n" not in message
    assert time.monotonic() - begun < 10
