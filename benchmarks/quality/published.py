"""What papers published of a model, again, on the machine at hand: quality and speed of plain vLLM,
`auto` and the published plan, side by side.

Each step is a command of `depthpar`; what it makes is kept in a folder beside --out, and the same
command goes on with the first step that is missing. A model that no paper has gets the spans that
correspond to the published ones: the same share of its layers in pairs, and as many left behind
them.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout: this is a script

from benchmarks import common
from vllm_depthpar.checkpoint.config import fingerprint, read_config
from vllm_depthpar.cli.eval import text_table
from vllm_depthpar.cli.steps import Step, keep_settings, run_steps
from vllm_depthpar.cli.types import MODEL_HELP, at_least, out_file, path_or_name
from vllm_depthpar.evaluate.lm_eval_tasks import task_table
from vllm_depthpar.launch.variants import PLAIN, variants
from vllm_depthpar.plan import resolve
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.plan.presets import PRESETS, Preset, preset_of
from vllm_depthpar.util import files, markdown

# lm-eval's names; all but the last compare the likelihood of given answers, GSM8K is generated.
TASKS = (
    *("mmlu", "piqa", "arc_easy", "arc_challenge", "winogrande", "openbookqa", "hellaswag"),
    "gsm8k",
)
# Before --bench-args, which win.
BENCH = ("--parts", "throughput", "--batches", "1,8", "--contexts", "128", "--one-at-a-time")


@dataclass(frozen=True)
class Point:
    """A plan beside plain vLLM.

    Attributes:
        label: what `--plan` takes.
        about: what it is.
        published: the speed-up that a paper gives it, if one does.
    """

    label: str
    about: str
    published: float | None = None


def points(shape: ModelShape, model_type: str) -> list[Point]:
    """List the plans to compare with plain vLLM: `auto`, and what is published, or corresponds."""
    found = [Point("auto", "the default")]
    preset = preset_of(shape, model_type)
    if preset is not None:
        spec = json.dumps(preset.published.spec)
        label = spec if preset.retrained else "published"
        about = f"{spec}, {preset.published.source}"
        return [*found, Point(label, about, preset.speedup)]
    for one in PRESETS:
        if (span := corresponding(one, shape.layers)) is not None:
            about = f"corresponds to {json.dumps(one.published.spec)} of {one.model}"
            found.append(Point(json.dumps({"pair": span}), about))
    return found


def corresponding(preset: Preset, layers: int) -> list[int] | None:
    """Find the span of a model that corresponds to a published one.

    Returns:
        [start, end): of as large a share of the layers, rounded to whole pairs, with as many layers
        behind it; None where no span is published, or it would not fit.
    """
    span = resolve(preset.published.spec, preset.layers)
    pairs = [block for block in span.blocks if len(block) == 2]
    if not pairs:
        return None
    count = round(layers * len(pairs) / preset.layers)
    end = layers - (preset.layers - 1 - pairs[-1][-1])
    return [end - 2 * count, end] if count and end >= 2 * count else None


def steps(args: argparse.Namespace, chosen: Sequence[Point], kept: Path, tp: int) -> list[Step]:
    """Say what is to be done.

    Args:
        kept: folder for what the steps make.
        tp: of the machine whose speed is predicted.
    """
    labels = [PLAIN, *(one.label for one in chosen)]
    plans = [word for label in labels for word in ("--plan", label)]
    found = []
    if args.text:
        out = kept / "text.json"
        command = ["eval", args.model, *plans, "--text", *args.text, "--out", f"{out}"]
        command += ["--tokens", f"{args.tokens}"] if args.tokens else []
        found.append(Step("perplexity", command, out))
    flags = args.server_args + f" --tensor-parallel-size {args.tp}" * (args.tp > 1)
    out = kept / "tasks.json"
    command = ["eval", args.model, *plans, "--tasks", *args.tasks, "--out", f"{out}"]
    command += ["--limit", f"{args.limit}"] if args.limit else []
    command += [f"--server-args={flags.strip()}"] if flags else []
    found.append(Step("tasks", command, out))
    command = ["bench", args.model, *BENCH, "--tp", f"{args.tp}", *args.bench_args]
    command += ["--plans", ",".join(labels), "--out", f"{kept / 'bench.json'}"]
    found.append(Step("speed", command, None))
    command = ["predict", args.model, *plans[2:], "--device", args.device, "--tp", f"{tp}"]
    command += ["--link", args.link] if tp > 1 else []
    command += ["--context", f"{args.context}", "--json"]
    found.append(Step("predicted speed", command, kept / "predict.json", prints=True))
    return found


def speeds(
    chosen: Sequence[Point], layers: int, bench: Mapping[str, Any], predicted: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """List each plan's speed-ups over plain vLLM, JSON-ready: published, what eager code comes to
    whose launches bound it, predicted with CUDA graphs, and measured decoding by load."""
    of_plan = {one["label"]: one for one in predicted["plans"]}
    found = []
    for one in chosen:
        plan = of_plan[one.label]
        depth = resolve(plan["plan"], layers).depth
        found.append(
            {
                "label": one.label,
                "about": one.about,
                "depth": depth,
                "published": one.published,
                "ratio_of_depths": layers / depth,
                "predicted": plan["decode"]["speedup"],
                "measured": {
                    load: of_load[one.label]["decode_tokens_per_second"]["speedup"]
                    for load, of_load in bench["summary"]["loads"].items()
                    if "decode_tokens_per_second" in of_load.get(one.label, {})
                },
            }
        )
    return found


def speed_table(rows: Sequence[Mapping[str, Any]], machine: str) -> str:
    """Make a Markdown table of speed-ups over plain vLLM."""
    loads = list(dict.fromkeys(load for row in rows for load in row["measured"]))
    header = ["speed-up over plain", "blocks", "published", "layers / blocks"]
    header += [f"predicted, {machine}", *(f"measured, {load}" for load in loads)]
    lines = []
    for row in rows:
        published = "" if row["published"] is None else f"{row['published']:.2f}"
        measured = [
            "{median:.2f} ({min:.2f} to {max:.2f})".format(**row["measured"][load])
            for load in loads
        ]
        numbers = [f"{row['ratio_of_depths']:.2f}", f"{row['predicted']:.2f}", *measured]
        lines.append([f"{row['label']}: {row['about']}", str(row["depth"]), published, *numbers])
    return markdown.table(header, lines)


def main() -> None:
    """Run the steps, print tables, write them and the JSON."""
    args = _arguments().parse_args()
    config = read_config(args.model)
    shape = ModelShape.from_config(config)
    chosen = points(shape, config.get("model_type", "llama"))
    # Refused before anything long begins, and not by the last step.
    variants(args.model, [PLAIN, *(one.label for one in chosen)])
    tp = 2 if shape.fits(1, 2) else 1
    kept = args.out.with_name(f"{args.out.stem}.steps")
    if args.dry_run:
        print("\n".join(step.command for step in steps(args, chosen, kept, tp)))
        return
    busy = f"--out {args.out} is being made by another command; allowed: another file"
    with files.only_one(kept / ".lock", busy):
        settings = {
            name: value for name, value in vars(args).items() if name not in ("out", "dry_run")
        }
        keep_settings(kept, {**settings, "checkpoint": fingerprint(args.model)}, "--out")
        run_steps(steps(args, chosen, kept, tp))
        made = {
            path.stem: files.read_json(path, "a step's numbers") for path in kept.glob("*.json")
        }
    machine = f"{tp} x {args.device}" + f" over {args.link}" * (tp > 1)
    report = {
        **common.facts(),
        "model": Path(args.model).name,
        "machine_predicted": machine,
        "speeds": speeds(chosen, shape.layers, made["bench"], made["predict"]),
        **{part: made[part][part] for part in ("text", "tasks") if part in made},
    }
    tables = [speed_table(report["speeds"], machine), task_table(report["tasks"])]
    tables += [text_table(report["text"])] if "text" in report else []
    shown = "\n\n".join(tables)
    files.write_json(args.out, report)
    files.write_bytes(args.out.with_suffix(".md"), f"{shown}\n".encode())
    print(shown)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=path_or_name, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--out",
        type=out_file("{stem}.md", suffix=".json"),
        required=True,
        metavar="FILE.json",
        help="the numbers; beside them the tables (.md), and a folder of what the steps made",
    )
    parser.add_argument(
        "--tasks",
        type=path_or_name,
        nargs="+",
        default=list(TASKS),
        metavar="T",
        help=f"see depthpar eval ({' '.join(TASKS)})",
    )
    parser.add_argument(
        "--limit", type=at_least(1), metavar="N", help="only the first N documents of each task"
    )
    parser.add_argument(
        "--text", type=path_or_name, nargs="+", default=[], metavar="FILE", help="UTF-8 text"
    )
    parser.add_argument("--tokens", type=at_least(1), metavar="N", help="of each text (all)")
    parser.add_argument("--tp", type=at_least(1), default=1, metavar="N", help="ranks (1)")
    parser.add_argument("--server-args", default="", metavar="ARGS", help="see depthpar eval")
    parser.add_argument(
        "--bench-args", type=shlex.split, default=[], metavar="ARGS", help="more for depthpar bench"
    )
    predicted = parser.add_argument_group(
        "predicted speed", "by default of the machine of arXiv 2502.02790, two ranks where they fit"
    )
    predicted.add_argument("--device", default="a100-80g", metavar="D", help="(a100-80g)")
    predicted.add_argument("--link", default="nvlink3", metavar="L", help="(nvlink3)")
    predicted.add_argument("--context", type=at_least(0), default=2048, help="tokens before (2048)")
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    return parser


if __name__ == "__main__":
    common.run_main(main)
