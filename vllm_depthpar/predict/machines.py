"""What plans run on, and what they are asked for: the words of the cost model.

A `Device` is one tensor-parallel rank's share of a machine, a `Link` is what joins the ranks, and a
`Deployment` is so many of the one over the other. Their numbers are achieved ones, not those of
data sheets. Those that have names are in `vllm_depthpar.predict.devices` and
`vllm_depthpar.predict.links`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_depthpar.errors import UserError


@dataclass(frozen=True)
class Device:
    """One rank's processor and memory.

    Attributes:
        memory_bandwidth: bytes per second that weights are read at, in products with few rows.
        flops: (rows, FLOP/s) of matrix products with so many rows of activations, rows ascending;
            one entry where the number of rows makes no difference.
        layer_seconds: what every decoder layer takes whatever its size: launches, norms, glue.
        step_seconds: what every step takes whatever the model: scheduling, sampling.
        reduce_seconds: what starting and finishing one all-reduce takes from the rank that
            computes, so that nothing hides it.
        reduce_bandwidth: bytes per second of an all-reduce that this rank itself moves, likewise
            hidden by nothing: a CPU's kernel copies on the core that computes.
        plain_reduce_seconds: what an all-reduce takes longer in plain vLLM.
        overlap: the share of an all-reduce's time on the way that a rank can compute in; what it
            lacks to 1 the all-reduce takes from the rank's own processor.
        source: where the numbers are from.
    """

    name: str
    memory_bandwidth: float
    flops: tuple[tuple[int, float], ...]
    layer_seconds: float = 0.0
    step_seconds: float = 0.0
    reduce_seconds: float = 0.0
    reduce_bandwidth: float = math.inf
    plain_reduce_seconds: float = 0.0
    overlap: float = 1.0
    source: str = ""

    def flops_at(self, rows: float) -> float:
        """Interpolate FLOP/s of products with so many rows: between two known ones time grows
        evenly."""
        (low, at_low), *others = self.flops
        if rows <= low:
            return at_low
        for high, at_high in others:
            if rows <= high:
                seconds = low / at_low + (rows - low) / (high - low) * (
                    high / at_high - low / at_low
                )
                return rows / seconds
            low, at_low = high, at_high
        return at_low


@dataclass(frozen=True)
class Link:
    """What joins the ranks.

    Attributes:
        latency_seconds: from one rank to another, for a message of no size.
        bandwidth: bytes per second that one rank sends at.
        peer_seconds: what every rank beyond the second adds to the latency of an all-reduce.
        shared_memory: the ranks are processes on the cores of one host, whose all-reduces run over
            its memory on the threads that compute: nothing can hide them.
        source: where the numbers are from.
    """

    name: str
    latency_seconds: float
    bandwidth: float
    peer_seconds: float = 0.0
    shared_memory: bool = False
    source: str = ""

    def all_reduce_seconds(self, size: float, ranks: int) -> float:
        """Predict the time on the way of an all-reduce of `size` bytes between two ranks or more.

        The faster of one step, in which every rank sends all of its term to every other, and two,
        a reduce-scatter and an all-gather.
        """
        latency = self._latency(ranks)
        one = latency + (ranks - 1) * size / self.bandwidth
        two = 2 * latency + 2 * (ranks - 1) / ranks * size / self.bandwidth
        return min(one, two)

    def gather_seconds(self, size: float, ranks: int) -> float:
        """Predict the time on the way until one rank has the `size` bytes of every other."""
        return self._latency(ranks) + (ranks - 1) * size / self.bandwidth

    def _latency(self, ranks: int) -> float:
        return self.latency_seconds + (ranks - 2) * self.peer_seconds


@dataclass(frozen=True)
class Deployment:
    """Where a model is served: `tp` ranks, one a device.

    Attributes:
        link: between the ranks; None: communication is free.

    Raises:
        UserError: `tp` is below 1.
    """

    device: Device
    link: Link | None = None
    tp: int = 1

    def __post_init__(self) -> None:
        _check("tp", self.tp, 1)


@dataclass(frozen=True)
class Workload:
    """What one forward pass computes.

    Attributes:
        batch: sequences.
        context: tokens that every sequence has in the KV cache before.
        tokens: new tokens of every sequence: 1 when decoding, the prompt's length in prefill.

    Raises:
        UserError: a number is too small.
    """

    batch: int = 1
    context: int = 0
    tokens: int = 1

    def __post_init__(self) -> None:
        _check("batch", self.batch, 1)
        _check("context", self.context, 0)
        _check("tokens", self.tokens, 1)

    @property
    def rows(self) -> int:
        """Rows of activations in every product: the new tokens of all sequences."""
        return self.batch * self.tokens


def _check(name: str, value: int, lowest: int) -> None:
    if value < lowest:
        raise UserError(f"{name} {value} is too small; allowed: {lowest} or more")
