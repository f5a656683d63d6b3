"""The command `depthpar`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from vllm_depthpar import __version__, picture, plan, sources
from vllm_depthpar.bundled import BundledModelError, prepare
from vllm_depthpar.ladder_checkpoint import MODEL_TYPE
from vllm_depthpar.plan import PlanError
from vllm_depthpar.shape import ModelShape


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code (1, with one line on stderr, for wrong input)."""
    args = _parser().parse_args(argv)
    try:
        print(args.run(args))
    except (PlanError, BundledModelError) as error:
        print(f"depthpar: error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # `depthpar ... | head`: not an error, and Python must not report it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="depthpar", description="Restructure the depth of Llama models for vLLM."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    plans = commands.add_parser("plan", help="show plans and their schema")
    plan_commands = plans.add_subparsers(required=True, metavar="COMMAND")
    show = plan_commands.add_parser("show", help="draw a plan for a model")
    show.add_argument("model", metavar="MODEL", help="folder or hub name of a Llama checkpoint")
    show.add_argument("--plan", metavar="P", help="JSON, a plan file, 'auto' or 'identity'")
    show.add_argument("--tp", type=_positive, default=1, metavar="N", help="tensor-parallel size")
    show.add_argument("--json", action="store_true", help="print the numbers as JSON")
    show.set_defaults(run=_plan_show)
    schema = plan_commands.add_parser("schema", help="print the JSON Schema of a plan")
    schema.set_defaults(run=lambda _: json.dumps(plan.json_schema(), indent=2))

    bundled = commands.add_parser("bundled", help="prepare SmolLM2-135M-Instruct, print its folder")
    bundled.set_defaults(run=_bundled)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def _plan_show(args: argparse.Namespace) -> str:
    config = read_config(args.model)
    override = plan.load(args.plan) if args.plan else None
    chosen, source = sources.choose(config, override, os.environ.get(sources.ENV), "--plan")
    shape = ModelShape.from_config(config)
    if args.json:
        return json.dumps({**picture.facts(chosen, shape, args.tp), "source": source}, indent=2)
    return picture.draw(chosen, shape, args.tp, source)


def _bundled(_: argparse.Namespace) -> str:
    return str(prepare())


def read_config(model: str) -> dict[str, Any]:
    """The parsed config.json of a checkpoint.

    Args:
        model: its folder, or its name on the Hugging Face hub (cached or downloaded).

    Raises:
        PlanError: there is none, or it is not a Llama's.
    """
    path = Path(model).expanduser() / "config.json"
    if not path.exists():
        path = _download_config(model)
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PlanError(f"{path} can't be read ({error}); allowed: a config.json") from None
    if not isinstance(config, dict) or config.get("model_type") not in ("llama", MODEL_TYPE):
        kind = config.get("model_type") if isinstance(config, dict) else None
        raise PlanError(f"model_type {kind!r} of {model} is not supported; allowed: 'llama'")
    return config


def _download_config(model: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, "config.json"))
    except Exception as error:
        raise PlanError(
            f"no checkpoint at {model!r} ({type(error).__name__}); "
            f"allowed: a folder with config.json, or a model of the hub"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
