"""One rank whose all-reduces are started and waited for apart: python reduction_ranks.py NAME ...

The environment says which rank it is, of how many, and where they meet, as torchrun's does. What
is run is named after what it shows; what is printed says which of them passed.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch


def sums() -> None:
    """Every size class and dtype: the sum, the same bits on all ranks, several in flight."""
    from torch import distributed

    from vllm_depthpar.model.reductions import SMALL_BYTES, Reductions

    reductions, rank, ranks = Reductions(), distributed.get_rank(), distributed.get_world_size()
    assert reductions.overlap
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (1, 7, SMALL_BYTES // 64):
            generator = torch.Generator().manual_seed(tokens)
            shape = (ranks, 2, tokens, 64)
            terms = torch.randn(shape, generator=generator).to(dtype)
            flights = [reductions.start(term.clone()) for term in terms[rank]]
            first = reductions.wait(flights[0], behind=flights[1].ticket)
            second = reductions.wait(flights[1])
            result = torch.stack([first, second])
            close = {"rtol": 0.05, "atol": 0.1} if dtype == torch.bfloat16 else {}
            torch.testing.assert_close(result, terms.sum(0), **close)
            everyone = [torch.empty_like(result) for _ in range(ranks)]
            distributed.all_gather(everyone, result)
            assert all(torch.equal(other, result) for other in everyone)
    torch.testing.assert_close(
        reductions.all_reduce(torch.full((3,), float(rank))),
        torch.full((3,), float(sum(range(ranks)))),
    )
    try:
        reductions.wait(reductions.start(torch.ones(2))._replace(ticket=torch.ones(2)))
    except RuntimeError as error:
        assert "not started" in str(error)
    else:
        raise AssertionError("a wait with the wrong ticket went unnoticed")
    schedulers = {
        (task / "comm").read_text().strip(): os.sched_getscheduler(int(task.name))
        for task in Path("/proc/self/task").iterdir()
        if "gloo" in (task / "comm").read_text()
    }
    assert schedulers, "no thread of Gloo's found"
    assert set(schedulers.values()) == {os.SCHED_BATCH}


_libraries: list[Any] = []  # an op lives as long as its library


def _signal_op(prefix: str) -> None:
    """The op with which a rank tells all others that it is computing, how many times."""
    from torch import distributed
    from torch.library import Library, impl

    store = distributed.distributed_c10d._get_default_store()
    library = Library(f"depthpar_{prefix}", "FRAGMENT")
    library.define("say(Tensor x) -> Tensor")

    @impl(library, "say", "CPU")
    def say(x: torch.Tensor) -> torch.Tensor:
        store.set(f"{prefix} {store.add(prefix, 1)}", "")
        return x + 0

    library._register_fake("say", torch.empty_like)
    _libraries.append(library)


def overlap(compiled: bool = False) -> None:
    """Rank 1 starts only when rank 0 has got beyond its own start: one that blocks never does.

    Meanwhile rank 0 makes tensors of the same size as the term in flight, so that a compiler or an
    allocator that thought its memory free would overwrite it.
    """
    from datetime import timedelta

    from torch import distributed

    from vllm_depthpar.model.reductions import Reductions

    prefix = "compiled" if compiled else "eager"
    _signal_op(prefix)
    reductions, rank = Reductions(), distributed.get_rank()
    store = distributed.distributed_c10d._get_default_store()
    weight, say = torch.eye(64), getattr(torch.ops, f"depthpar_{prefix}").say

    def block(x: torch.Tensor) -> torch.Tensor:
        flight = reductions.start(x @ weight)
        y = say((x * 3).relu() @ weight)
        for _ in range(4):
            y = (y + 1).relu() @ weight
        return reductions.wait(flight, behind=y) * 10 + y

    run = torch.compile(block, fullgraph=True, dynamic=False) if compiled else block
    for tokens in (1, 2000):
        for attempt in range(3):
            count = attempt + 1 + (3 if tokens > 1 else 0)
            if rank == 0:
                x = torch.full((tokens, 64), float(count))
                expected = (count + 100) * 10 + 3 * count + 4
                assert torch.equal(run(x), torch.full((tokens, 64), float(expected)))
            else:
                store.wait([f"{prefix} {count}"], timedelta(seconds=60))
                time.sleep(0.05)
                reductions.wait(reductions.start(torch.full((tokens, 64), 100.0)))


def timed() -> None:
    """Rank 1 is late: what rank 0 computes meanwhile is hidden, the rest of the delay exposed."""
    from torch import distributed

    from vllm_depthpar.metrics.all_reduce_timer import AllReduceTimer, time_with
    from vllm_depthpar.metrics.clocks import HostClock
    from vllm_depthpar.model.reductions import Reductions

    computing, late = 0.2, 0.7
    reductions, term, timer = Reductions(), torch.ones(4), AllReduceTimer(HostClock())
    distributed.barrier()
    if distributed.get_rank() == 1:
        time.sleep(late)
    time_with(timer)
    begun = time.perf_counter()
    flight = reductions.start(term)
    time.sleep(computing)
    reductions.wait(flight)
    whole = time.perf_counter() - begun
    time_with(None)
    reductions.all_reduce(term)
    exposed, hidden = timer.seconds()
    assert timer.count == 1
    assert hidden >= 0.99 * computing  # less what marking takes
    assert hidden + exposed <= whole
    if distributed.get_rank() == 0:
        # Both ranks left the barrier together, give or take what a busy machine adds.
        assert exposed > (late - computing) / 2
        assert hidden + exposed > 0.9 * whole


def compiled_overlap() -> None:
    from unittest.mock import patch

    with patch.dict(os.environ, TORCHINDUCTOR_COMPILE_THREADS="1"):
        overlap(compiled=True)


def memory() -> None:
    """Nothing is copied: a start allocates what arrives and a ticket of a byte, a wait nothing."""
    from torch import distributed
    from torch.profiler import ProfilerActivity, profile

    from vllm_depthpar.model.reductions import Reductions

    reductions = Reductions()
    term = torch.ones(1 << 20)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        total = reductions.wait(reductions.start(term))
    assert torch.equal(total, torch.full_like(term, distributed.get_world_size()))
    names = {event.key for event in profiler.key_averages()}
    assert not names & {"aten::clone", "aten::copy_"}, names
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profiler.key_averages())
    assert allocated == term.nbytes + 1


def death() -> None:
    from torch import distributed

    from vllm_depthpar.model.reductions import Reductions

    reductions = Reductions()
    reductions.all_reduce(torch.ones(4))
    if distributed.get_rank() == 1:
        os._exit(7)
    start = time.monotonic()
    try:
        reductions.wait(reductions.start(torch.ones(4)))
    except RuntimeError as error:
        assert "onnection" in str(error), error
    else:
        raise AssertionError("the wait for a dead rank succeeded")
    assert time.monotonic() - start < 10


def alone() -> None:
    from vllm_depthpar.model.reductions import Reductions

    reductions = Reductions()
    assert not reductions.overlap
    graphs = []

    def backend(module: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(module.graph)
        return module

    @torch.compile(backend=backend, fullgraph=True)
    def block(x: torch.Tensor) -> torch.Tensor:
        flight = reductions.start(x * 2)
        return reductions.wait(flight, behind=x) + reductions.all_reduce(x)

    assert torch.equal(block(torch.ones(3)), torch.full((3,), 3.0))
    (graph,) = graphs
    calls = [str(node.target) for node in graph.nodes if node.op.startswith("call")]
    assert len(calls) == 2, calls  # the product and the sum


def cuda_graph() -> None:
    """Capture with NCCL. vLLM makes no communicator for one rank: this one is NCCL's own."""
    from torch import distributed
    from vllm.distributed import get_tp_group

    from vllm_depthpar.model.reductions import side_streams

    class Communicator:
        def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
            total = tensor.clone()
            distributed.all_reduce(total, group=group.device_group)
            return total

    group = get_tp_group()
    group.device_communicator = Communicator()
    x = torch.zeros(4, 64, device="cuda")
    weight = torch.eye(64, device="cuda")

    def block() -> torch.Tensor:
        term = x @ weight
        ticket = torch.ops.depthpar.start_all_reduce(term, group.unique_name)
        y = (x * 3) @ weight
        return torch.ops.depthpar.wait_all_reduce(term, ticket, y) * 10 + y

    block()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = block()
    for value in (1.0, 2.0):
        x.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(result.cpu(), torch.full((4, 64), 13 * value))
    assert side_streams


SCENARIOS = {
    "sums": sums,
    "overlap": overlap,
    "timed": timed,
    "compiled_overlap": compiled_overlap,
    "memory": memory,
    "death": death,
    "alone": alone,
    "cuda_graph": cuda_graph,
}


def main(scenarios: list[str]) -> None:
    """Run them as one rank of a group that vLLM makes; each that passes is printed."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "nccl" if "cuda_graph" in scenarios else "gloo"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(ranks, rank, "env://", rank, backend)
        initialize_model_parallel(ranks)
        for scenario in scenarios:
            SCENARIOS[scenario]()
            print(f"passed: {scenario}", flush=True)
    if "death" in scenarios:
        os._exit(0)  # nothing can be cleaned up together any more
    cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(sys.argv[1:])
