"""vLLM's engine on a list of cases, in processes that do not pay for its imports.

`run` starts one process per tensor-parallel rank (vLLM's external launcher: every rank is an
ordinary process that holds its own engine) and returns what rank 0 saw. The processes are forked
from one that has imported vLLM and done nothing else. Tests of numbers use it; tests of the product
start `vllm serve`.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import compiled_order
import fork_server
import torch
import weight_updates

from vllm_depthpar.launch.server import free_port

# The same in every process, from its first import on.
COMMON = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # vLLM 0.32 writes these artifacts on a CPU but cannot load them again.
    "VLLM_USE_AOT_COMPILE": "0",
    "MASTER_ADDR": "127.0.0.1",
}
# Enough for every case here; it is filled with zeros at every start.
KV_BYTES = 128 << 20
THREADS = {"VLLM_CPU_OMP_THREADS_BIND": "0-1", "OMP_NUM_THREADS": "2"}
# More ranks than cores: let the kernel place them.
UNBOUND = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Case:
    """One engine: a checkpoint, a plan ("plain" for vLLM's own model), and prompts for it."""

    model: Path
    plan: object
    prompts: list[list[int]]
    dtype: str = "float32"
    max_tokens: int = 1
    logits: bool = False  # keep all logits (one rank only)
    # Log-probabilities of the answer, not of the prompt: for those vLLM leaves caches unread.
    cached: bool = False
    # First load the weights of this checkpoint in one of the ways of `weight_updates`.
    update: tuple[str, Path] | None = None
    adapters: list[Path | None] | None = None  # of each prompt
    images: list[Path] | None = None  # of each prompt, one
    engine: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[], None] | None = None  # in the engine's process, before it starts


@dataclass(frozen=True)
class Result:
    """What the engine answered, per prompt."""

    prompt_logprobs: list[torch.Tensor]  # [tokens - 1]
    tokens: list[list[int]]
    logits: list[torch.Tensor]  # every tensor of logits the model computed, in turn: [rows, vocab]
    logprobs: list[torch.Tensor]  # of the tokens, [max_tokens] each; only if `cached`
    # graphs, breaks in them, kernels, reads before a write; all 0 where nothing is compiled
    compilation: dict[str, int]


def run(
    cases: list[Case],
    ranks: int = 1,
    timeout: float = 1200,
    compiled: bool = False,
    hosts: bool = False,
) -> list[Result]:
    """Run every case at TP = `ranks`, eager or with vLLM's default compilation.

    With `hosts` each rank is a host to vLLM: messages instead of shared memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        job, answer = Path(folder, "cases.pt"), Path(folder, "results.pt")
        torch.save(cases, job)
        env = {
            **THREADS,
            **os.environ,
            **COMMON,
            **(UNBOUND if ranks > 1 else {}),
            "WORLD_SIZE": str(ranks),
        }
        # vLLM ends and begins the connection of its ranks with each engine. On one port, an early
        # rank would find the store of the engine before, which is about to end, and wait there.
        ports = _different_ports(len(cases))
        logs = [Path(folder, f"{rank}.log") for rank in range(ranks)]
        deadline = time.monotonic() + timeout
        arguments = (env, ports, timeout)
        rest = (job, answer, compiled, hosts)
        processes = [
            fork_server.fork(_rank, rank, *arguments, log, *rest, compiled=compiled)
            for rank, log in enumerate(logs)
        ]
        try:
            # Not one after the other: a rank whose peer is gone may wait for it for half an hour.
            while running := [process for process in processes if process.exitcode is None]:
                if any(process.exitcode for process in processes) or time.monotonic() > deadline:
                    break
                wait([process.sentinel for process in running], deadline - time.monotonic())
        finally:
            codes = [process.exitcode for process in processes]
            for process in processes:
                process.kill()
                process.join()
            # A forked process ends without the destructors that would remove it.
            for left in Path("/dev/shm").glob(f"{_memory(ports)}*"):
                left.unlink()
        if any(code != 0 for code in codes):
            ends = []
            for rank, (code, log) in enumerate(zip(codes, logs, strict=True)):
                text = log.read_text()
                print(f"--- rank {rank}\n{text[-8000:]}")
                how = "still at work" if code is None else f"exit code {code}"
                ends.append(": ".join([f"rank {rank}", how, *text.splitlines()[-1:]]))
            raise RuntimeError("; ".join(ends))
        results: list[Result] = torch.load(answer, weights_only=False)
        return results


def _different_ports(count: int) -> list[int]:
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return list(ports)


def _memory(ports: list[int]) -> str:
    """How the names of a run's shared memory begin."""
    return f"offline-{ports[0]}-"


def _engine_run(case: Case, ranks: int, compiled: bool) -> Result:
    from PIL import Image
    from torch._dynamo.utils import counters
    from torch._inductor import metrics
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    counters.clear()
    metrics.reset()
    if compiled:
        compiled_order.watch()
        compiled_order.early_reads.clear()
    if case.prepare is not None:
        case.prepare()
    chosen: dict[str, Any] = {}
    if case.plan != "plain":
        chosen = {"model_impl": "depthpar", "hf_overrides": {"depthpar": case.plan}}
    llm = LLM(
        str(case.model),
        dtype=case.dtype,
        tensor_parallel_size=ranks,
        distributed_executor_backend="external_launcher" if ranks > 1 else "uni",
        **{
            "enforce_eager": not compiled,
            "max_model_len": 256,
            "max_num_seqs": 32,
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
            "seed": 0,
            "kv_cache_memory_bytes": KV_BYTES,
            **chosen,
            **case.engine,
        },
    )
    seen: list[torch.Tensor] = []
    if case.logits:
        executor = llm.llm_engine.model_executor
        model = executor.driver_worker.worker.model_runner.model
        inner = model.compute_logits

        def compute_logits(hidden: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = inner(hidden)
            seen.append(logits.clone())
            return logits

        model.compute_logits = compute_logits
    if case.update is not None:
        way, folder = case.update
        weight_updates.WAYS[way](llm, folder)
    known = sorted({path for path in case.adapters or () if path is not None})
    requests = [
        LoRARequest(path.name, 1 + known.index(path), str(path)) if path is not None else None
        for path in case.adapters or ()
    ]
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in case.prompts]
    for prompt, path in zip(prompts, case.images or (), strict=False):
        prompt["multi_modal_data"] = {"image": Image.open(path)}
    outputs = llm.generate(
        prompts,
        SamplingParams(
            temperature=0,
            max_tokens=case.max_tokens,
            prompt_logprobs=None if case.cached else 0,
            logprobs=0 if case.cached else None,
            ignore_eos=True,
            detokenize=False,
        ),
        use_tqdm=False,
        lora_request=requests or None,
    )
    return Result(
        prompt_logprobs=[
            torch.tensor(
                [
                    entry[token].logprob
                    for entry, token in zip(
                        output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True
                    )
                ]
            )
            for output in outputs
            if not case.cached
        ],
        logprobs=[
            torch.tensor(
                [
                    entry[token].logprob
                    for entry, token in zip(
                        output.outputs[0].logprobs, output.outputs[0].token_ids, strict=True
                    )
                ]
            )
            for output in outputs
            if case.cached
        ],
        tokens=[list(output.outputs[0].token_ids) for output in outputs],
        logits=seen,
        compilation={
            "graphs": counters["stats"]["unique_graphs"],
            "breaks": sum(counters["graph_break"].values()),
            "kernels": metrics.generated_kernel_count,
            "early reads": len(compiled_order.early_reads),
        },
    )


def _rank(
    rank: int,
    env: dict[str, str],
    ports: list[int],
    timeout: float,
    log: Path,
    job: Path,
    answer: Path,
    compiled: bool,
    hosts: bool,
) -> None:
    fork_server.become({**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, str(log))
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would win over KV_BYTES
    faulthandler.enable()
    faulthandler.dump_traceback_later(timeout - 10)
    # PyTorch read it when it was imported.
    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed
    from vllm.platforms.cpu import CpuPlatform

    name = _CPUSHMDistributed.make_group_name
    # vLLM's ranks use shared memory if they agree on a name for it, as on one host they do.
    _CPUSHMDistributed.make_group_name = staticmethod(
        lambda communicator: (
            f"host {rank}" if hosts else _memory(ports) + name(communicator).lstrip("/")
        )
    )
    # vLLM freezes the heap, too, and thaws it when an engine ends: the next ones would pay again.
    freeze = gc.freeze
    gc.freeze = gc.unfreeze = lambda: None
    results = []
    ranks = int(env["WORLD_SIZE"])
    for case, port in zip(torch.load(job, weights_only=False), ports, strict=True):
        freeze()
        os.environ["MASTER_PORT"] = str(port)
        results.append(_engine_run(case, ranks, compiled))
        # It looks at everything in every module; once will do.
        CpuPlatform.register_triton_kernel_overrides = staticmethod(lambda: None)
        if ranks == 1:
            from vllm.distributed import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()
        gc.collect()
    if rank == 0:
        torch.save(results, answer)
