"""What a model computes in where nobody says: one rule for all commands, and a way to answer it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from vllm_depthpar.errors import UserError

AUTO = "auto"
# Says what "auto" is, whatever the hardware.
ENV = "DEPTHPAR_DTYPE"
_ANSWERS = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_CPU_INFO = Path("/proc/cpuinfo")
# Without one of these a CPU computes bfloat16 many times slower than float32.
_INSTRUCTIONS = {"amx_bf16", "avx512_bf16"}


def usable_dtype(name: str) -> torch.dtype:
    """Find a dtype by torch's name for it. "auto" is what the environment's `ENV` says; without it
    bfloat16 where the hardware multiplies it, else float32.

    Raises:
        UserError: `ENV` says something else.
    """
    if name != AUTO:
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if said := os.environ.get(ENV):
        if said not in _ANSWERS:
            raise UserError(f"{ENV} {said!r} is unknown; allowed: {', '.join(_ANSWERS)}")
        return _ANSWERS[said]
    return torch.bfloat16 if multiplies_bfloat16() else torch.float32


def multiplies_bfloat16() -> bool:
    """Say whether the hardware has instructions that multiply bfloat16."""
    if torch.cuda.is_available():
        return True
    text = _CPU_INFO.read_text() if _CPU_INFO.exists() else ""
    flags = (line for line in text.splitlines() if line.startswith("flags"))
    return any(_INSTRUCTIONS & set(line.split()) for line in flags)
