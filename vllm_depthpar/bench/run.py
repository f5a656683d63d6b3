"""Plans side by side on one machine: rounds in which every variant has its turn.

The variants of a stage are alive at once and run one at a time, or are started anew for each of
their turns. What was measured is written down after every round, and a later run goes on there.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_depthpar.bench.rounds import awake, in_turn, pause
from vllm_depthpar.bench.settings import ENGINES, STAGES, BenchSettings, Load, Setup
from vllm_depthpar.bench.stages import Engines, Running, Servers, Stage
from vllm_depthpar.checkpoint.config import fingerprint, read_config
from vllm_depthpar.errors import UserError
from vllm_depthpar.launch import hardware
from vllm_depthpar.launch.variants import Variant
from vllm_depthpar.util import files, progress
from vllm_depthpar.util.provenance import origin

# {variant's label: {load's key: {figure: value}}}
Round = dict[str, dict[str, dict[str, float]]]
Doing = Callable[[str], AbstractContextManager[None]]


# vLLM's own default is 0.92.
_GPU_SHARE = 0.9


def open_record(
    model: str, variants: Sequence[Variant], settings: BenchSettings, out: Path | None
) -> dict[str, Any]:
    """A record without rounds, or the one in the file `out` to go on with.

    Returns:
        JSON-ready: when, with what and on what; `settings`: everything that the figures depend on;
        `variants`; and of each stage `starts` and `rounds` (see `Round`).

    Raises:
        UserError: the file is no record, or one of other settings.
    """
    begun = origin("depthpar")
    path = Path(model).expanduser()
    chosen = {**asdict(settings), "rates": [f"{rate:g}" for rate in settings.rates]}
    record: dict[str, Any] = {
        **begun,
        "hardware": (found := hardware.inventory()),
        "model": path.name if path.is_dir() else model,
        "settings": {
            "checkpoint": hashlib.sha256(fingerprint(model).encode()).hexdigest()[:16],
            "plans": {one.label: one.digest for one in variants},
            **chosen,
            **begun["versions"],
            "cpu": begun["cpu"],
            **found,
        },
        "variants": [asdict(one) for one in variants],
        "seconds": 0.0,
        "stages": {stage: {"starts": [], "rounds": []} for stage in STAGES},
    }
    record = json.loads(json.dumps(record))  # as it comes from a file
    if out is None or not out.exists():
        return record
    known = files.read_json(out, allowed="a file of depthpar bench, or another --out")
    try:
        old, seconds, stages = dict(known["settings"]), float(known["seconds"]), known["stages"]
        rounds = [stages[stage][of] for stage in STAGES for of in ("starts", "rounds")]
        if not all(isinstance(one, list) for one in rounds):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{out} is not a file of depthpar bench; allowed: another --out") from None
    for key, value in record["settings"].items():
        if old.get(key) != value:
            raise UserError(
                f"{out} has rounds of other settings ({key}: {json.dumps(old.get(key))}, not "
                f"{json.dumps(value)}); allowed: the same command, or another --out"
            )
    return {**record, "seconds": seconds, "stages": stages}


def run(
    model: str,
    variants: Sequence[Variant],
    settings: BenchSettings,
    rounds: int,
    record: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """Measure what a record lacks to so many rounds, and call `save` after each.

    Args:
        record: see `open_record`; grows.

    Raises:
        UserError: vLLM did not start, or ended.
    """
    on_gpu = "gpus" in record["hardware"]
    alive = 1 if settings.one_at_a_time else len(variants)
    gpu_share = _GPU_SHARE / alive if on_gpu else None
    config = read_config(model)
    with progress.step_bar() as bar:
        task = bar.add_task("", total=None)

        @contextmanager
        def doing(what: str) -> Iterator[None]:
            bar.update(task, description=what)
            try:
                yield
            except RuntimeError as error:
                raise UserError(f"{what}: {error}") from error
            bar.advance(task)

        work = []
        for name in STAGES:
            loads = [load for load in settings.loads() if load.stage == name]
            missing = rounds - len(record["stages"][name]["rounds"])
            if loads and missing > 0:
                work.append((name, loads, missing))
        bar.update(task, total=sum(_steps(len(variants), settings, *one[1:]) for one in work))
        for name, loads, missing in work:
            known = record["stages"][name]
            setup = Setup(model, config, settings, loads, gpu_share)
            play = _one_at_a_time if settings.one_at_a_time else _at_once
            numbers = range(rounds - missing, rounds)
            with ExitStack() as stack:
                begun = time.monotonic()
                stage: Stage
                with doing(f"starting {name}"):
                    stage = Engines(setup) if name == ENGINES else Servers(setup, stack)
                starts = known["starts"]
                played = play(stage, variants, loads, numbers, starts, not on_gpu, doing)
                for found in stack.enter_context(closing(played)):
                    known["rounds"].append(found)
                    now = time.monotonic()
                    record["seconds"] += now - begun
                    begun = now
                    save()


def _steps(variants: int, settings: BenchSettings, loads: Sequence[Load], rounds: int) -> int:
    if settings.one_at_a_time:
        return 1 + variants * rounds * (1 + 2 * len(loads))
    return 1 + variants * (1 + (1 + rounds) * len(loads))


def _at_once(
    stage: Stage,
    variants: Sequence[Variant],
    loads: Sequence[Load],
    numbers: range,
    starts: list[dict[str, Any]],
    alone: bool,
    doing: Doing,
) -> Generator[Round, None, None]:
    """The rounds of these numbers, and one before them that does not count.

    Args:
        alone: let only the one that is measured run.
    """
    with ExitStack() as stack:
        running: list[tuple[str, Running]] = []
        for one in variants:
            with doing(f"starting {one.label}"):
                process, took = stage.start(one, stack)
            starts.append({"label": one.label, **took})
            running.append((one.label, process))
            if alone:
                pause(process)
        for number in (numbers.start - 1, *numbers):
            found: Round = {one.label: {} for one in variants}
            for load in loads:
                for label, process in in_turn(running, number):
                    running_alone = awake(process) if alone else nullcontext()
                    with doing(f"{label}: {load.key}"), running_alone:
                        found[label][load.key] = stage.measure(process, load, number + 1)
            if number in numbers:
                yield found


def _one_at_a_time(
    stage: Stage,
    variants: Sequence[Variant],
    loads: Sequence[Load],
    numbers: range,
    starts: list[dict[str, Any]],
    _: bool,
    doing: Doing,
) -> Generator[Round, None, None]:
    """The rounds of these numbers; what is started goes through the loads once before it counts."""
    for number in numbers:
        found: Round = {one.label: {} for one in variants}
        for one in in_turn(variants, number):
            with ExitStack() as stack:
                with doing(f"starting {one.label}"):
                    process, took = stage.start(one, stack)
                starts.append({"label": one.label, **took})
                for seed in (0, number + 1):
                    for load in loads:
                        with doing(f"{one.label}: {load.key}"):
                            found[one.label][load.key] = stage.measure(process, load, seed)
        yield found
