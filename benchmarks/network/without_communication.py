"""A vLLM plugin for measurements: tensor parallelism whose ranks send each other no activations.

The answers are wrong; the time is that of everything but communication. Only `cluster.py` loads it.
Checked on vLLM 0.32.0, on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def register() -> None:
    """Replace the collectives that a forward pass uses by local ones of the same shapes."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    def all_reduce(self: Any, tensor: Tensor) -> Tensor:
        return tensor

    def all_gather(self: Any, tensor: Tensor, dim: int = -1) -> Tensor:
        return torch.cat([tensor] * self.world_size, dim)

    def gather(self: Any, tensor: Tensor, dst: int = 0, dim: int = -1) -> Tensor | None:
        return all_gather(self, tensor, dim) if self.rank_in_group == dst else None

    CpuCommunicator.all_reduce = all_reduce
    CpuCommunicator.all_gather = all_gather
    CpuCommunicator.gather = gather
