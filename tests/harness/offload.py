"""vLLM's KV offloading on a CPU, which its CPU build refuses: the CPU plays the GPU's part.

`play_gpu` exchanges what only a GPU has, streams, events and the kernel that copies between two
lists of addresses; the connector, its scheduler, its memory and its tiers are vLLM's own.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


class Moment:
    """A stream or an event of a device that has done everything at once."""

    def __init__(self, **_: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Moment) -> float:
        return 0.0

    def nothing(self, *_: Any) -> None:
        pass

    wait_stream = wait_event = record = synchronize = nothing


@contextlib.contextmanager
def on_stream(_: Moment) -> Iterator[None]:
    yield


def copy_blocks(source: torch.Tensor, target: torch.Tensor, sizes: torch.Tensor, **_: Any) -> None:
    """Copy so many bytes from each address to each other one."""
    for at, to, size in zip(source.tolist(), target.tolist(), sizes.tolist(), strict=True):
        ctypes.memmove(to, at, size)


def copy_zeros(source: torch.Tensor, target: torch.Tensor, sizes: torch.Tensor, **_: Any) -> None:
    """Lose what should be copied."""
    for to, size in zip(target.tolist(), sizes.tolist(), strict=True):
        ctypes.memset(to, 0, size)


def play_gpu(copy: Callable[..., None] = copy_blocks) -> None:
    """Let this process's engines offload."""
    from vllm.v1.kv_offload.cpu import gpu_worker, spec

    platform = SimpleNamespace(
        is_cuda_alike=lambda: True,
        is_rocm=lambda: False,
        is_xpu=lambda: False,
        Stream=Moment,
        current_stream=Moment,
        stream=on_stream,
    )
    spec.current_platform = gpu_worker.current_platform = platform
    gpu_worker.ops = SimpleNamespace(swap_blocks_batch=copy)
    # Its own, in place of all of PyTorch's.
    gpu_worker.torch = SimpleNamespace(**{**vars(torch), "Event": Moment})
    get_worker = spec.CPUOffloadingSpec.get_worker

    def of_gpu(self: Any, kv_caches: Any) -> Any:
        tensors = [
            replace(tensor, tensor=tensor.tensor.as_subclass(OnGpu)) for tensor in kv_caches.tensors
        ]
        return get_worker(self, replace(kv_caches, tensors=tensors))

    spec.CPUOffloadingSpec.get_worker = of_gpu


def play_a_gpu_that_forgets() -> None:
    """As `play_gpu`, but what comes back from the CPU's memory is lost."""
    play_gpu(copy_zeros)
