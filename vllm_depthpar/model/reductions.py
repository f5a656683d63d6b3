"""All-reduces over the tensor-parallel group that are started and waited for apart.

`Reductions.start` sends this rank's term on its way and returns; what is computed until
`Reductions.wait` hides the time it takes. Both are custom ops that change none of their operands:
the sum is an output of the wait, so that whatever reads it depends on the wait by the graph's own
edges, and the wait on the start. torch.compile cannot move one past the other.

Where they run:

- CUDA: vLLM's own all-reduce for the group, on a side stream; events order it against the compute
  stream, in CUDA graphs too. Where that all-reduce takes one stream only, at the start, as below.
- CPU, several hosts: small terms go straight to every other rank
  (`vllm_depthpar.model.tcp_exchange`), one message time instead of a ring's 2 (n - 1); large ones
  through the group's Gloo, whose threads keep them moving.
- CPU, one host: vLLM's all-reduce over shared memory runs on the threads that compute, so nothing
  is gained by waiting later: `start` has the result, and no op is added.
- One rank: nothing at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial as bind
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, distributed
from torch.library import Library
from vllm.distributed import get_tp_group
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_depthpar.metrics.all_reduce_timer import Finish, apart, in_stream, whole
from vllm_depthpar.model.tcp_exchange import Exchange, connect
from vllm_depthpar.vllm_compat import (
    GroupCoordinator,
    capturing_a_piece,
    communicator_all_reduce,
    execution_timeout,
    group_named,
    logger,
    reduces_on_one_stream,
    reduces_over_shared_memory,
    this_host,
)

# A rank that has at most so many bytes to send in all hands them to the kernel in one go.
SMALL_BYTES = 1 << 18
# Of our messages; Gloo keeps those with other tags, and its collectives, apart.
_TAG = 0xDE97


class InFlight(NamedTuple):
    """An all-reduce that was started; `Reductions.wait` takes it.

    Attributes:
        partial: this rank's term. Held here because it is read until the wait.
        ticket: what the wait is to find it by; the sum itself where it is there already.
    """

    partial: Tensor
    ticket: Tensor


class Reductions:
    """The all-reduces of one model over the tensor-parallel group.

    At most two are in flight at a time, and none may be while `all_reduce` runs: vLLM's all-reduce
    kernels for small tensors share one set of flags between ranks.

    Attributes:
        hindrance: why none of them can run while something else computes, in words for people;
            None where they can.
        overlap: whether they can.
    """

    def __init__(self) -> None:
        group = get_tp_group()
        self._group_name = group.unique_name
        self.hindrance = _hindrance(group)
        self.overlap = self.hindrance is None
        # Between CPU hosts ours is faster than vLLM's, even with nothing to overlap.
        self._ours = self.overlap and group.device.type == "cpu"
        if self._ours:
            _connect(group)

    def all_reduce(self, partial: Tensor) -> Tensor:
        """Sum all ranks' terms, of any shape; `partial` may be overwritten."""
        if self._ours:
            return self.wait(self.start(partial))
        return _through_vllm(partial)

    def start(self, partial: Tensor) -> InFlight:
        """Begin the sum of all ranks' terms; every rank must start and wait in the same order."""
        if not self.overlap:
            return InFlight(partial, _through_vllm(partial))
        return InFlight(partial, torch.ops.depthpar.start_all_reduce(partial, self._group_name))

    def wait(self, flight: InFlight, behind: Tensor | None = None) -> Tensor:
        """Wait for the sum.

        Args:
            flight: what `start` returned.
            behind: a tensor that must exist before the wait begins: the output of what is to hide
                it, or the ticket of an all-reduce that was started after that.

        Raises:
            RuntimeError: the connection to another rank broke, or the wait timed out.
        """
        if not self.overlap:
            return flight.ticket
        return torch.ops.depthpar.wait_all_reduce(flight.partial, flight.ticket, behind)


def _hindrance(group: GroupCoordinator) -> str | None:
    if group.world_size == 1:
        return "one rank has no all-reduce to hide"
    if reduces_over_shared_memory(group):
        return "an all-reduce over shared memory runs on the threads that compute"
    if reduces_on_one_stream(group):
        return (
            "VLLM_ALLREDUCE_USE_FLASHINFER_PCIE_IPC=1 asks for an all-reduce that runs on one "
            "stream only, that which computes"
        )
    return None


def _through_vllm(partial: Tensor) -> Tensor:
    return whole(get_tp_group().all_reduce, partial)


# Between start and wait, by the address of the ticket.
_in_flight: dict[int, Finish] = {}


def _start_all_reduce(partial: Tensor, group_name: str) -> Tensor:
    start = _start_on_cuda if partial.is_cuda else _start_on_cpu
    ticket = _ticket(partial)
    _in_flight[ticket.data_ptr()] = apart(start, partial, group_named(group_name))
    return ticket


def _wait_all_reduce(partial: Tensor, ticket: Tensor, behind: Tensor | None) -> Tensor:
    finish = _in_flight.pop(ticket.data_ptr(), None)
    if finish is None:
        raise RuntimeError("all-reduce waited for with a ticket that it was not started with")
    return finish()


def _ticket(partial: Tensor) -> Tensor:
    """Make what is nothing but an address that no other tensor has while it is held."""
    return partial.new_empty(1, dtype=torch.uint8)


def _start_on_cpu(partial: Tensor, group: GroupCoordinator) -> Finish:
    partial = partial.contiguous()
    ranks, me = group.world_size, group.rank_in_group
    exchange = _exchanges.get(group)
    small = exchange is not None and (ranks - 1) * partial.nbytes <= SMALL_BYTES
    if ranks > 2 and not small:
        return _sum_over_gloo(partial, group)
    peers = [rank for rank in range(ranks) if rank != me]
    terms = {rank: torch.empty_like(partial) for rank in peers}
    if exchange is not None and small:
        ticket = exchange.start(_bytes(partial), {r: _bytes(term) for r, term in terms.items()})
        wait: Callable[[], None] = bind(exchange.wait, ticket)
    else:
        wait = _swap_over_gloo(partial, terms, group)
    arrived = terms[peers[0]]
    terms[me] = partial

    def finish() -> Tensor:
        wait()
        # In the order of ranks on every rank: all get the same bits.
        for rank in range(ranks):
            if rank != peers[0]:
                arrived.add_(terms[rank])
        return arrived

    return finish


def _sum_over_gloo(partial: Tensor, group: GroupCoordinator) -> Finish:
    total = partial.clone()  # Gloo sums in place, and an op may not return its argument
    work = group.device_group.allreduce([total])

    def finish() -> Tensor:
        work.wait()
        return total

    return finish


def _swap_over_gloo(
    partial: Tensor, terms: dict[int, Tensor], group: GroupCoordinator
) -> Callable[[], None]:
    gloo = group.device_group
    # Receives first: a sender whose peer is ready sends at once.
    works = [gloo.recv([term], rank, _TAG) for rank, term in terms.items()]
    works += [gloo.send([partial], rank, _TAG) for rank in terms]

    def wait() -> None:
        for work in works:
            work.wait()

    return wait


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


# None for a group whose ranks can't connect.
_exchanges: WeakKeyDictionary[GroupCoordinator, Exchange | None] = WeakKeyDictionary()


def _connect(group: GroupCoordinator) -> None:
    if group in _exchanges:
        return

    def gather(value: object) -> list[Any]:
        values: list[Any] = [None] * group.world_size
        distributed.all_gather_object(values, value, group=group.cpu_group)
        return values

    exchange = connect(
        group.rank_in_group, group.world_size, this_host(), gather, execution_timeout()
    )
    if exchange is None:
        logger.warning("no direct connections between the ranks; all-reduces go through Gloo")
    _exchanges[group] = exchange
    let_compute_run_first()


def _start_on_cuda(partial: Tensor, group: GroupCoordinator) -> Finish:
    if capturing_a_piece():
        # A graph of a piece must end with all its streams joined, and the wait may be in another.
        total = in_stream(communicator_all_reduce, group, partial)
        return lambda: total
    compute, side = torch.cuda.current_stream(), _side_stream(partial.device)
    # Also what makes reuse of the side stream's memory safe: whatever read an earlier sum was
    # enqueued before this point.
    side.wait_stream(compute)
    with torch.cuda.stream(side):
        arrived = in_stream(communicator_all_reduce, group, partial)
        done = side.record_event()

    def finish() -> Tensor:
        torch.cuda.current_stream().wait_event(done)
        return arrived

    return finish


# One for each device that needed one.
side_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in side_streams:
        # High priority: a reduction needs few multiprocessors, and others wait for it.
        side_streams[device] = torch.cuda.Stream(device, priority=-1)
    return side_streams[device]


_library = Library("depthpar", "FRAGMENT")
direct_register_custom_op(
    "start_all_reduce",
    _start_all_reduce,
    fake_impl=lambda partial, group_name: _ticket(partial),
    target_lib=_library,
)
direct_register_custom_op(
    "wait_all_reduce",
    _wait_all_reduce,
    fake_impl=lambda partial, ticket, behind: torch.empty_like(partial),
    target_lib=_library,
)


def let_compute_run_first() -> None:
    """Keep Gloo's threads from pushing the compute thread off its core.

    vLLM binds its main thread to one core, and the threads that Gloo starts inherit that. When a
    message arrives, Gloo's thread preempts the main thread, often while that holds the lock of the
    connection, and then polls for the lock until its time slice is over: milliseconds for a message
    of microseconds. Under SCHED_BATCH a thread that wakes up does not preempt. Needs no privilege.
    """
    if not hasattr(os, "SCHED_BATCH"):
        return
    for task in Path("/proc/self/task").iterdir():
        if "gloo" in (task / "comm").read_text():
            os.sched_setscheduler(int(task.name), os.SCHED_BATCH, os.sched_param(0))
