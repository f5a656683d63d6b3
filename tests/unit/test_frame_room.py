"""Frames below a model that is called with room cost no memory of their own, at whatever depth."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable

import pytest

from vllm_depthpar.model.frame_room import called_with_room

CALLS = 200
# More frames than a chunk of Python's holds.
DEPTHS = range(1, 400)


class Model:
    """What calls a small function again and again."""

    def __call__(self) -> None:
        for _ in range(CALLS):
            leaf()


@called_with_room
class Roomy(Model):
    """The same, with room."""


def leaf() -> None:
    """Take a frame."""


def page_faults(model: Callable[[], None], depth: int) -> int:
    """Count new pages of memory while a model is called below so many frames."""
    if depth:
        return page_faults(model, depth - 1)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    model()
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def most_page_faults(model: Callable[[], None]) -> int:
    """Count them at the worst depth."""
    model()
    return max(page_faults(model, depth) for depth in DEPTHS)


def test_frames_below_a_model_stay_in_one_chunk() -> None:
    """At no depth does each call map memory."""
    assert most_page_faults(Roomy()) < CALLS / 4


@pytest.mark.skipif(
    sys.version_info >= (3, 13), reason="this Python may keep a chunk of frames in hand"
)
def test_without_room_each_call_may_map_memory() -> None:
    """What is mended is there: at some depth each call does, so that the test above can fail."""
    assert most_page_faults(Model()) >= CALLS
