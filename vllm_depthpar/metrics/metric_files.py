"""Metrics of an engine's worker, in files that the API servers read: how the numbers travel.

vLLM's `SchedulerStats` has no slot for a plugin's numbers, `collective_rpc` stops the engine's loop
for every scrape, and a stat logger plugin switches vLLM's own statistics on for every model, in
spite of --disable-log-stats. So the worker writes what prometheus_client's multiprocess mode
writes: one memory-mapped file for each kind of metric, 16 bytes for each new value, no system call.
Where vLLM itself uses that mode (several API servers, PROMETHEUS_MULTIPROC_DIR) the files go to its
folder, and every API server already merges them; else to a folder of ours, which
`collector` reads when it is scraped. Several engines write several files, and
differ in the label `engine`.

The folder's name is in the environment, as vLLM's is; vLLM copies it to workers that Ray starts. On
another host than the API server's there is no such folder, and a worker publishes nothing.

Relies on: `prometheus_client.mmap_dict` (0.18 and later), which that package does not document, and
the file names and keys that its `MultiProcessCollector` takes apart.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import tempfile
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from math import inf
from multiprocessing.util import Finalize
from pathlib import Path
from typing import NamedTuple

from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.utils import floatToGoString

from vllm_depthpar.errors import UserError

# 0: no metrics; n: every n-th forward pass is timed.
ENV = "DEPTHPAR_METRICS"
EVERY = 8
FOLDER_ENV = "DEPTHPAR_METRICS_DIR"
VLLM_FOLDER_ENV = "PROMETHEUS_MULTIPROC_DIR"
NAME, MEMORY = "depthpar-metrics", Path("/dev/shm")
PREFIX = "vllm:depthpar_"


class Metric(NamedTuple):
    """What is published under one name.

    Attributes:
        name: without prefix, and without the `_total` of counters.
        help: for people.
        kind: "gauge", "counter" or "histogram".
    """

    name: str
    help: str
    kind: str = "gauge"


def every() -> int:
    """Read every how many forward passes one is timed; 0 for no metrics at all.

    Raises:
        UserError: `DEPTHPAR_METRICS` is not such a number.
    """
    text = os.environ.get(ENV, str(EVERY))
    if not text.isascii() or not text.isdigit():
        raise UserError(
            f"environment variable {ENV}={text!r} is not a number; allowed: 0 for no metrics, n to "
            f"time every n-th forward pass ({EVERY})"
        )
    return int(text)


def prepare() -> None:
    """Make the folder, in the first process of a server; those that it starts inherit the name."""
    inherited = multiprocessing.parent_process() is not None and FOLDER_ENV in os.environ
    if every() == 0 or VLLM_FOLDER_ENV in os.environ or inherited:
        return
    parent = MEMORY if MEMORY.is_dir() else Path(tempfile.gettempdir())
    _remove_left(parent)
    # It gets the name that `_remove_left` looks for once it is locked, for as long as this process
    # lives.
    hidden = tempfile.mkdtemp(prefix=f".{NAME}-{os.getpid()}-", dir=parent)
    fcntl.flock(os.open(hidden, os.O_RDONLY), fcntl.LOCK_EX)
    path = str(parent / Path(hidden).name.removeprefix("."))
    os.rename(hidden, path)
    os.environ[FOLDER_ENV] = path
    # At the end of this process and of no fork of it; atexit would not run in one of
    # multiprocessing's.
    Finalize(None, shutil.rmtree, args=(path, True), exitpriority=0)


def _remove_left(parent: Path) -> None:
    """Remove folders of servers that were killed: their locks went with them. A process id would
    not do: containers may share the memory and not the ids."""
    for path in parent.glob(f"{NAME}-*"):
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:  # another user's, or gone by now
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)


def folder() -> Path | None:
    """Find where the files are; None where there are no metrics."""
    path = os.environ.get(VLLM_FOLDER_ENV) or os.environ.get(FOLDER_ENV)
    return Path(path) if every() and path and Path(path).is_dir() else None


class MetricFiles:
    """The metrics that one worker writes. Not for several threads.

    Args:
        folder: where to.
        owner: a name that no other writer has.
        labels: of every sample.
    """

    def __init__(self, folder: Path, owner: str, labels: Mapping[str, str]) -> None:
        self._folder = folder
        self._owner = owner
        self._labels = dict(labels)
        self._files: dict[str, MmapedDict] = {}

    def set_gauge(self, metric: Metric, value: float, **labels: str) -> None:
        """Write a value; where several engines' have the same labels, the newest counts."""
        file, key = self._place(metric, PREFIX + metric.name, labels)
        file.write_value(key, value, time.time())

    def counter(self, metric: Metric, **labels: str) -> Counter:
        """Make a counter, which is there from now on."""
        return Counter(*self._place(metric, f"{PREFIX}{metric.name}_total", labels))

    def histogram(self, metric: Metric, bounds: Sequence[float], **labels: str) -> Histogram:
        """Make a histogram of buckets up to and including each of `bounds`, ascending."""
        name = PREFIX + metric.name
        edges = (*bounds, inf)
        buckets = [
            Counter(*self._place(metric, f"{name}_bucket", {**labels, "le": floatToGoString(edge)}))
            for edge in edges
        ]
        total = Counter(*self._place(metric, f"{name}_sum", labels))
        return Histogram(edges, buckets, total)

    def _place(
        self, metric: Metric, sample: str, labels: Mapping[str, str]
    ) -> tuple[MmapedDict, str]:
        kind = "gauge_mostrecent" if metric.kind == "gauge" else metric.kind
        if kind not in self._files:
            self._files[kind] = MmapedDict(str(self._folder / f"{kind}_{self._owner}.db"))
        labels = {**self._labels, **labels}
        key = mmap_key(PREFIX + metric.name, sample, [*labels], [*labels.values()], metric.help)
        return self._files[kind], key


class Counter:
    """A value in a file that only grows."""

    def __init__(self, file: MmapedDict, key: str) -> None:
        self._file, self._key = file, key
        self._value = 0.0
        self.add(0)

    def add(self, amount: float) -> None:
        """Count so much more."""
        self._value += amount
        self._file.write_value(self._key, self._value, 0.0)


class Histogram(NamedTuple):
    """Counters of buckets, each up to and including its edge, and of the sum."""

    edges: tuple[float, ...]
    buckets: list[Counter]
    total: Counter

    def observe(self, value: float) -> None:
        """Count a value in its bucket."""
        self.buckets[bisect_left(self.edges, value)].add(1)
        self.total.add(value)
