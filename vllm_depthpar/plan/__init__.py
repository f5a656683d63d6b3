"""Plans as plain data: no torch, no vLLM.

What the rest of the program needs of a plan is here by name, and imported when it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_depthpar.plan.plan import Plan, resolve
    from vllm_depthpar.plan.spec import MAX_SPEC_BYTES, NULL, json_schema, read_spec

__all__ = ["MAX_SPEC_BYTES", "NULL", "Plan", "json_schema", "read_spec", "resolve"]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = "plan" if name in ("Plan", "resolve") else "spec"
        return getattr(import_module(f"vllm_depthpar.plan.{module}"), name)
