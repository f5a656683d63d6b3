"""Measuring in rounds: whose turn it is, while the others rest, and what many rounds say."""

from __future__ import annotations

import signal
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")


def in_turn(variants: Sequence[T], number: int) -> list[T]:
    """Give the order of a round: A B C, B C A, ..., so that what changes meets them all; the rounds
    before 0, which are not counted, as round 0."""
    first = max(number, 0) % len(variants)
    return [*variants[first:], *variants[:first]]


class Pausable(Protocol):
    """Processes that can be stopped for a while."""

    def signal(self, number: signal.Signals, /) -> None:
        """Signal all of them."""


def pause(processes: Pausable) -> None:
    """Stop what waits for its turn: on a CPU it polls, on the cores of the one that is measured."""
    processes.signal(signal.SIGSTOP)


@contextmanager
def awake(processes: Pausable) -> Iterator[None]:
    """Let what was paused run meanwhile."""
    processes.signal(signal.SIGCONT)
    try:
        yield
    finally:
        pause(processes)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and spread."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Median and spread for people: '1.21 (1.19 to 1.24)'."""
    return written(summary(values), form)


def written(numbers: Mapping[str, float], form: str = ".2f") -> str:
    """Write a summary for people."""
    return "{median:{form}} ({min:{form}} to {max:{form}})".format(form=form, **numbers)
