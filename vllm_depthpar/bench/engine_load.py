"""Batches through vLLM's engine, with no server and no tokenizer in between, and what they take."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from vllm_depthpar.launch.engine import make_engine

if TYPE_CHECKING:
    from vllm import LLM

# Prompt tokens of a step: a batch with more of them is prefilled in several.
BUDGET = 8192


def most_tokens(batch: int, prompt_tokens: int, tokens: int) -> int:
    """Say how much each of `batch` sequences may generate, so that in `tokens` steps all of them
    decode: the first are ahead of the last where prefill takes several steps."""
    prefill = -(-batch * prompt_tokens // BUDGET)
    return tokens + (2 * prefill if prefill > 1 else 0)


def run_engine(connection: Connection, model: str, flags: Sequence[str]) -> None:
    """Run an engine: send "ready", then answer each job, arguments of `run_batch`, with its figures
    or the RuntimeError that it raised."""
    engine = make_engine(model, flags)
    connection.send("ready")
    while True:
        try:
            job = connection.recv()
        except EOFError:  # nothing more is asked
            from vllm_depthpar import vllm_compat

            vllm_compat.shut_down(engine)
            return
        answer: dict[str, float] | RuntimeError
        try:
            answer = run_batch(engine, **job)
        except RuntimeError as error:
            answer = error
        connection.send(answer)


def run_batch(
    engine: LLM, *, batch: int, prompt_tokens: int, tokens: int, vocab: int, seed: int
) -> dict[str, float]:
    """Generate `tokens` tokens of each of `batch` random prompts; greedy, nothing ends early.

    Returns:
        prefill_seconds: until every sequence has its first token.
        decode_seconds: from there until every sequence has got all of the others.
        decode_tokens: of all sequences in that time.
        gpu_bytes: peak of memory in tensors on any GPU so far; 0 on a CPU.

    Raises:
        RuntimeError: the KV cache can't hold the sequences at once.
    """
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    numbers = random.Random(seed)
    most = most_tokens(batch, prompt_tokens, tokens)
    params = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True, detokenize=False)
    prompts = [numbers.choices(range(vocab), k=prompt_tokens) for _ in range(batch)]
    begun = time.perf_counter()
    for index, prompt in enumerate(prompts):
        engine.llm_engine.add_request(
            f"{seed}-{index}", TokensPrompt(prompt_token_ids=prompt), params
        )
    counts: dict[str, int] = {}
    first: dict[str, int] = {}
    started, ended, made = 0.0, 0.0, 0
    finished = False
    while engine.llm_engine.has_unfinished_requests():
        for output in engine.llm_engine.step():
            counts[output.request_id] = len(output.outputs[0].token_ids)
            finished = finished or output.finished
        now = time.perf_counter()
        if not first and len(counts) == batch:
            first, started = dict(counts), now
        if first and not ended and all(counts[key] - first[key] >= tokens - 1 for key in counts):
            ended, made = now, sum(counts.values()) - sum(first.values())
        if finished and not ended:
            raise RuntimeError(
                f"{batch} sequences of {prompt_tokens} + {tokens} tokens do not fit into the KV "
                "cache at once; allowed: a larger VLLM_CPU_KVCACHE_SPACE, or on a GPU "
                "--engine-args='--kv-cache-memory-bytes N'"
            )
    return {
        "prefill_seconds": started - begun,
        "decode_seconds": ended - started,
        "decode_tokens": made,
        "gpu_bytes": max(engine.llm_engine.collective_rpc(_gpu_peak)),
    }


def _gpu_peak(_: Any) -> int:
    """Of one rank."""
    import torch

    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0
