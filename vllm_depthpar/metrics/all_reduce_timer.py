"""How long a rank spends in the all-reduces of a forward pass.

Only where Python runs for each of them, on CPUs and GPUs alike. For those that are started and
waited for apart it does, compiled or not, since they are custom ops; for vLLM's own all-reduce in
eager mode alone; for none in a pass, or a piece of one, that is replayed as a CUDA graph. An event
inside a graph would be recorded at every replay, not at every n-th.

`vllm_depthpar.model.reductions` calls `exposed`, `takes_off` and `lands` for whatever pass runs.
They do nothing but in one that is timed, whose `AllReduceTimer` is its `Meter`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from vllm_depthpar.metrics.clocks import Clock, Mark

T = TypeVar("T")
P = ParamSpec("P")


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
        self._in_flight = 0
        self._took_off: Mark = None
        self._flights: list[tuple[Mark, Mark]] = []
        self._exposed: list[tuple[Mark, Mark]] = []

    def exposed(self, run: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Call what the rank computes nothing beside: it starts an all-reduce, waits for one, or
        is one."""
        begun = self._clock.mark()
        result = run(*args, **options)
        self._exposed.append((begun, self._clock.mark()))
        return result

    def takes_off(self) -> None:
        """Note that an all-reduce begins, in the current stream."""
        if not self._in_flight:
            self._took_off = self._clock.mark()
        self._in_flight += 1

    def lands(self) -> None:
        """Note that one is over, in the current stream."""
        self._in_flight -= 1
        self.count += 1
        if not self._in_flight:
            self._flights.append((self._took_off, self._clock.mark()))

    def seconds(self) -> tuple[float, float]:
        """Return how long they took, once the pass is over.

        Returns:
            exposed: seconds in which the rank sent, waited or added.
            hidden: the others in which at least one was on its way. On a CPU, which knows only when
                it waited, the most that can have been: it may have been over before.
        """
        exposed, flying = (
            sum(self._clock.seconds(*span) for span in spans)
            for spans in (self._exposed, self._flights)
        )
        return exposed, max(0.0, flying - exposed)


# One model runs at a time in a worker.
_running: AllReduceTimer | None = None


def time_with(timer: AllReduceTimer | None) -> None:
    """Let a timer time the all-reduces that start from now on; None: let nothing."""
    global _running
    _running = timer


def exposed(run: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """Call what the rank computes nothing beside; see `AllReduceTimer.exposed`."""
    # The first is a constant to torch.compile: nothing of this is in a graph.
    if torch.compiler.is_compiling() or _running is None:
        return run(*args, **options)
    return _running.exposed(run, *args, **options)


def takes_off() -> None:
    """Note that an all-reduce begins, in the current stream."""
    if not torch.compiler.is_compiling() and _running is not None:
        _running.takes_off()


def lands() -> None:
    """Note that one is over, in the current stream."""
    if not torch.compiler.is_compiling() and _running is not None:
        _running.lands()
