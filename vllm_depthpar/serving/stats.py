"""The metrics' samples as one JSON-ready object for each engine. No vLLM."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client import Metric
from prometheus_client.samples import Sample
from pydantic import BaseModel, Field

from vllm_depthpar.metrics.metric_files import PREFIX


class ForwardPasses(BaseModel):
    """Timed forward passes with batches of one size."""

    batch_size: str = Field(description='sequences: "1", "2", "3-4", "5-8", ...')
    count: int
    seconds: float


class AllReduces(BaseModel):
    """The all-reduces of timed forward passes."""

    count: int
    exposed_seconds: float = Field(description="the rank sent, waited or added")
    hidden_seconds: float = Field(
        description="one was on its way while the rank computed; on a CPU at most so much"
    )
    forward_seconds: float = Field(description="of the forward passes that they were in")


class Phase(BaseModel):
    """Decode (one new token of every sequence) or prefill (prompt tokens among them)."""

    forward_passes: list[ForwardPasses] = []
    all_reduces: AllReduces | None = Field(
        default=None, description="null where they can't be timed, or there are none"
    )


class EngineStats(BaseModel):
    """One engine, as its first tensor-parallel rank sees it."""

    engine: str
    model: str
    plan_digest: str
    effective_depth: int
    layers: dict[str, int] = Field(description="by how they run")
    all_reduces_per_forward: int
    hidden_all_reduces_per_forward: int
    weight_bytes_saved: int | None = Field(
        default=None, description="per rank; null for quantized weights"
    )
    kv_bytes_per_token_saved: int = Field(description="per rank")
    timed_every: int = Field(description="forward passes; 0: none is timed")
    decode: Phase
    prefill: Phase


class Stats(BaseModel):
    """Every engine whose worker runs on this host; none with DEPTHPAR_METRICS=0."""

    engines: list[EngineStats]


def stats_of(metrics: Iterable[Metric]) -> Stats:
    """Arrange samples by engine."""
    samples = [sample for metric in metrics for sample in metric.samples]
    engines = sorted({sample.labels["engine"] for sample in samples}, key=int)
    return Stats(
        engines=[
            _engine(engine, [s for s in samples if s.labels["engine"] == engine])
            for engine in engines
        ]
    )


def _engine(engine: str, samples: list[Sample]) -> EngineStats:
    def named(name: str, **labels: str) -> list[Sample]:
        return [
            sample
            for sample in samples
            if sample.name == PREFIX + name and labels.items() <= sample.labels.items()
        ]

    def phase(name: str) -> dict[str, Any]:
        sums, counts = (
            {s.labels["batch_size"]: s.value for s in named(f"forward_seconds_{of}", phase=name)}
            for of in ("sum", "count")
        )
        reductions = {
            f"{seconds.labels['kind']}_seconds": seconds.value
            for seconds in named("all_reduce_seconds_total", phase=name)
        }
        counted = {
            "count": "all_reduces_total",
            "forward_seconds": "all_reduce_forward_seconds_total",  # the last to be there
        }
        for key, total in counted.items():
            reductions.update((key, sample.value) for sample in named(total, phase=name))
        return {
            "forward_passes": [
                {"batch_size": size, "count": counts[size], "seconds": sums[size]}
                for size in sorted(counts, key=lambda size: int(size.partition("-")[0]))
            ],
            "all_reduces": reductions if "forward_seconds" in reductions else None,
        }

    # Of a quantized model there is no weight_bytes_saved; all others are there.
    gauges = {name: sample.value for name in EngineStats.model_fields for sample in named(name)}
    info = {label: text for sample in named("plan_info") for label, text in sample.labels.items()}
    return EngineStats.model_validate(
        {
            **gauges,
            "engine": engine,
            "model": info["model_name"],
            "plan_digest": info["digest"],
            "layers": {sample.labels["kind"]: sample.value for sample in named("layers")},
            "decode": phase("decode"),
            "prefill": phase("prefill"),
        }
    )
