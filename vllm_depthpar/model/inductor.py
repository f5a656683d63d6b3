"""A fault of PyTorch's compiler that restructured models meet on CPUs, mended.

vLLM's CPU kernels write into buffers that are given to them, empty. To Inductor each such write is
a mutation that gives the buffer a new name, and whoever reads the buffer afterwards depends on that
name. Where it aligns the loops of two kernels so as to fuse them, PyTorch 2.13 works out anew what
one of them reads and forgets the new names: the reader then depends on the empty buffer alone, and
may be fused into a kernel that runs *before* the write. In a plain decoder layer other dependencies
happen to forbid that. A ladder's terms are read later than the module after them begins, and the
fusion is made: it adds memory that nobody has written. PyTorch 2.14 has the names kept, which is
what is done here to 2.13, so that it holds for every buffer of a graph, not for our terms alone.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch

# Of the first PyTorch that keeps the names itself.
MENDED_SINCE = (2, 14)
# Part of the key of PyTorch's cache of compiled code: what was compiled before is not taken.
_CACHE_TAG = "depthpar-mutations-in-order"


def needs_mending() -> bool:
    """Say whether this PyTorch has the fault."""
    major, minor, *_ = torch.__version__.split(".")
    return (int(major), int(minor)) < MENDED_SINCE


def keep_mutations_in_order() -> None:
    """Let every graph compiled in this process from now on have its reads after its writes.

    Idempotent; nothing is done where PyTorch needs no mending. Imports Inductor.

    Relies on (checked on PyTorch 2.13.0 by running): `SchedulerNode.recompute_size_and_body` is
    what drops the names, `mutation_renames` has those of the node's buffers, and renaming twice is
    renaming once.
    """
    if not needs_mending():
        return
    from torch._inductor.scheduler import SchedulerNode

    method = SchedulerNode.recompute_size_and_body
    if hasattr(method, "__wrapped__"):
        return

    @wraps(method)
    def recompute_size_and_body(self: SchedulerNode, *args: Any, **kwargs: Any) -> None:
        method(self, *args, **kwargs)
        self.set_read_writes(self.read_writes.rename(self.mutation_renames))

    SchedulerNode.recompute_size_and_body = recompute_size_and_body
    torch.compiler.config.cache_key_tag += _CACHE_TAG
