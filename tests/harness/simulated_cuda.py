"""Stand-ins for torch.cuda's streams and events: a device on which work takes simulated seconds.

There is no GPU to test on. What is tested with these is what our code asks of CUDA, and what it
makes of the answers; not that CUDA answers so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


class Device:
    """A device with streams, of which `compute` is current.

    Attributes:
        now: how far it has come, in seconds: what is enqueued for later is not done.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.compute = self.current = Stream()

    def works(self, seconds: float) -> None:
        """Enqueue work in the current stream."""
        self.current.ends += seconds

    def catches_up(self) -> None:
        """Do all that is enqueued in the stream that computes."""
        self.now = self.compute.ends


class Stream:
    """A queue of work.

    Attributes:
        ends: when all that is in it is done, in seconds.
    """

    def __init__(self) -> None:
        self.ends = 0.0

    def wait_stream(self, other: Stream) -> None:
        self.ends = max(self.ends, other.ends)

    def wait_event(self, event: Event) -> None:
        self.ends = max(self.ends, event.at)


class Event:
    """A moment in a stream. It has no `synchronize`: nothing may wait."""

    def __init__(self, device: Device, timing: bool) -> None:
        self.device, self.timing = device, timing
        self.at = -1.0

    def record(self) -> None:
        self.at = self.device.current.ends

    def query(self) -> bool:
        return self.device.now >= self.at

    def elapsed_time(self, other: Event) -> float:
        """In milliseconds. CUDA refuses events without timing, and those that are not over."""
        assert self.timing
        assert other.timing
        assert self.query()
        assert other.query()
        return 1e3 * (other.at - self.at)


def install(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Put a device in CUDA's place until the test ends."""
    device = Device()

    def make_event(enable_timing: bool = False) -> Event:
        return Event(device, enable_timing)

    def record_event(stream: Stream) -> Event:
        event = make_event()
        event.at = stream.ends
        return event

    @contextmanager
    def within(stream: Stream) -> Iterator[None]:
        outer, device.current = device.current, stream
        yield
        device.current = outer

    monkeypatch.setattr(Stream, "record_event", record_event, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", make_event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: Stream())
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: device.current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return device
