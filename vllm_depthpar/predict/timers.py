"""How long products take: on a CPU by its clock, on a GPU by its own."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch


class Timer(ABC):
    """Times products on one kind of device.

    Attributes:
        device: where the tensors are.
        lot: how many products are timed at once.
    """

    device: str
    lot: int

    def copies(self, product_bytes: int, rows: int) -> int:
        """Choose how many weights of one shape to take turns with, in whole lots: more than a cache
        holds where they are to come from memory."""
        lots = math.ceil(self.weight_bytes(rows) / (self.lot * product_bytes))
        return self.lot * max(1, lots)

    @abstractmethod
    def weight_bytes(self, rows: int) -> int:
        """Say how many bytes of weights no cache holds; 0: one copy will do."""

    @abstractmethod
    def seconds(self, run: Callable[[], None]) -> float:
        """Time a run of products."""


class CpuTimer(Timer):
    """Times products one by one: short runs are likelier to be left alone."""

    device, lot = "cpu", 1

    def weight_bytes(self, rows: int) -> int:
        """Say 64 MiB; but with several rows it is arithmetic that counts."""
        return 64 << 20 if rows == 1 else 0

    def seconds(self, run: Callable[[], None]) -> float:
        """Time a run by this process's clock."""
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


class CudaTimer(Timer):
    """Times products by events on the GPU: not launches, and not weights from its cache.

    This has not run on CUDA yet.
    """

    device, lot = "cuda", 32
    # A product of square matrices of so many rows takes a GPU a millisecond or more.
    ahead = 8192

    def weight_bytes(self, rows: int) -> int:
        """Say 1 GiB: a step finds no weight in the cache, however many rows it has."""
        return 1 << 30

    def seconds(self, run: Callable[[], None]) -> float:
        """Time a run by the GPU's clock. A long product goes first: while it runs all launches are
        queued, so that the GPU waits for none."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        square = torch.ones(self.ahead, self.ahead, dtype=torch.float16, device=self.device)
        torch.mm(square, square)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
