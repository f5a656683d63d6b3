"""How long a rank spends in the all-reduces of a forward pass.

Only where Python runs for each of them, on CPUs and GPUs alike. For those that are started and
waited for apart it does, compiled or not, since they are custom ops; for vLLM's own all-reduce in
eager mode alone; for none in a pass, or a piece of one, that is replayed as a CUDA graph. An event
inside a graph would be recorded at every replay, not at every n-th.

`vllm_depthpar.model.reductions` runs its all-reduces through `whole`, `apart` and `in_stream`
whatever pass runs. In one that is timed, its `Meter` has named an `AllReduceTimer` of the pass's
own; in others they only call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from vllm_depthpar.metrics.clocks import Clock, Mark

P = ParamSpec("P")
T = TypeVar("T")
# Waits for an all-reduce, and returns the sum.
Finish = Callable[[], Tensor]


class AllReduceTimer:
    """Times the all-reduces of one forward pass.

    Args:
        clock: of the device that computes.

    Attributes:
        count: how many have ended.
    """

    def __init__(self, clock: Clock) -> None:
        self.count = 0
        self._clock = clock
        self._mark = clock.mark
        self._in_flight = 0
        # Marks in pairs, begun and ended: of what computes nothing beside, of what was computed
        # while one was in flight, and of all-reduces in their own stream.
        self._whole: list[Mark] = []
        self._apart: list[Mark] = []
        self._between: list[Mark] = []
        self._in_stream: list[Mark] = []

    def whole(self, all_reduce: Callable[[Tensor], Tensor], partial: Tensor) -> Tensor:
        """Run an all-reduce that is over, or that its stream waits for, when it returns."""
        begun = self._mark()
        total = all_reduce(partial)
        self._whole += begun, self._mark()
        self.count += 1
        return total

    def apart(self, start: Callable[P, Finish], *args: P.args, **options: P.kwargs) -> Finish:
        """Start an all-reduce, and return what waits for it."""
        finish = self._exposed(start, *args, **options)
        self._in_flight += 1

        def timed_finish() -> Tensor:
            total = self._exposed(finish)
            self._in_flight -= 1
            self.count += 1
            return total

        return timed_finish

    def in_stream(self, run: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Run a GPU's all-reduce in the current stream, whichever that is."""
        begun = self._mark()
        total = run(*args, **options)
        self._in_stream += begun, self._mark()
        return total

    def _exposed(self, run: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        begun = self._mark()
        if self._in_flight:
            self._between += self._apart[-1], begun
        result = run(*args, **options)
        self._apart += begun, self._mark()
        return result

    def seconds(self) -> tuple[float, float]:
        """Return how long they took, once the pass is over.

        Returns:
            exposed: seconds in which the rank sent, waited or added.
            hidden: the others in which at least one was on its way. On a CPU, which cannot tell
                when one is over but by waiting, the most that they can have been.
        """
        whole, apart, between, in_stream = (
            sum(map(self._clock.seconds, marks[::2], marks[1::2]))
            for marks in (self._whole, self._apart, self._between, self._in_stream)
        )
        hidden = max(0.0, in_stream - apart) if self._in_stream else between
        return whole + apart, hidden


# One model runs at a time in a worker.
_running: AllReduceTimer | None = None


def time_with(timer: AllReduceTimer | None) -> None:
    """Let a timer time the all-reduces that start from now on; None: let nothing."""
    global _running
    _running = timer


def whole(all_reduce: Callable[[Tensor], Tensor], partial: Tensor) -> Tensor:
    """Run an all-reduce that is over, or that its stream waits for, when it returns."""
    # The first is a constant to torch.compile: nothing of this is in a graph.
    if torch.compiler.is_compiling() or _running is None:
        return all_reduce(partial)
    return _running.whole(all_reduce, partial)


def apart(start: Callable[P, Finish], *args: P.args, **options: P.kwargs) -> Finish:
    """Start an all-reduce, and return what waits for it."""
    if _running is None:
        return start(*args, **options)
    return _running.apart(start, *args, **options)


def in_stream(run: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """Run a GPU's all-reduce in the current stream, whichever that is."""
    if _running is None:
        return run(*args, **options)
    return _running.in_stream(run, *args, **options)
