"""The two-host benchmark's own promises; what it measures is not for a timed test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from processes import command_line

from benchmarks.network import cluster
from benchmarks.network.two_hosts import Link, NotPossible, TwoHosts

CLUSTER = [sys.executable, cluster.__file__]


def test_says_what_it_needs_and_exits_with_2(tmp_path: Path) -> None:
    env = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run(CLUSTER, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "\nerror: two hosts need Linux with iproute2" in f"\n{done.stderr}"


def test_a_wrong_link_is_one_line() -> None:
    done = subprocess.run([*CLUSTER, "--links", "fast"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "link 'fast' is unknown; allowed: " in done.stderr.splitlines()[-1]


def test_nothing_remains_when_it_is_interrupted(tmp_path: Path, smollm2: Path) -> None:
    try:
        with TwoHosts(Link()):
            pass
    except NotPossible as why:
        pytest.skip(str(why))
    with (tmp_path / "log").open("wb") as log:
        benchmark = subprocess.Popen(
            [*CLUSTER, "--plans", "identity"], stdout=log, stderr=log, start_new_session=True
        )
    try:
        inside: list[psutil.Process] = []
        deadline = time.monotonic() + 60
        while len(inside) < 2:
            assert benchmark.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
            inside = [
                process
                for process in psutil.Process(benchmark.pid).children()
                if "serve" in command_line(process)
            ]
        benchmark.send_signal(signal.SIGTERM)
        assert benchmark.wait(60) == 143
    finally:
        benchmark.kill()
        benchmark.wait()
    _, alive = psutil.wait_procs(inside, timeout=5)
    assert alive == []
    spaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert f"-{benchmark.pid}-" not in spaces
