"""How much KV cache given sequences take at once: no less, or one would wait for another's end."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable

from vllm_depthpar.plan import Plan
from vllm_depthpar.plan.model_shape import DTYPE_BYTES, ModelShape

SPACE = "VLLM_CPU_KVCACHE_SPACE"
# Tokens of a block of the cache, of vLLM's largest: a sequence takes whole ones. Where the blocks
# of a plan differ in width, those of the cache are of the widest one's size.
_TOKENS = 128
# What layers of two widths pad.
_SLACK = 1.5


def kv_cache_bytes(
    shape: ModelShape, plan: Plan, lengths: Iterable[int], tp: int = 1, dtype: str = "auto"
) -> int:
    """KV cache on one rank for sequences that run at the same time.

    Args:
        lengths: tokens that each has in the end.
        dtype: that the model computes in; "auto" for its checkpoint's.
    """
    most = _TOKENS * max(len(block) for block in plan.blocks)
    tokens = sum(length + most for length in lengths)
    of_token = shape.kv_bytes_per_token(plan, tp) / shape.dtype_bytes
    return int(_SLACK * tokens * of_token * DTYPE_BYTES.get(dtype, shape.dtype_bytes))


def environment(size: int) -> dict[str, str]:
    """What gives vLLM on a CPU a KV cache of so many bytes, unless the environment has said it."""
    return {} if SPACE in os.environ else {SPACE: whole_gib(size)}


def whole_gib(size: int) -> str:
    """Bytes in the unit of the variable `SPACE`."""
    return str(math.ceil(size / 2**30))
