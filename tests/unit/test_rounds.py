"""Turns of a comparison: their order, and that nobody but the one whose turn it is runs."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator

import psutil
import pytest
from processes import wait_until_stopped

from vllm_depthpar.bench.rounds import awake, in_turn, pause
from vllm_depthpar.launch.process_group import ProcessGroup


@pytest.fixture
def busy() -> Iterator[ProcessGroup]:
    """Two processes that compute."""
    command = ["sh", "-c", "while :; do :; done & while :; do :; done"]
    with subprocess.Popen(command, start_new_session=True) as process:
        group = ProcessGroup(process.pid)
        while len(psutil.Process(process.pid).children()) < 1:
            time.sleep(0.01)
        yield group
        group.signal(signal.SIGKILL)
        process.wait()
        group.release()


def test_order() -> None:
    orders = ["".join(in_turn("ABC", number)) for number in range(-2, 4)]
    assert orders == ["ABC", "ABC", "ABC", "BCA", "CAB", "ABC"]


def test_awake_meanwhile(busy: ProcessGroup) -> None:
    def fail() -> None:
        with awake(busy):
            wait_until_stopped(busy.leader, False)
            raise ZeroDivisionError

    wait_until_stopped(busy.leader, False)
    pause(busy)
    wait_until_stopped(busy.leader)
    with awake(busy):
        wait_until_stopped(busy.leader, False)
    wait_until_stopped(busy.leader)
    with pytest.raises(ZeroDivisionError):
        fail()
    wait_until_stopped(busy.leader)
