"""What the benchmarks share: options, plans by name, and where a report is from."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vllm_depthpar.cli.types import at_least
from vllm_depthpar.errors import UserError
from vllm_depthpar.launch import hardware
from vllm_depthpar.launch.variants import PLAIN, Variant, variants
from vllm_depthpar.util.provenance import origin

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent


def beside_plain(model: str, labels: Iterable[str]) -> list[Variant]:
    """Plain vLLM, which is always one and the first, and the plans for the checkpoint `model`.

    Raises:
        UserError: see `vllm_depthpar.launch.variants`.
    """
    return variants(model, [PLAIN, *labels], "--plans")


def environment(variant: Variant, tp: int = 1) -> dict[str, str]:
    """For an engine of `tp` ranks."""
    return {**hardware.environment(tp, bool(hardware.gpus())), **variant.env}


def facts() -> dict[str, Any]:
    """When, with what and on what: JSON-ready."""
    return {**origin(program()), **hardware.inventory()}


def program() -> str:
    """How the script that runs is run, from the checkout's root."""
    return f"python {Path(sys.argv[0]).resolve().relative_to(CHECKOUT)}"


def arguments(description: str, rounds: int = 5) -> argparse.ArgumentParser:
    """A parser with what all benchmarks take; `rounds` if the user names no other number."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--plans", nargs="+", default=["auto"], metavar="PLAN", help="JSON, a plan file, auto, ..."
    )
    parser.add_argument("--rounds", type=at_least(1), default=rounds, help=f"({rounds})")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="(bfloat16)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON")
    return parser


def result(name: str) -> dict[str, Any]:
    """What was measured before, by its folder and name: "network/cluster-eager-plain"."""
    folder, _, file = name.partition("/")
    read: dict[str, Any] = json.loads((HERE / folder / "results" / f"{file}.json").read_text())
    return read


MODEL_HELP = "checkpoint (the bundled SmolLM2-135M-Instruct)"


def run_main(main: Callable[[], None]) -> None:
    """Run a benchmark; exit code 1, with one line for wrong input, if it cannot be run."""
    try:
        main()
    except (UserError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
