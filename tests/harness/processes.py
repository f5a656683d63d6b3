"""Processes as a test sees them from outside, where they may end, stop and start meanwhile."""

import time

import psutil


def command_line(process: psutil.Process) -> list[str]:
    """A process's arguments; empty for one that has ended."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def are_stopped(leader: int) -> set[bool]:
    """Whether a process and its descendants are stopped (SIGSTOP); both answers if they differ."""
    first = psutil.Process(leader)
    every = [first, *first.children(recursive=True)]
    return {process.status() == psutil.STATUS_STOPPED for process in every}


def wait_until_stopped(leader: int, wanted: bool = True) -> None:
    """Return when a signal that stops them, or lets them go on, has reached all of them."""
    deadline = time.monotonic() + 10
    while (found := are_stopped(leader)) != {wanted}:
        assert time.monotonic() < deadline, found
        time.sleep(0.01)
