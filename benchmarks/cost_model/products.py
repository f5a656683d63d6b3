"""The matrix products of a decoding step alone: those of 30 layers, and of the same in 15 pairs.

As vLLM 0.32 computes them on a CPU (oneDNN, weights packed once), at the bundled SmolLM2-135M's
sizes in float32, in turns. What a plan of pairs can save in a step is this, and half of the rest.
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
# Takes {inputs of a product: activations}.
Products = Callable[[dict[int, torch.Tensor]], None]


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=at_least(1), default=25, help="(25)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON")
    args = parser.parse_args()
    shape = ModelShape.from_config(read_config(str(bundled.prepare())))
    alone, pairs = products(shape, 1), products(shape, 2)
    rows, report = [], {}
    for batch in ROWS:
        inputs = {
            width * size: torch.randn(batch, width * size)
            for width in (1, 2)
            for size in (shape.hidden, shape.heads * shape.head_dim, shape.intermediate)
        }
        found = [(seconds(alone, inputs), seconds(pairs, inputs)) for _ in range(args.rounds)]
        ratios = [of_alone / of_pairs for of_alone, of_pairs in found]
        times = [[1e3 * of for of in column] for column in zip(*found, strict=True)]
        rows.append([str(batch), *(spread(column, ".1f") for column in times), spread(ratios)])
        report[batch] = {
            "alone_ms": summary(times[0]),
            "pairs_ms": summary(times[1]),
            "speedup": summary(ratios),
        }
    print(markdown.table(["batch", "layers alone, ms", "pairs, ms", "speed"], rows))
    if args.out:
        files.write_json(args.out, {**common.facts(), "batches": report})


def products(shape: ModelShape, width: int) -> Products:
    """Those of all layers, so many of them side by side."""
    from vllm import _custom_ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    # Layers side by side are one layer with all of their heads.
    wide = replace(
        shape,
        heads=width * shape.heads,
        kv_heads=width * shape.kv_heads,
        intermediate=width * shape.intermediate,
    )
    packed = [
        (size, _custom_ops.create_onednn_mm(torch.full((size, out), 0.01), primitive_cache_size=8))
        for _ in range(shape.layers // width)
        for out, size in layer_products(wide, tp=1)
    ]

    def run(inputs: dict[int, torch.Tensor]) -> None:
        for size, handler in packed:
            _custom_ops.onednn_mm(handler, inputs[size], None)

    return run


def seconds(run: Products, inputs: dict[int, torch.Tensor]) -> float:
    """Of one step."""
    begun = time.perf_counter()
    run(inputs)
    return time.perf_counter() - begun


if __name__ == "__main__":
    common.run_main(main)
