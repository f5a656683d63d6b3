"""Plans as plain data: no torch, no vLLM.

What the rest of the program needs of a plan is here by name, and imported when it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_depthpar.plan.plan import (
        MAX_SPEC_BYTES,
        NULL,
        Plan,
        json_schema,
        load,
        resolve,
    )

__all__ = ["MAX_SPEC_BYTES", "NULL", "Plan", "json_schema", "load", "resolve"]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module("vllm_depthpar.plan.plan"), name)
