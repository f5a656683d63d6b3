"""What `depthpar bench` does: plans side by side on one machine, as engines and as servers.

What was measured is written down after every round, and a later run goes on there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_depthpar.bench import memory, turns
from vllm_depthpar.bench.record import go_on, timed
from vllm_depthpar.bench.settings import ENGINES, STAGES, BenchSettings, Load, Setup
from vllm_depthpar.bench.stages import Engines, Servers
from vllm_depthpar.checkpoint.config import fingerprint, read_config
from vllm_depthpar.launch import hardware
from vllm_depthpar.launch.variants import Variant
from vllm_depthpar.util.provenance import origin

# vLLM's own default is 0.92.
_GPU_SHARE = 0.9


def open_record(
    model: str, variants: Sequence[Variant], settings: BenchSettings, out: Path | None
) -> dict[str, Any]:
    """Make a record without rounds, or take the one in the file `out` to go on with.

    Returns:
        JSON-ready: when, with what and on what; `settings`: everything that the figures depend on;
        `variants`; and of each stage `starts` and `rounds` (see `turns.Round`).

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
    return go_on(record, out, "depthpar bench", ("seconds", "stages"))


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
        UserError: vLLM did not start, or ended; or the variants do not fit into memory.
    """
    on_gpu = "gpus" in record["hardware"]
    alive = 1 if settings.one_at_a_time else len(variants)
    gpu_share = _GPU_SHARE / alive if on_gpu else None
    config = read_config(model)
    work = []
    for name in STAGES:
        loads = [load for load in settings.loads() if load.stage == name]
        missing = rounds - len(record["stages"][name]["rounds"])
        if loads and missing > 0:
            setup = Setup(model, config, settings, loads, gpu_share)
            work.append((name, setup, missing))
            if not on_gpu:
                memory.check({one.label: setup.memory_bytes(one) for one in variants}, alive)
    total = sum(
        1 + turns.count(len(variants), len(setup.loads), missing, settings.one_at_a_time)
        for _, setup, missing in work
    )
    keep = timed(record, save)
    with turns.steps(total) as steps:
        for name, setup, _ in work:
            with ExitStack() as stack:
                with steps.doing(f"starting {name}"):
                    stage = _stage(name, setup, stack)
                turns.take(
                    stage,
                    variants,
                    setup.loads,
                    record["stages"][name],
                    rounds,
                    keep,
                    steps,
                    alone=not on_gpu,
                    one_at_a_time=settings.one_at_a_time,
                )


def _stage(name: str, setup: Setup, stack: ExitStack) -> turns.Stage[Variant, Load, Any]:
    return Engines(setup) if name == ENGINES else Servers(setup, stack)
