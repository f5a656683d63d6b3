"""What `depthpar bench` measures: parts, loads of given sizes, and vLLM's options for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_depthpar.bench import memory
from vllm_depthpar.bench.engine_load import BUDGET, most_tokens
from vllm_depthpar.errors import UserError
from vllm_depthpar.launch import kv_cache
from vllm_depthpar.launch.engine import flags_of
from vllm_depthpar.launch.variants import Variant, check_tp
from vllm_depthpar.plan import resolve
from vllm_depthpar.plan.model_shape import ModelShape

LATENCY, THROUGHPUT, SERVING = PARTS = ("latency", "throughput", "serving")
# Latency and throughput share an engine for each variant; serving has a server for each.
ENGINES, SERVERS = STAGES = ("engines", "servers")


@dataclass(frozen=True)
class Load:
    """One thing to measure.

    Attributes:
        part: of `PARTS`.
        name: its sizes, for people.
        batch: sequences at once; requests in all, of serving.
        prompt_tokens: of each.
        longest: tokens that a sequence has in the end, at most.
        rate: requests per second, of serving; inf: all at once.
    """

    part: str
    name: str
    batch: int
    prompt_tokens: int
    longest: int
    rate: float = math.inf

    @property
    def key(self) -> str:
        """Names it in a record."""
        return f"{self.part}, {self.name}"

    @property
    def stage(self) -> str:
        """Of `STAGES`."""
        return SERVERS if self.part == SERVING else ENGINES


@dataclass(frozen=True)
class BenchSettings:
    """What is measured, and how vLLM is set up for it, alike for all variants.

    Attributes:
        input_lens: prompt tokens of latency's and serving's requests.
        output_len: tokens of every answer.
        batches, contexts: sequences at once and their prompt tokens, of throughput.
        rates, requests: requests per second, and how many, of serving.
        engine_args: more flags of vLLM's engine; they win.
    """

    parts: tuple[str, ...] = PARTS
    input_lens: tuple[int, ...] = (128,)
    output_len: int = 64
    batches: tuple[int, ...] = (1, 8)
    contexts: tuple[int, ...] = (128,)
    rates: tuple[float, ...] = (1.0, math.inf)
    requests: int = 32
    tp: int = 1
    dtype: str = "auto"
    load_format: str = "auto"
    eager: bool = False
    one_at_a_time: bool = False
    engine_args: tuple[str, ...] = ()

    def loads(self) -> list[Load]:
        """List what every variant goes through in each round."""

        def load(part: str, sizes: str, batch: int, tokens: int, rate: float = math.inf) -> Load:
            most = most_tokens(batch, tokens, self.output_len)
            return Load(
                part,
                f"{tokens} tokens{sizes}",
                batch,
                tokens,
                tokens + (self.output_len if part == SERVING else most),
                rate,
            )

        found = [load(LATENCY, "", 1, tokens) for tokens in self.input_lens]
        for context in self.contexts:
            found += [
                load(THROUGHPUT, f", batch {batch}", batch, context) for batch in self.batches
            ]
        for tokens in self.input_lens:
            for rate in self.rates:
                often = "all at once" if rate == math.inf else f"{rate:g} requests/s"
                found.append(load(SERVING, f", {often}", self.requests, tokens, rate))
        return [one for one in found if one.part in self.parts]


def check(settings: BenchSettings, variants: Sequence[Variant], config: dict[str, Any]) -> None:
    """Raise UserError for what vLLM would refuse after a long start: a model that can't be cut
    into so many ranks, or sequences that are too long for it."""
    shape = ModelShape.from_config(config)
    for one in variants:
        plan = resolve(one.spec or "identity", shape.layers)
        check_tp(one, plan, shape, settings.tp)
    longest = max(load.longest for load in settings.loads())
    positions = config.get("max_position_embeddings", math.inf)
    if longest > positions:
        raise UserError(
            f"{longest} tokens, prompt and answer, are too many; allowed: {positions}, as the "
            "model has positions"
        )


@dataclass(frozen=True)
class Setup:
    """How the variants of a stage are set up.

    Attributes:
        model: folder or hub name.
        config: its config.json.
        loads: what they will get: they have KV cache and length for the largest.
        gpu_share: of a GPU's memory, what each may take; None on a CPU.
    """

    model: str
    config: dict[str, Any]
    settings: BenchSettings
    loads: Sequence[Load]
    gpu_share: float | None

    def flags(self, variant: Variant) -> list[str]:
        """With which vLLM serves a variant, as an engine or as a server."""
        settings, loads = self.settings, self.loads
        longest = max(load.longest for load in loads)
        if loads[0].stage == SERVERS:
            # Random tokens that become text and tokens again are rarely as many.
            positions = self.config.get("max_position_embeddings", math.inf)
            longest = min(longest + longest // 4 + 64, positions)
        options: dict[str, object] = {
            "dtype": settings.dtype,
            "load_format": settings.load_format,
            "enforce_eager": settings.eager,
            "tensor_parallel_size": settings.tp,
            "max_model_len": longest,
            # Not all memory, so that variants fit side by side. On a CPU the environment has it.
            "kv_cache_memory_bytes": self.gpu_share and self.kv_bytes(variant),
            "gpu_memory_utilization": self.gpu_share,
            "no_enable_prefix_caching": True,
            "seed": 0,
        }
        if loads[0].stage == ENGINES:
            most = max(load.batch for load in loads)
            tokens = max(load.batch * load.prompt_tokens for load in loads)
            options["max_num_seqs"] = most
            options["max_num_batched_tokens"] = max(most, min(tokens, BUDGET))
        return [*variant.flags, *flags_of(options), *settings.engine_args]

    def kv_bytes(self, variant: Variant) -> int:
        """KV cache on one rank for all sequences of the largest load at once."""
        shape = ModelShape.from_config(self.config).in_dtype(self.settings.dtype)
        plan = resolve(variant.spec or "identity", shape.layers)
        return max(
            kv_cache.needed_bytes(shape, plan, [load.longest] * load.batch, self.settings.tp)
            for load in self.loads
        )

    def memory_bytes(self, variant: Variant) -> int:
        """Memory of all its processes on a CPU, estimated."""
        tp = self.settings.tp
        shape = ModelShape.from_config(self.config).in_dtype(self.settings.dtype)
        # A server is a front end, an engine and the ranks; an engine alone is in its only rank.
        apart = 2 if self.loads[0].stage == SERVERS else int(tp > 1)
        return memory.estimate(
            shape,
            resolve(variant.spec or "identity", shape.layers),
            tp,
            kv_cache.reserved_bytes(self.kv_bytes(variant)),
            apart + tp,
            quantized="quantization_config" in self.config,
        )
