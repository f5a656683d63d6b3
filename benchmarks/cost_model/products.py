"""The matrix products of a decoding step alone: those of 30 layers, and how else they can be made.

In 15 pairs: what a plan of pairs can save in a step is this, and half of the rest. And as blocks of
parallel residual could make them, which read one normalized stream: q, k, v, gate and up as one
product, o and down as another, of both inputs put together.

As vLLM 0.32 computes them on a CPU (oneDNN, weights packed once), at the bundled SmolLM2-135M's
sizes, in turns.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout: this is a script

import torch

from benchmarks import common
from vllm_depthpar.bench.rounds import spread, summary
from vllm_depthpar.checkpoint import bundled
from vllm_depthpar.checkpoint.config import read_config
from vllm_depthpar.cli.types import at_least
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.predict.calibrate import layer_products
from vllm_depthpar.util import files, markdown

ROWS = (1, 8)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Takes {inputs of a product: activations}.
Products = Callable[[dict[int, torch.Tensor]], None]


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=at_least(1), default=25, help="(25)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(float32)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON")
    args = parser.parse_args()
    from vllm.platforms import current_platform

    shape = ModelShape.from_config(read_config(str(bundled.prepare())))
    dtype = DTYPES[args.dtype]
    current_platform.import_kernels()
    ways = {
        "alone": products(shape, 1, dtype),
        "pairs": products(shape, 2, dtype),
        "merged": merged(shape, dtype),
    }
    rows, report = [], {}
    for batch in ROWS:
        inputs = {
            width * size: torch.randn(batch, width * size, dtype=dtype)
            for width in (1, 2)
            for size in (shape.hidden, shape.heads * shape.head_dim, shape.intermediate)
        }
        found = [
            {way: seconds(run, inputs) for way, run in ways.items()} for _ in range(args.rounds)
        ]
        times = {way: [1e3 * of[way] for of in found] for way in ways}
        ratios = {way: [of["alone"] / of[way] for of in found] for way in ("pairs", "merged")}
        rows.append(
            [
                str(batch),
                *(spread(of, ".1f") for of in times.values()),
                *map(spread, ratios.values()),
            ]
        )
        report[batch] = {
            **{f"{way}_ms": summary(of) for way, of in times.items()},
            "speedup": summary(ratios["pairs"]),
            "merged_speedup": summary(ratios["merged"]),
        }
    header = ["batch", *(f"{way}, ms" for way in ways), "speed of pairs", "of merged"]
    print(markdown.table(header, rows))
    if args.out:
        files.write_json(args.out, {**common.facts(), "dtype": args.dtype, "batches": report})


def products(shape: ModelShape, width: int, dtype: torch.dtype) -> Products:
    """Those of all layers, so many of them side by side."""
    # Layers side by side are one layer with all of their heads.
    wide = replace(
        shape,
        heads=width * shape.heads,
        kv_heads=width * shape.kv_heads,
        intermediate=width * shape.intermediate,
    )
    packed = [
        (size, _packed(out, size, dtype))
        for _ in range(shape.layers // width)
        for out, size in layer_products(wide, tp=1)
    ]

    def run(inputs: dict[int, torch.Tensor]) -> None:
        for size, product in packed:
            product(inputs[size])

    return run


def merged(shape: ModelShape, dtype: torch.dtype) -> Products:
    """Two a layer: of what reads the stream, and of what writes to it."""
    heads, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    out = heads + 2 * kv + 2 * shape.intermediate
    packed = [
        (
            _packed(out, shape.hidden, dtype),
            _packed(shape.hidden, heads + shape.intermediate, dtype),
        )
        for _ in range(shape.layers)
    ]

    def run(inputs: dict[int, torch.Tensor]) -> None:
        for first, second in packed:
            first(inputs[shape.hidden])
            second(torch.cat([inputs[heads], inputs[shape.intermediate]], -1))

    return run


def _packed(out: int, size: int, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    from vllm import _custom_ops

    weight = torch.full((size, out), 0.01, dtype=dtype)
    handler = _custom_ops.create_onednn_mm(weight, primitive_cache_size=8)
    return lambda inputs: _custom_ops.onednn_mm(handler, inputs, None)


def seconds(run: Products, inputs: dict[int, torch.Tensor]) -> float:
    """Of one step."""
    begun = time.perf_counter()
    run(inputs)
    return time.perf_counter() - begun


if __name__ == "__main__":
    common.run_main(main)
