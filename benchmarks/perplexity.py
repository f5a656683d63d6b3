"""Perplexity of plans on a text, with the reference on transformers (`vllm_depthpar.hf`).

The text is cut into windows of equal length with no overlap; every token of a window but the first
is predicted from those before it in the window. fp32.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import common
import torch
from transformers import AutoTokenizer

from vllm_depthpar import bundled, hf, plan


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", metavar="MODEL", help=common.MODEL_HELP)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--plans", nargs="+", required=True, metavar="PLAN")
    parser.add_argument("--window", type=common.at_least(2), default=512, help="tokens (512)")
    parser.add_argument("--windows", type=common.at_least(1), default=20, help="at most (20)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON")
    args = parser.parse_args()
    model = str(args.model or bundled.prepare())
    tokens = AutoTokenizer.from_pretrained(model)(args.text.read_text()).input_ids
    # Spread over the whole text.
    step = max(args.window, len(tokens) // args.windows)
    starts = range(0, len(tokens) - args.window + 1, step)
    windows = torch.tensor([tokens[start : start + args.window] for start in starts])
    chosen = common.contenders(model, args.plans)
    found = {}
    with common.progress() as progress:
        task = progress.add_task("", total=len(chosen) * len(windows))
        for one in chosen:
            network = hf.load(model, plan.parse("identity") if one.spec is None else one.spec)
            loss = 0.0
            for window in windows:
                progress.update(task, advance=1, description=one.label)
                with torch.no_grad():
                    logprobs = network(window[None]).logits[0, :-1].log_softmax(-1)
                loss -= float(logprobs.gather(1, window[1:, None]).sum())
            found[one.label] = math.exp(loss / (len(windows) * (args.window - 1)))
    report = {
        **common.facts(),
        "window": args.window,
        "windows": len(windows),
        "tokens_predicted": len(windows) * (args.window - 1),
        "text": args.text.name,
        "perplexity": found,
    }
    rows = [[one.label, one.plan, f"{found[one.label]:.2f}"] for one in chosen]
    print(common.markdown(["plan", "is", "perplexity"], rows))
    if args.out:
        common.write_json(args.out, report)


if __name__ == "__main__":
    common.run_main(main)
