"""`depthpar study`: perplexity of every span of layers under every transformation."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from vllm_depthpar.checkpoint.config import read_original_config
from vllm_depthpar.cli.types import DTYPES, MODEL_HELP, at_least, out_file, path_or_name
from vllm_depthpar.errors import UserError
from vllm_depthpar.evaluate.span_study import TRANSFORMATIONS, rows_with, spans
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.util import files
from vllm_depthpar.util.markdown import table
from vllm_depthpar.util.provenance import origin


def add(commands: Any) -> None:
    """Register the subcommand."""
    study = commands.add_parser("study", help="heat maps: what each span of layers withstands")
    study.add_argument("model", type=path_or_name, metavar="MODEL", help=MODEL_HELP)
    study.add_argument(
        "--text", type=path_or_name, required=True, metavar="FILE", help="UTF-8 text"
    )
    study.add_argument(
        "--out",
        type=out_file("{stem}.png"),
        required=True,
        metavar="FILE",
        help="JSON; beside it PNG",
    )
    study.add_argument(
        "--transformations",
        nargs="+",
        choices=TRANSFORMATIONS,
        metavar="T",
        help=f"any of {', '.join(TRANSFORMATIONS)} (all; drop_sync with --tp alone)",
    )
    study.add_argument(
        "--tp", type=at_least(1), default=1, metavar="N", help="ranks, for drop_sync (1)"
    )
    study.add_argument("--window", type=at_least(2), default=512, help="tokens a window (512)")
    study.add_argument("--tokens", type=at_least(1), default=2048, help="count at most (2048)")
    study.add_argument(
        "--grid", type=at_least(1), default=1, metavar="G", help="spans from G to G layers (1)"
    )
    study.add_argument("--dtype", choices=DTYPES, default="auto", help="(auto)")
    study.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> str:
    import numpy as np

    from vllm_depthpar.evaluate.suite import Suite, open_model, read_texts

    try:
        from vllm_depthpar.util import plots
    except ImportError:
        raise UserError(
            "heat maps need matplotlib; allowed: pip install 'vllm-depthpar[bench]'"
        ) from None
    shape = ModelShape.from_config(read_original_config(args.model))
    layers, grid = shape.layers, list(spans(shape.layers, args.grid))
    texts = read_texts(args.model, [args.text], args.window, tokens=args.tokens)
    suite = Suite(open_model(args.model, args.dtype, ranks=args.tp), texts)
    name = texts[0].name
    unmodified = suite.unmodified()[name]
    maps, numbers = {}, {}
    # On one rank a dropped sync point changes nothing.
    every = [name for name in TRANSFORMATIONS if args.tp > 1 or name != "drop_sync"]
    for transformation in args.transformations or every:
        transformed = rows_with(shape, grid, TRANSFORMATIONS[transformation])
        of_spans = suite.measure(list(transformed.values()), transformation)
        found = [of_text[name] for of_text in of_spans]
        square = np.full((layers, layers), np.nan)
        for (start, end), quality_found in zip(transformed, found, strict=True):
            square[start : start + args.grid, end - args.grid : end] = quality_found.perplexity
        maps[transformation] = square
        numbers[transformation] = [
            # JSON knows no infinity.
            {"start": start, "end": end, "perplexity": min(one.perplexity, 1e300)}
            | {"kl": one.divergence if math.isfinite(one.divergence) else 1e300}
            for (start, end), one in zip(transformed, found, strict=True)
        ]
    model = Path(args.model).name
    picture = args.out.with_suffix(".png")
    plots.heat_maps(picture, maps, unmodified.perplexity, f"{model}: perplexity on {name}")
    files.write_json(
        args.out,
        {
            **origin("depthpar"),
            "model": model,
            **suite.described(),
            "grid": args.grid,
            "tp": args.tp,
            "unmodified": unmodified.perplexity,
            "spans": numbers,
        },
    )
    rows = []
    for transformation, measured in numbers.items():
        for length in sorted({4, 8, 12} & {one["end"] - one["start"] for one in measured}):
            best = min(
                (one for one in measured if one["end"] - one["start"] == length),
                key=lambda one: one["perplexity"],
            )
            rows.append(
                [
                    transformation,
                    str(length),
                    f"[{best['start']}, {best['end']})",
                    f"{best['perplexity']:.2f}",
                ]
            )
    shown = table(["transformation", "layers", "best span", "perplexity"], rows)
    return f"{shown}\n\nunmodified: {unmodified.perplexity:.2f}   {args.out}   {picture}"
