"""How much memory processes take (Linux): read from outside, so that they need not take part.

What counts is *anonymous* memory, which a process can't do without. Pages of mapped files, such as
checkpoints, count as resident too, but are the system's cache, which it takes back when it needs
memory.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from vllm_depthpar.errors import UserError
from vllm_depthpar.plan import Plan
from vllm_depthpar.plan.model_shape import ModelShape

MIB, GIB = 2**20, 2**30
CONTROL_GROUPS = Path("/sys/fs/cgroup")
# What a process takes that has imported vLLM, with what a rank's step needs: 480 to 640 MiB,
# measured on vLLM 0.32's CPU build.
_PROCESS_BYTES = 580 * MIB
# For whoever asks, and the rest of the system.
_SPARE_BYTES = 1 * GIB
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


def estimate(
    shape: ModelShape, plan: Plan, tp: int, kv_bytes: int, processes: int, quantized: bool = False
) -> int:
    """Estimate the bytes that a variant takes on a CPU while it runs.

    Args:
        shape: in the dtype that it computes in.
        kv_bytes: KV cache of each rank.
        processes: of vLLM's, the ranks among them.
        quantized: its weights are smaller than the shape says; they are left out.
    """
    weights = 0 if quantized else shape.weight_bytes(plan, tp)
    if shape.tied:  # packed for its kernels the head is a matrix of its own
        weights += shape.vocab * shape.hidden * shape.dtype_bytes // tp
    return tp * (weights + kv_bytes) + processes * _PROCESS_BYTES


def available() -> int | None:
    """Return the bytes that processes can still take; None where there is no /proc."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    (system,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return min([int(system) * 1024, *_left_by_control_groups()])


def _left_by_control_groups() -> list[int]:
    """Read what a container's limits leave, of each version of control groups that has one."""
    left = []
    for folder, limit, used in (
        ("", "memory.max", "memory.current"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        group = CONTROL_GROUPS / folder
        with suppress(OSError, ValueError):  # there is none, or it is "max"
            most, now = (int((group / name).read_text()) for name in (limit, used))
            fields = (group / "memory.stat").read_text().split()
            left.append(most - now + int(fields[fields.index("inactive_file") + 1]))
    return left


def check(
    needed: Mapping[str, int], alive: int, allowed: str = "--one-at-a-time, or fewer --plans"
) -> None:
    """Refuse variants that do not fit into memory together.

    Args:
        needed: bytes of each, by its label.
        alive: how many of them are alive at once.
        allowed: what the user can do instead, where that is more than one.

    Raises:
        UserError: they need more than there is.
    """
    largest = sorted(needed.values())[-alive:]
    have = available()
    if have is not None and not _fit(largest, have):
        who, instead = f"{alive} variants at once", allowed
        if alive == 1:
            who, instead = "the largest variant alone", "less KV cache, or a smaller model"
        raise UserError(
            f"too little memory: about {sum(largest) / GIB:.1f} GiB for {who} and "
            f"{_SPARE_BYTES / GIB:.0f} to spare, {have / GIB:.1f} available; allowed: {instead}"
        )


def fitting(needed: Mapping[str, int]) -> int:
    """Count the variants that fit into memory together, whichever they are.

    Raises:
        UserError: not even one does.
    """
    check(needed, 1)
    have, sizes = available(), sorted(needed.values())
    alive = len(sizes)
    while have is not None and alive > 1 and not _fit(sizes[-alive:], have):
        alive -= 1
    return alive


def _fit(sizes: Sequence[int], have: int) -> bool:
    return sum(sizes) + _SPARE_BYTES <= have
