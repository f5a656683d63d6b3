"""Measuring in rounds: whose turn it is, and what many rounds say together."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def in_turn(contenders: Sequence[T], number: int) -> list[T]:
    """The order of a round: A B C, B C A, ..., so that what changes meets them all; the rounds
    before 0, which are not counted, as round 0."""
    first = max(number, 0) % len(contenders)
    return [*contenders[first:], *contenders[:first]]


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and spread."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Median and spread for people: '1.21 (1.19 to 1.24)'."""
    return written(summary(values), form)


def written(numbers: Mapping[str, float], form: str = ".2f") -> str:
    """A summary for people."""
    return "{median:{form}} ({min:{form}} to {max:{form}})".format(form=form, **numbers)
