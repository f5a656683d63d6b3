"""Room for the Python frames below a compiled model.

CPython keeps frames in chunks of memory. It maps one when the frame of a call does not fit into the
last, and unmaps it when that call returns. What torch.compile makes of a model is one function with
a frame of some kilobytes; where it happens to end just before the end of a chunk, each attention
that it calls maps and unmaps one, and every core is told of it: 50 us or more on a virtual machine,
a fifth of a step of a small model. Which plan meets it is chance, and stays so from start to start.

CPython keeps one chunk in hand since 3.15, and in later releases of 3.13 and 3.14 (python/cpython
issue 142183). Before, the model is called from a frame that is too large for the chunk at hand: it
gets one of its own, in which all frames below have their place, once a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

# Of the frame, in words. A chunk is the next power of two of bytes; the other half is free.
_WORDS = (128 << 10) // 8

T = TypeVar("T", bound=type)


def called_with_room(model: T) -> T:
    """Let a model's `__call__` be entered from a large frame; returns the class.

    Above `support_torch_compile`, which makes the call that is wrapped: the wrapper is not compiled
    with the model.
    """
    function: Callable[..., Any] = model.__call__

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    # Reserved, neither written nor read.
    call.__code__ = call.__code__.replace(co_stacksize=_WORDS)
    setattr(model, "__call__", call)  # noqa: B010
    return model
