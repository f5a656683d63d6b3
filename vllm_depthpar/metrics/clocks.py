"""What times are taken with: the processor's clock, or marks in a GPU's streams, read later."""

from __future__ import annotations

from time import perf_counter
from typing import Any, Protocol

import torch

# A moment. Opaque, but to the clock that made it.
Mark = Any


class Clock(Protocol):
    """Marks moments of a computation, and says how far they are apart once they are over."""

    def mark(self) -> Mark:
        """Mark the moment in which everything enqueued so far is done; do not wait for it."""

    def is_over(self, mark: Mark) -> bool:
        """Say whether that moment has come."""

    def seconds(self, begun: Mark, ended: Mark) -> float:
        """Return the time from one moment to another; both are over."""


class HostClock:
    """The processor's: nothing is enqueued, so that a moment is over when it is marked."""

    mark = staticmethod(perf_counter)

    def is_over(self, mark: float) -> bool:
        """Say that it is: always."""
        return True

    def seconds(self, begun: float, ended: float) -> float:
        """Return the time from one moment to another."""
        return ended - begun


class CudaClock:
    """A GPU's: marks are events in the current stream, whichever it is, and nothing waits for them.

    Not while a CUDA graph is captured: an event would become a part of the graph.
    """

    def mark(self) -> torch.cuda.Event:
        """Record an event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def is_over(self, mark: torch.cuda.Event) -> bool:
        """Say whether the stream has come so far."""
        return mark.query()

    def seconds(self, begun: torch.cuda.Event, ended: torch.cuda.Event) -> float:
        """Return the time between two events, on whatever streams of a GPU they are."""
        return begun.elapsed_time(ended) / 1e3


def clock_for(device_type: str) -> Clock | None:
    """Return a clock for computations on "cpu" or "cuda" (ROCm's name, too); else None."""
    if device_type == "cpu":
        return HostClock()
    return CudaClock() if device_type == "cuda" else None
