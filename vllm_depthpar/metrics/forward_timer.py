"""What the worker of the first tensor-parallel rank publishes of its model and of its speed.

Gauges of the plan, once; and of every n-th forward pass (`DEPTHPAR_METRICS`) its time and that of
its all-reduces. On a GPU Python runs ahead of the device: there a pass is timed by events before
and after what it enqueues, also where that is one CUDA graph. They are read when a later pass
begins, by which time they are most likely over; nothing ever waits for them.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, replace

from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group

from vllm_depthpar.metrics import metric_files
from vllm_depthpar.metrics.all_reduce_timer import AllReduceTimer, time_with
from vllm_depthpar.metrics.clocks import Clock, Mark, clock_for
from vllm_depthpar.metrics.metric_files import Counter, Histogram, Metric, MetricFiles
from vllm_depthpar.plan import Plan
from vllm_depthpar.plan.attached import plan_of, shape_of, source_of
from vllm_depthpar.plan.drawing import effects
from vllm_depthpar.plan.spec import MODES, SINGLE, STANDARD
from vllm_depthpar.vllm_compat import kv_cache_bytes, watch_passes

PLAN_INFO = Metric("plan_info", "The plan that is served, in labels; always 1.")
EFFECTIVE_DEPTH = Metric("effective_depth", "Blocks that run one after the other.")
LAYERS = Metric("layers", "The checkpoint's layers by how they run; they sum to its number.")
ALL_REDUCES_PER_FORWARD = Metric(
    "all_reduces_per_forward", "All-reduces of one forward pass; 0 on one rank."
)
HIDDEN_ALL_REDUCES_PER_FORWARD = Metric(
    "hidden_all_reduces_per_forward",
    "Those of them that the plan lets run while the next module computes.",
)
WEIGHT_BYTES_SAVED = Metric(
    "weight_bytes_saved", "Bytes of weights that each rank holds less than with every layer."
)
KV_BYTES_PER_TOKEN_SAVED = Metric(
    "kv_bytes_per_token_saved",
    "Bytes of KV cache that a token takes less on each rank than with every layer.",
)
TIMED_EVERY = Metric("timed_every", "Every how many forward passes one is timed; 0 for none.")
FORWARD_SECONDS = Metric(
    "forward_seconds",
    "Time of the timed forward passes, by phase and by the number of sequences in the batch. "
    "Decode: one new token of every sequence; prefill: prompt tokens among them.",
    "histogram",
)
FORWARDS_DROPPED = Metric(
    "forwards_dropped",
    "Forward passes that were to be timed and were not, since too many before them had not ended.",
    "counter",
)
ALL_REDUCES = Metric(
    "all_reduces",
    "All-reduces timed, in the forward passes of forward_seconds, on rank 0.",
    "counter",
)
ALL_REDUCE_SECONDS = Metric(
    "all_reduce_seconds",
    "Time in them. Exposed: the rank was in it, sending, waiting or adding. Hidden: it was on its "
    "way while the rank computed; on a CPU the most that can have been so.",
    "counter",
)
ALL_REDUCE_FORWARD_SECONDS = Metric(
    "all_reduce_forward_seconds",
    "Time of the forward passes that they were in; of others, as of CUDA graphs, none is timed.",
    "counter",
)

# Passes that were timed and are not over, at most; vLLM is two ahead of a GPU.
PENDING = 16

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


def watch(model: nn.Module, vllm_config: VllmConfig) -> None:
    """Publish a model that is being built, and time its forward passes.

    Does nothing without a folder for metrics, on other ranks than the first, and for the draft
    model of speculative decoding.
    """
    folder = metric_files.folder()
    draft = vllm_config.model_config.runner_type == "draft"
    if folder is None or draft or get_tp_group().rank_in_group != 0:
        return
    engine = vllm_config.parallel_config.data_parallel_index
    labels = {
        "model_name": str(vllm_config.model_config.served_model_name),
        "engine": str(engine),
    }
    # A process may hold several engines, one after the other.
    owner = f"{os.getpid()}-{vllm_config.instance_id}"
    files = MetricFiles(folder, owner, labels)
    clock = clock_for(vllm_config.device_config.device_type)
    _publish(files, vllm_config, metric_files.every() if clock else 0)
    if clock:
        speculative = vllm_config.speculative_config
        drafts = speculative.num_speculative_tokens if speculative is not None else 0
        ranks = vllm_config.parallel_config.tensor_parallel_size
        meter = Meter(files, clock, metric_files.every(), ranks, decode_tokens=1 + drafts)
        watch_passes(model, meter, vllm_config.use_v2_model_runner)


def _publish(files: MetricFiles, vllm_config: VllmConfig, every: int) -> None:
    config = vllm_config.model_config
    plan = plan_of(config)
    tp = vllm_config.parallel_config.tensor_parallel_size
    shape = replace(shape_of(vllm_config), dtype_bytes=config.dtype.itemsize)
    known = effects(plan, shape, tp)
    files.set_gauge(
        PLAN_INFO,
        1,
        digest=plan.digest,
        name=plan.name,
        source=str(source_of(config)),
        effective_depth=str(plan.depth),
        layout=", ".join(way for way in known["layouts"] if way != SINGLE) or SINGLE,
        tensor_parallel_size=str(tp),
    )
    files.set_gauge(EFFECTIVE_DEPTH, plan.depth)
    for kind, count in layers_by_kind(plan).items():
        files.set_gauge(LAYERS, count, kind=kind)
    ranks = tp > 1
    files.set_gauge(ALL_REDUCES_PER_FORWARD, ranks * known["all_reduces"]["after"])
    files.set_gauge(HIDDEN_ALL_REDUCES_PER_FORWARD, ranks * known["hidden_all_reduces"])
    if config.quantization is None:
        files.set_gauge(WEIGHT_BYTES_SAVED, _saved(known["weight_bytes_per_rank"]))
    kv = effects(plan, replace(shape, dtype_bytes=kv_cache_bytes(vllm_config)), tp)
    files.set_gauge(KV_BYTES_PER_TOKEN_SAVED, _saved(kv["kv_bytes_per_token_per_rank"]))
    files.set_gauge(TIMED_EVERY, every)


def _saved(change: dict[str, int]) -> int:
    return change["before"] - change["after"]


def layers_by_kind(plan: Plan) -> dict[str, int]:
    """Count the layers that run alone, side by side, in blocks of another mode (whatever their
    width), in blocks that leave an all-reduce out, with one half only, not at all."""
    halves = plan.drop_attention | plan.drop_mlp
    desync = {layer for layer, _ in plan.desync} - halves
    widths: dict[str, list[int]] = {mode: [] for mode in (STANDARD, *MODES)}
    for position, block in enumerate(plan.blocks):
        widths[plan.mode(position)].append(len(set(block) - halves - desync))
    return {
        "single": widths[STANDARD].count(1),
        "parallel": sum(width for width in widths[STANDARD] if width > 1),
        **{mode: sum(widths[mode]) for mode in MODES},
        "desync": len(desync),
        "half": len(halves),
        "skipped": len(plan.skipped),
    }


def bucket_of(sequences: int) -> str:
    """Label a batch's size: "1", "2", "3-4", "5-8", and so on by powers of two."""
    high = 1 << (sequences - 1).bit_length()
    low = high // 2 + 1
    return str(high) if low >= high else f"{low}-{high}"


@dataclass
class TimedPass:
    """A forward pass that is timed.

    Attributes:
        phase, batch_size: its labels.
        all_reduces: their timer; None on one rank, which has none.
        begun, ended: when.
    """

    phase: str
    batch_size: str
    all_reduces: AllReduceTimer | None
    begun: Mark = None
    ended: Mark = None


class Meter:
    """Times every n-th forward pass of a model.

    Args:
        clock: of the device that computes.
        every: n.
        ranks: tensor-parallel size; one rank has no all-reduces to time.
        decode_tokens: new tokens of a sequence in a decoding step, at most.
    """

    def __init__(
        self, files: MetricFiles, clock: Clock, every: int, ranks: int, decode_tokens: int
    ) -> None:
        self._files = files
        self._clock = clock
        self._every = every
        self._ranks = ranks
        self._decode_tokens = decode_tokens
        self._passes = 0
        self._running: TimedPass | None = None
        self._pending: deque[TimedPass] = deque()
        self._forward: dict[tuple[str, str], Histogram] = {}
        self._reductions: dict[str, tuple[Counter, ...]] = {}
        self._dropped = files.counter(FORWARDS_DROPPED)

    def begin(self, tokens: Collection[int]) -> None:
        """Begin to time a pass, if it is its turn.

        Args:
            tokens: new ones of each sequence in the batch.
        """
        self._publish()
        self._running = None
        time_with(None)
        turn = self._passes % self._every == 0
        self._passes += 1
        if not turn:
            return
        if len(self._pending) == PENDING:
            self._dropped.add(1)
            return
        phase = "decode" if max(tokens) <= self._decode_tokens else "prefill"
        timer = AllReduceTimer(self._clock) if self._ranks > 1 else None
        time_with(timer)
        self._running = TimedPass(phase, bucket_of(len(tokens)), timer, self._clock.mark())

    def end(self) -> None:
        """Note that all of the pass was given to the device."""
        if self._running is None:
            return
        self._running.ended = self._clock.mark()
        time_with(None)
        self._pending.append(self._running)
        self._running = None
        self._publish()

    def _publish(self) -> None:
        """Publish the passes that are over."""
        while self._pending and self._clock.is_over(self._pending[0].ended):
            one = self._pending.popleft()
            seconds = self._clock.seconds(one.begun, one.ended)
            self._histogram(one.phase, one.batch_size).observe(seconds)
            if one.all_reduces is not None and one.all_reduces.count:
                amounts = one.all_reduces.count, *one.all_reduces.seconds(), seconds
                for counter, amount in zip(self._counters(one.phase), amounts, strict=True):
                    counter.add(amount)

    def _histogram(self, phase: str, batch_size: str) -> Histogram:
        key = phase, batch_size
        if key not in self._forward:
            self._forward[key] = self._files.histogram(
                FORWARD_SECONDS, SECONDS, phase=phase, batch_size=batch_size
            )
        return self._forward[key]

    def _counters(self, phase: str) -> tuple[Counter, ...]:
        if phase not in self._reductions:
            counter = self._files.counter
            self._reductions[phase] = (
                counter(ALL_REDUCES, phase=phase),
                counter(ALL_REDUCE_SECONDS, phase=phase, kind="exposed"),
                counter(ALL_REDUCE_SECONDS, phase=phase, kind="hidden"),
                counter(ALL_REDUCE_FORWARD_SECONDS, phase=phase),
            )
        return self._reductions[phase]
