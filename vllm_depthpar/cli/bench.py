"""`depthpar bench`: how fast plans are beside plain vLLM, measured."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from vllm_depthpar.bench.report import FIGURES, SHOWN, markdown, summarize, title
from vllm_depthpar.bench.run import open_record, run
from vllm_depthpar.bench.settings import PARTS, THROUGHPUT, BenchSettings, Load, check
from vllm_depthpar.checkpoint.config import read_config
from vllm_depthpar.cli.types import (
    DTYPES,
    MODEL_HELP,
    PLAN_HELP,
    at_least,
    engine_flags,
    out_file,
    path_or_name,
)
from vllm_depthpar.errors import UserError
from vllm_depthpar.launch.variants import Variant, usual, variants
from vllm_depthpar.plan import resolve
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.predict.cost_model import speedup
from vllm_depthpar.predict.devices import THIS, device_named
from vllm_depthpar.predict.links import LINKS
from vllm_depthpar.predict.machines import Deployment, Workload
from vllm_depthpar.util import files

T = TypeVar("T")


def add(commands: Any) -> None:
    """Register the subcommand."""
    parser = commands.add_parser("bench", help="measure how fast plans are beside plain vLLM")
    parser.add_argument("model", type=path_or_name, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--plans",
        type=_plans,
        metavar="P,...",
        help=f"each {PLAN_HELP}, 'carried' for the checkpoint's own, or 'plain' for vLLM's own "
        "model (plain,auto, or carried)",
    )
    usual_ones = BenchSettings()

    def sizes(name: str, what: str) -> None:
        default = getattr(usual_ones, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=_several(at_least(1)),
            default=default,
            metavar="N,...",
            help=f"{what} ({','.join(map(str, default))})",
        )

    parser.add_argument(
        "--parts",
        type=_several(_part),
        default=PARTS,
        metavar="PART,...",
        help=f"any of {', '.join(PARTS)} (all)",
    )
    parser.add_argument("--rounds", type=at_least(1), default=5, help="(5)")
    sizes("input_lens", "tokens of a prompt, latency and serving")
    parser.add_argument(
        "--output-len",
        type=at_least(2),
        default=usual_ones.output_len,
        metavar="N",
        help=f"tokens of every answer ({usual_ones.output_len})",
    )
    sizes("batches", "sequences at once, throughput")
    sizes("contexts", "tokens of each prompt, throughput")
    parser.add_argument(
        "--rates",
        type=_several(_rate),
        default=usual_ones.rates,
        metavar="R,...",
        help="requests per second, serving; inf: all at once (1,inf)",
    )
    parser.add_argument(
        "--requests",
        type=at_least(1),
        default=usual_ones.requests,
        metavar="N",
        help=f"of a run, serving ({usual_ones.requests})",
    )
    parser.add_argument("--tp", type=at_least(1), default=1, metavar="N", help="ranks (1)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="(auto)")
    parser.add_argument("--eager", action="store_true", help="without torch.compile, CUDA graphs")
    parser.add_argument(
        "--load-format",
        default="auto",
        metavar="F",
        help="'dummy': random weights, for a folder with no more than a config.json (auto)",
    )
    parser.add_argument(
        "--engine-args",
        default="",
        metavar="ARGS",
        help="more flags of vLLM's engine, as one argument: "
        "--engine-args='--gpu-memory-utilization 0.5 ...'",
    )
    parser.add_argument(
        "--one-at-a-time",
        action="store_true",
        help="start each variant for each of its turns: for memory that does not hold all",
    )
    parser.add_argument(
        "--out",
        type=out_file("{stem}.md", "{stem}.png", suffix=".json"),
        metavar="FILE.json",
        help="write the numbers, after every round, and go on with those in it; beside it a "
        "report (.md) and a picture (.png)",
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> str:
    config = read_config(args.model)
    chosen = variants(args.model, args.plans or usual(config), "--plans")
    settings = _settings(args)
    check(settings, chosen, config)
    record = open_record(args.model, chosen, settings, args.out)
    draw = args.out is not None and len(chosen) > 1
    if draw and find_spec("matplotlib") is None:
        print("no picture without matplotlib: pip install 'vllm-depthpar[bench]'", file=sys.stderr)
        draw = False

    def save() -> None:
        if args.out:
            files.write_json(args.out, record)

    run(args.model, chosen, settings, args.rounds, record, save)
    loads = settings.loads()
    record["summary"] = summarize(record, loads)
    if predicted := _predicted(chosen, settings, config, "gpus" in record["hardware"]):
        record["predicted"] = predicted
    report = markdown(record, loads)
    save()
    if args.out:
        files.write_bytes(args.out.with_suffix(".md"), report.encode())
    if draw:
        _draw(record, loads, args.out.with_suffix(".png"))
    return json.dumps(record, indent=2) if args.json else report.rstrip()


def _settings(args: argparse.Namespace) -> BenchSettings:
    """Read the settings that were asked for; raises as `engine_flags`."""
    flags = engine_flags(args.engine_args)
    given = {field.name: getattr(args, field.name) for field in fields(BenchSettings)}
    return BenchSettings(**{**given, "engine_args": flags})


def _predicted(
    chosen: Sequence[Variant], settings: BenchSettings, config: dict[str, Any], on_gpu: bool
) -> dict[str, dict[str, float]]:
    """Predict {load's key: {variant: speed-up of decoding over plain vLLM}} as `depthpar predict`
    does, if this machine was measured for it; between GPUs it would have to know the link."""
    try:
        device = device_named(THIS)
    except UserError:
        return {}
    if settings.tp > 1 and on_gpu:
        return {}
    shape = ModelShape.from_config(config)
    deployment = Deployment(device, LINKS["shm"] if settings.tp > 1 else None, settings.tp)
    found: dict[str, dict[str, float]] = {}
    for load in settings.loads():
        if load.part == THROUGHPUT:
            workload = Workload(load.batch, load.prompt_tokens + settings.output_len // 2)
            found[load.key] = {
                one.label: speedup(shape, resolve(one.spec, shape.layers), deployment, workload)
                for one in chosen
                if one.spec is not None
            }
    return found


def _draw(record: dict[str, Any], loads: Sequence[Load], path: Path) -> None:
    from vllm_depthpar.util import plots

    panels = {
        f"{part}: {figure.title.partition(',')[0]}": {
            load.name: {
                label: found[figure.key]["speedup"]
                for label, found in record["summary"]["loads"][load.key].items()
            }
            for load in loads
            if load.part == part
        }
        for part in PARTS
        for figure in FIGURES[part]
        if figure.key in SHOWN[part] and any(load.part == part for load in loads)
    }
    plots.bars(path, panels, record["summary"]["baseline"], title(record))


def _plans(text: str) -> list[str]:
    """Cut a text at the commas between plans, of which those inside of JSON are none."""
    found, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return [one.strip() for one in found]


def _several(single: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """Make a type for argparse: values between commas, each once."""

    def several(text: str) -> tuple[T, ...]:
        return tuple(dict.fromkeys(single(one.strip()) for one in text.split(",")))

    return several


def _part(text: str) -> str:
    if text not in PARTS:
        raise argparse.ArgumentTypeError(f"{text!r} is unknown; allowed: {', '.join(PARTS)}")
    return text


def _rate(text: str) -> float:
    rate = float(text)
    if not rate > 0:
        raise argparse.ArgumentTypeError(f"{text} is too small; allowed: above 0, or inf")
    return rate
