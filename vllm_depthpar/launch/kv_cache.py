"""How much KV cache vLLM needs for what it will be asked, and how it is told so on a CPU."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable

from vllm_depthpar.plan import Plan
from vllm_depthpar.plan.model_shape import ModelShape

# In GiB; on a CPU vLLM fills so much with zeros when it starts.
SPACE = "VLLM_CPU_KVCACHE_SPACE"
# Tokens in a block of the cache, on a CPU.
BLOCK = 128
# Layers of different widths pad it, and narrow ones have longer blocks.
_PADDED = 1.5


def needed_bytes(
    shape: ModelShape, plan: Plan, lengths: Iterable[int], tp: int = 1, block: int = BLOCK
) -> int:
    """Compute the bytes that each rank needs for sequences of so many tokens at once.

    Args:
        shape: in the dtype of the cache.
        block: tokens in a block; a sequence takes whole ones, and vLLM keeps one for itself.
    """
    widths = [width for at in range(plan.depth) if (width := len(plan.attention(at)))]
    block *= max(widths) // min(widths)
    tokens = block * (1 + sum(-(-length // block) for length in lengths))
    padded = _PADDED if min(widths) < max(widths) else 1
    return math.ceil(padded * tokens * shape.kv_bytes_per_token(plan, tp))


def environment(needed: int) -> dict[str, str]:
    """Tell vLLM on a CPU so many bytes; nothing where the environment does already."""
    return {} if SPACE in os.environ else {SPACE: str(math.ceil(needed / 2**30))}


def reserved_bytes(needed: int) -> int:
    """Compute what a rank on a CPU then takes."""
    return int({**os.environ, **environment(needed)}[SPACE]) * 2**30
