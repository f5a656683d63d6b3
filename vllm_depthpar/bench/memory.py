"""How much memory processes take (Linux): read from outside, so that they need not take part.

What counts is *anonymous* memory, which a process can't do without. Pages of mapped files, such as
checkpoints, count as resident too, but are the system's cache, which it takes back when it needs
memory.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

MIB = 2**20
_SAMPLE_SECONDS = 0.1


def of_process(pid: int | str | None) -> dict[str, int]:
    """RssAnon, VmRSS and VmHWM of a process ("self" or its number), in bytes.

    Raises:
        OSError: it has ended, or there is no /proc.
    """
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    pairs = (line.split(":") for line in lines if line.endswith("kB"))
    return {key: int(value.split()[0]) * 1024 for key, value in pairs}


def of_group(group: int) -> int:
    """Anonymous memory of all processes of a process group, in bytes; 0 where there is no /proc."""
    total = 0
    for pid in _members(group):
        with suppress(OSError):  # it has ended
            total += of_process(pid).get("RssAnon", 0)
    return total


class GroupPeak:
    """The peak of anonymous memory of a process group, read every 0.1 s inside a `with`.

    Attributes:
        bytes: of all its processes together; 0 where there is no /proc.
    """

    def __init__(self, group: int) -> None:
        self.bytes = 0
        self._group = group
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> GroupPeak:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            self.bytes = max(self.bytes, of_group(self._group))


def _members(group: int) -> list[str]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # After the name, which may hold anything: state, parent, group.
            fields = status.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
                found.append(status.parent.name)
    return found
