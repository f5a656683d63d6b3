"""Plans that `depthpar search` found against the best contiguous spans of pairs, on other text.

The spans are chosen on the test text itself, by measuring every one of them: the best that a sweep
by hand (arXiv 2502.02790) could find. The found plans have never seen it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout: this is a script

from benchmarks import common
from vllm_depthpar.checkpoint import bundled
from vllm_depthpar.checkpoint.config import read_config
from vllm_depthpar.cli.types import at_least
from vllm_depthpar.evaluate.suite import Suite, open_model, read_texts, reported
from vllm_depthpar.plan import Plan, resolve
from vllm_depthpar.plan.auto import auto_spec
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.util import files, markdown


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", metavar="MODEL", help=common.MODEL_HELP)
    parser.add_argument("--report", type=Path, required=True, help="PLAN-report.json of a search")
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--window", type=at_least(2), default=512, help="tokens (512)")
    parser.add_argument("--tokens", type=at_least(1), default=2044, help="of each (2044)")
    parser.add_argument("--depths", type=int, nargs="+", default=[28, 26, 24], help="(28 26 24)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON")
    args = parser.parse_args()
    model = str(args.model or bundled.prepare())
    shape = ModelShape.from_config(read_config(model))
    texts = read_texts(model, args.text, args.window, tokens=args.tokens)
    suite = Suite(open_model(model), texts)
    front = {one["depth"]: one["plan"] for one in json.loads(args.report.read_text())["front"]}
    plans = {"unmodified": suite.evaluator.unmodified}
    plans["auto"] = resolve(auto_spec(shape)[0], shape.layers)
    found = {depth: resolve(front[depth], shape.layers) for depth in front if depth < shape.layers}
    plans |= {f"found {depth}": plan for depth, plan in found.items()}
    spans = {depth: spans_of(shape.layers, depth) for depth in args.depths}
    for of_depth in spans.values():
        plans |= of_depth
    results = dict(zip(plans, suite.measure(list(plans.values()), "Plans and spans"), strict=True))
    rows, summary = [], []
    for text in texts:
        losses = {label: of_text[text.name].loss for label, of_text in results.items()}
        for depth in args.depths:
            span = min(spans[depth], key=losses.__getitem__)
            gap = losses[span] - losses["unmodified"]
            gone = (losses[span] - losses[f"found {depth}"]) / gap
            row: dict[str, Any] = {
                "text": text.name,
                "depth": depth,
                "unmodified": math.exp(losses["unmodified"]),
                "best_span": span,
                "best_span_perplexity": math.exp(losses[span]),
                "found_perplexity": math.exp(losses[f"found {depth}"]),
                "share_of_log_perplexity_gap_gone": gone,
            }
            summary.append(row)
            rows.append(
                [
                    text.name,
                    str(depth),
                    f"{row['unmodified']:.2f}",
                    f"{row['best_span_perplexity']:.2f} {span}",
                    f"{row['found_perplexity']:.2f}",
                    f"{gone:.0%}",
                ]
            )
    header = ["text", "depth", "unmodified", "best span of all", "found", "of the gap gone"]
    print(markdown.table(header, rows))
    if args.out:
        report = {
            **common.facts(),
            **suite.described(),
            "summary": summary,
            "plans": {
                label: {"plan": plans[label].to_spec(), **reported(of_text)}
                for label, of_text in results.items()
            },
        }
        files.write_json(args.out, report)


def spans_of(layers: int, depth: int) -> dict[str, Plan]:
    """Every contiguous span of pairs that leaves so many blocks, by its name."""
    width = 2 * (layers - depth)
    return {
        f"[{start}, {start + width})": resolve({"pair": [start, start + width]}, layers)
        for start in range(layers - width + 1)
    }


if __name__ == "__main__":
    common.run_main(main)
