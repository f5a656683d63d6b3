"""Measure this machine for the cost model: `vllm_depthpar.predict.machines.Device`.

What products cost is timed at the model's own shapes, over more weights than a cache holds. What a
layer and a step cost whatever their size is what vLLM itself takes for models so narrow that
nothing else is left: the slope and the offset over two depths. An all-reduce is not measured: two
processes of one host say nothing of two hosts.
"""

from __future__ import annotations

import tempfile
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from vllm_depthpar.errors import UserError
from vllm_depthpar.launch import engine, hardware
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.predict.devices import CPU_REDUCTIONS, GPU_OVERLAP, THIS
from vllm_depthpar.predict.machines import Device
from vllm_depthpar.predict.timers import CpuTimer, CudaTimer, Timer
from vllm_depthpar.util.files import write_json
from vllm_depthpar.util.provenance import cpu_model

ROWS = (8, 64, 512)
DEPTHS = (4, 16)
TOKENS = 48
# Of one product: a slow core gets through it in seconds, with many rows too.
MOST_PARAMETERS = 1 << 24
REPEATS = 5
_NARROW = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 128,
    "vocab_size": 512,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def measure(shape: ModelShape, tp: int = 1, eager: bool = False) -> Device:
    """Measure one rank of this machine: a GPU if there is one, else what this process may use of
    the CPU.

    Takes half a minute or more.

    Args:
        tp: into how many shards the products are cut.
        eager: let layers cost what they do with ``--enforce-eager``; else compiled, with CUDA
            graphs on a GPU, as vLLM runs by default.

    Raises:
        UserError: vLLM could not run here.
    """
    on_gpu = torch.cuda.is_available()
    dtype = torch.float32 if shape.dtype_bytes == 4 else torch.bfloat16
    bandwidth, flops = measure_products(shape, tp, CudaTimer() if on_gpu else CpuTimer(), dtype)
    name = str(dtype).removeprefix("torch.")
    layer_seconds, step_seconds = measure_fixed(name, eager)
    what = torch.cuda.get_device_name() if on_gpu else cpu_model()
    day = datetime.now(UTC).date().isoformat()
    return Device(
        THIS,
        bandwidth,
        flops,
        layer_seconds,
        step_seconds,
        **({"overlap": GPU_OVERLAP} if on_gpu else CPU_REDUCTIONS),
        source=f"measured {day}: {what}, {name}, {torch.get_num_threads()} threads, "
        f"{'eager' if eager else 'compiled'}",
    )


def measure_products(
    shape: ModelShape, tp: int, timer: Timer, dtype: torch.dtype
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Measure bytes per second of products with one row, and (rows, FLOP/s) of those with
    `ROWS`."""
    layer = layer_products(shape, tp)
    parameters = sum(out * of for out, of in layer)

    def seconds(rows: int) -> float:
        return sum(_product_seconds(size, rows, timer, dtype) for size in layer)

    return (
        parameters * shape.dtype_bytes / seconds(1),
        tuple((rows, 2 * parameters * rows / seconds(rows)) for rows in ROWS),
    )


def _product_seconds(size: tuple[int, int], rows: int, timer: Timer, dtype: torch.dtype) -> float:
    """Take the shortest of some runs: whatever else the machine does only makes one longer."""
    inputs = torch.ones(rows, size[1], dtype=dtype, device=timer.device)
    weights = [
        torch.full(size, 0.01, dtype=dtype, device=timer.device)
        for _ in range(timer.copies(size[0] * size[1] * dtype.itemsize, rows))
    ]
    lots = [weights[at : at + timer.lot] for at in range(0, len(weights), timer.lot)]

    def multiply(weights: list[torch.Tensor]) -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs, weight)

    with torch.inference_mode():
        multiply(weights)
        runs = [partial(multiply, lot) for lot in lots] * REPEATS
        return min(map(timer.seconds, runs)) / timer.lot


def layer_products(shape: ModelShape, tp: int) -> list[tuple[int, int]]:
    """List (outputs, inputs) of the products of a layer on one rank, large ones with fewer
    outputs."""
    q, kv = shape.heads * shape.head_dim // tp, shape.kv_heads * shape.head_dim // tp
    intermediate = shape.intermediate // tp
    sizes = [
        (q + 2 * kv, shape.hidden),
        (shape.hidden, q),
        (2 * intermediate, shape.hidden),
        (shape.hidden, intermediate),
    ]
    return [(max(1, min(out, MOST_PARAMETERS // of)), of) for out, of in sizes]


def measure_fixed(dtype: str, eager: bool) -> tuple[float, float]:
    """Measure the seconds that vLLM takes for a layer and for a step, whatever their size.

    Args:
        dtype: as config.json names it.

    Raises:
        UserError: vLLM could not run here.
    """
    try:
        environment = hardware.environment(1, torch.cuda.is_available())
        shallow, deep = engine.call(_decode, dtype, eager, env=environment)
    except engine.EngineError as error:
        raise UserError(f"vLLM does not run here ({error}); allowed: --device") from None
    layer = max(0.0, (deep - shallow) / (DEPTHS[1] - DEPTHS[0]))
    return layer, max(0.0, shallow - DEPTHS[0] * layer)


def _decode(dtype: str, eager: bool) -> list[float]:
    """Decode with a narrow model of each depth, in turns; the least seconds of a step of each.

    Like `_product_seconds`, and in turns so that what changes on the machine meets both.
    """
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    decoders = []
    with tempfile.TemporaryDirectory(prefix="calibrate-") as folder:
        for depth in DEPTHS:
            config = {**_NARROW, "num_hidden_layers": depth, "torch_dtype": dtype}
            model = Path(folder, f"{depth}")
            write_json(model / "config.json", config)
            decoder = LLM(
                str(model),
                load_format="dummy",
                skip_tokenizer_init=True,
                enforce_eager=eager,
                distributed_executor_backend="uni",
                # Else a step on a GPU returns before its tokens are there.
                async_scheduling=False,
                max_model_len=_NARROW["max_position_embeddings"],
                max_num_seqs=1,
                kv_cache_memory_bytes=64 << 20,
            ).llm_engine
            decoder.add_request("calibrate", TokensPrompt(prompt_token_ids=[1] * 8), params)
            decoder.step()  # the prompt
            decoders.append(decoder)
    seconds: list[list[float]] = [[] for _ in decoders]
    while any(decoder.has_unfinished_requests() for decoder in decoders):
        for decoder, found in zip(decoders, seconds, strict=True):
            start = time.perf_counter()
            decoder.step()
            found.append(time.perf_counter() - start)
    return [min(found) for found in seconds]
