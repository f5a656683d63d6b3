"""The workers' metrics on vLLM's `/metrics`; `metric_files` is their way here."""

from __future__ import annotations

import os
from collections.abc import Iterable

from prometheus_client import REGISTRY, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from vllm_depthpar.metrics import metric_files


def register() -> None:
    """Register the collector: vLLM's entry point (group `vllm.general_plugins`), in every process.
    Idempotent."""
    REGISTRY.register(_collector)


def collect() -> list[Metric]:
    """Collect this package's metrics of all engines whose workers run on this host; none without a
    plan."""
    folder = metric_files.folder()
    if folder is None:
        return []
    every = MultiProcessCollector(None, path=str(folder)).collect()
    return [metric for metric in every if metric.name.startswith(metric_files.PREFIX)]


class _Collector(Collector):
    """What `collect` finds when `/metrics` is asked, where vLLM does not collect it itself.

    vLLM's `unregister_vllm_metrics` takes out of the registry what has a `_name` that starts with
    "vllm:"; this has none, and stays.
    """

    def describe(self) -> Iterable[Metric]:
        """Name nothing: names are not known before a worker has started."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Collect them; none in vLLM's multiprocess mode, whose own collector reads the same."""
        return [] if metric_files.VLLM_FOLDER_ENV in os.environ else collect()


_collector = _Collector()
