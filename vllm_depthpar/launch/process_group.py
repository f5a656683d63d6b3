"""A process that this one starts and all that it starts in turn: signalled and ended together, and
what they said last."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress

_LAST_LINES = 30


class ProcessGroup:
    """The process group that a started process leads, or will lead once it has called setsid.

    It is killed when this process ends, even if this one is killed, and even if the group is
    stopped then. `release` must be called once the group has ended: numbers of processes are used
    again.

    Args:
        leader: the process's number.
    """

    def __init__(self, leader: int) -> None:
        self.leader = leader
        # It waits for a line. The end of the pipe without one is the end of this process.
        self._guard = subprocess.Popen(
            ["sh", "-c", f"read line || kill -KILL -{leader} || kill -KILL {leader}"],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def signal(self, number: signal.Signals) -> None:
        """Signal every process of the group; harmless when none is left."""
        with suppress(ProcessLookupError):
            os.killpg(self.leader, number)

    def release(self) -> None:
        """Let the group be; harmless the second time."""
        if self._guard.poll() is None:
            self._guard.communicate(b"\n")


def last_lines(log: str) -> str:
    """Return the end of what processes have written, without empty lines."""
    return "\n".join([line for line in log.splitlines() if line.strip()][-_LAST_LINES:])
