"""How long a CPU rank spends in the all-reduces of a forward pass.

Only where Python runs for each of them. For those that are started and waited for apart it does,
compiled or not, since they are custom ops; for vLLM's own all-reduce in eager mode alone. Nothing
is timed on a GPU, where Python only enqueues.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from time import perf_counter
from typing import Any

import torch

# Waits for an all-reduce, and returns the sum.
Finish = Callable[[], torch.Tensor]


class Stopwatch:
    """Sums over the all-reduces that were timed since `begin`.

    Attributes:
        running: whether they are timed.
        count: how many ended.
        exposed: seconds that the rank spent in them: starting, waiting and adding terms.
        hidden: seconds between start and wait in which the rank computed: the most that can have
            been hidden, since an all-reduce may be over before it is waited for.
    """

    def __init__(self) -> None:
        self.running = False
        self.count = 0
        self.exposed = self.hidden = 0.0

    def begin(self) -> None:
        """Forget what was, and time."""
        self.__init__()  # type: ignore[misc]
        self.running = True

    def whole(self, all_reduce: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
        """Let an all-reduce that is over when it returns be timed."""

        @wraps(all_reduce)
        def timed(partial: torch.Tensor) -> torch.Tensor:
            # The first is a constant to torch.compile: nothing of this is in a graph.
            if torch.compiler.is_compiling() or not self.running:
                return all_reduce(partial)
            begun = perf_counter()
            arrived = all_reduce(partial)
            self.exposed += perf_counter() - begun
            self.count += 1
            return arrived

        return timed

    def apart(self, start: Callable[..., Finish]) -> Callable[..., Finish]:
        """Let an all-reduce be timed that `start` begins and that the function it returns ends."""

        @wraps(start)
        def timed(*args: Any) -> Finish:
            if not self.running:
                return start(*args)
            begun = perf_counter()
            finish = start(*args)
            started = perf_counter()
            self.exposed += started - begun
            before = self.exposed

            def timed_finish() -> torch.Tensor:
                waited = perf_counter()
                # Less what the rank spent in another all-reduce, if one was in flight, too.
                self.hidden += waited - started - (self.exposed - before)
                arrived = finish()
                self.exposed += perf_counter() - waited
                self.count += 1
                return arrived

            return timed_finish

        return timed


# One model runs at a time in a worker.
stopwatch = Stopwatch()
