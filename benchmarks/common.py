"""What the benchmarks share: options, plans by name, and a report that grows round by round."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vllm_depthpar.bench import turns
from vllm_depthpar.bench.record import go_on, timed
from vllm_depthpar.checkpoint.config import fingerprint
from vllm_depthpar.cli.types import at_least
from vllm_depthpar.errors import UserError
from vllm_depthpar.launch import hardware
from vllm_depthpar.launch.variants import PLAIN, Variant, variants
from vllm_depthpar.util import files
from vllm_depthpar.util.provenance import origin

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent
MODEL_HELP = "checkpoint (the bundled SmolLM2-135M-Instruct)"
# Options on which no measurement depends.
_NO_SETTINGS = ("model", "out", "rounds", "parts")
# What `take_turns` fills.
NO_ROUNDS: dict[str, Any] = {"starts": [], "rounds": []}

V = TypeVar("V", bound=turns.Labelled)
L = TypeVar("L", bound=turns.Keyed)
R = TypeVar("R", bound=turns.Running)


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


def result(name: str) -> dict[str, Any]:
    """What was measured before, by its folder and name: "network/cluster-eager-plain"."""
    folder, _, file = name.partition("/")
    read: dict[str, Any] = json.loads((HERE / folder / "results" / f"{file}.json").read_text())
    return read


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
    add_out(parser)
    return parser


def add_out(parser: argparse.ArgumentParser) -> None:
    """Add --out, of a benchmark that goes on with what is in it."""
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the numbers as JSON, as they come, and go on with those in it",
    )


def add_one_at_a_time(parser: argparse.ArgumentParser) -> None:
    """Add --one-at-a-time."""
    parser.add_argument(
        "--one-at-a-time",
        action="store_true",
        help="start each variant for each of its turns: for memory that does not hold all",
    )


def open_record(
    args: argparse.Namespace,
    *checkpoints: str,
    out: Path | None = None,
    empty: Mapping[str, Any] = NO_ROUNDS,
    **settings: object,
) -> dict[str, Any]:
    """A report without rounds, or the one in the file to go on with.

    Args:
        args: the options; all but how much of it is to be measured now are settings.
        checkpoints: folders or hub names that are run.
        out: the file, where it is not `args.out`.
        empty: what will be measured, without measurements.
        settings: what else the measurements depend on; JSON-ready.

    Raises:
        UserError: the file is none of this benchmark's, or one of other settings.
    """
    begun = facts()
    given = {name: value for name, value in vars(args).items() if name not in _NO_SETTINGS}
    same = {name: begun[name] for name in begun if name not in ("date", "command", "versions")}
    record = {
        **begun,
        "settings": {
            **{name: _without_folders(value) for name, value in given.items()},
            "checkpoints": [digest(fingerprint(one)) for one in checkpoints],
            **begun["versions"],
            **same,
            **settings,
        },
        "seconds": 0.0,
        **empty,
    }
    return go_on(record, out or args.out, program().removeprefix("python "), ("seconds", *empty))


def digest(value: object) -> str:
    """What settings say of something long, JSON-ready."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _without_folders(value: object) -> object:
    """JSON-ready; of paths their names, as in the command line of a report."""
    if isinstance(value, list | tuple):
        return [_without_folders(one) for one in value]
    if isinstance(value, bool | int | float | None):
        return value
    return Path(str(value)).name if str(value).startswith("/") else str(value)


def saver(record: dict[str, Any], out: Path | None) -> Callable[[], None]:
    """What writes a record into its file, if there is to be one, with its seconds up to now."""
    return timed(record, lambda: files.write_json(out, record) if out else None)


def take_turns(
    stage: turns.Stage[V, L, R],
    variants: Sequence[V],
    loads: Sequence[L],
    known: dict[str, Any],
    rounds: int,
    save: Callable[[], None],
    where: str = "",
    one_at_a_time: bool = False,
) -> None:
    """Measure what is missing to so many rounds, with a bar; see `turns.take`.

    Args:
        where: said before everything that is done, and in errors.
    """
    missing = rounds - len(known["rounds"])
    total = turns.count(len(variants), len(loads), missing, one_at_a_time)
    with turns.steps(total, where) as steps:
        turns.take(
            stage,
            variants,
            loads,
            known,
            rounds,
            save,
            steps,
            alone=True,
            one_at_a_time=one_at_a_time,
        )


def figures_of(known: dict[str, Any], label: str, load: str, figure: str) -> list[float]:
    """One figure of a variant under a load, round by round."""
    return [found[label][load][figure] for found in known["rounds"]]


def run_main(main: Callable[[], None]) -> None:
    """Run a benchmark; exit code 1, with one line for wrong input, if it cannot be run."""
    try:
        main()
    except (UserError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
