"""Processes that may end while a test looks at them."""

import psutil


def command_line(process: psutil.Process) -> list[str]:
    """A process's arguments; empty for one that has ended."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []
