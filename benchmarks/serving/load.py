"""Load time and peak memory of plans beside plain vLLM's.

Every measurement has a process of its own, in turns: A B C, B C A, ... It covers the step in
which vLLM's model loader makes the model, reads the weights and brings them into the form that the
kernels take (`BaseModelLoader.load_model`), and nothing before or after. The part of it up to the
last weight read, which is where plans do something of their own, is also reported alone: what
follows is vLLM's packing for its CPU kernels and two full garbage collections.

Memory: vLLM maps safetensors files into memory, and pages of a mapped file count as resident
although they are the system's file cache, which it takes back when it needs memory. How many are
resident says more about the system than about the program. So what is compared is *anonymous*
memory (RssAnon in /proc/PID/status), which a process cannot do without: its peak during the step,
read every few milliseconds from outside, less what it was just before. The peak of all resident
memory (VmHWM, kept by the kernel) is reported beside it. The files are in the system's cache.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout: this is a script

from benchmarks import common
from vllm_depthpar.bench import memory
from vllm_depthpar.bench.memory import MIB
from vllm_depthpar.bench.rounds import in_turn, spread, summary
from vllm_depthpar.bench.turns import steps
from vllm_depthpar.checkpoint import bundled
from vllm_depthpar.checkpoint.config import read_config
from vllm_depthpar.launch.engine import Worker, flags_of, make_engine
from vllm_depthpar.launch.variants import PLAIN, Variant
from vllm_depthpar.plan import resolve
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.util import markdown

SAMPLE_SECONDS = 0.005
# The whole step, and from its start to the last weight read.
PARTS = ("load", "reading")
# What the plugin promises, beside plain vLLM.
MOST_TIME = 1.15
MOST_LAYERS = 2


def main() -> None:
    """Measure, print a table, write the JSON."""
    args = _parser().parse_args()
    with ExitStack() as stack:
        if args.random:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()), "random-llama")
            model = str(_write_random(folder))
        else:
            model = str(args.model or bundled.prepare())
        variants = common.beside_plain(model, args.plans)
        shape = ModelShape.from_config(read_config(model)).in_dtype(args.dtype)
        plans = {one.label: one.digest for one in variants}
        # The random one is always the same, in files that are new each time.
        record = common.open_record(args, *([] if args.random else [model]), plans=plans)
        save = common.saver(record, args.out)
        _measure(model, variants, shape, args.rounds, record, save)
    layer = shape.layer_parameters() * shape.dtype_bytes
    record |= {
        "model": Path(model).name,
        "dtype": args.dtype,
        "layer_bytes": layer,
        "sample_seconds": SAMPLE_SECONDS,
        "variants": [{"label": one.label, "plan": one.plan} for one in variants],
    }
    for part in PARTS:
        rows = []
        for one, entry in zip(variants, record["variants"], strict=True):
            values, plain = (_values(record, label, part) for label in (one.label, PLAIN))
            against = {
                "ratio": [a / b for a, b in zip(values["seconds"], plain["seconds"], strict=True)],
                "layers_above": [
                    (a - b) / layer for a, b in zip(values["peak"], plain["peak"], strict=True)
                ],
            }
            entry[part] = {key: summary(each) for key, each in (values | against).items()}
            peak, resident = (
                spread([each / MIB for each in values[key]], ".0f")
                for key in ("peak", "resident_peak")
            )
            ratio, above = (spread(each) if one.spec else "" for each in against.values())
            name = f"`{one.label}`"
            rows.append([name, one.plan, spread(values["seconds"]), ratio, peak, above])
            rows[-1].append(resident)
        header = [part, "blocks", "s", "ratio", "peak, MiB", "layers above plain"]
        print(markdown.table([*header, "resident peak, MiB"], rows), end="\n\n")
    print(
        f"{Path(model).name}, {args.rounds} rounds, median (min to max). Peak: anonymous memory "
        f"above what it was before; one layer is {layer / MIB:.1f} MiB. Promised: load at most "
        f"{MOST_TIME} times plain's, peak at most {MOST_LAYERS} layers above plain's."
    )
    save()


Measurement = dict[str, dict[str, float]]  # one of PARTS -> seconds, peak, resident_peak


def _values(record: dict[str, Any], label: str, part: str) -> dict[str, list[float]]:
    figures = ("seconds", "peak", "resident_peak")
    return {name: common.figures_of(record, label, part, name) for name in figures}


def _measure(
    model: str,
    variants: list[Variant],
    shape: ModelShape,
    rounds: int,
    record: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """Add what is missing to so many rounds: {label: the measurement}."""
    missing = range(len(record["rounds"]), rounds)
    if not missing:
        return
    memory.check({one.label: _memory_bytes(one, shape) for one in variants}, alive=1)
    options = {"dtype": record["settings"]["dtype"]}
    with steps(1 + len(missing) * len(variants)) as bar:
        with bar.doing("reading the files once"):
            measure(variants[0], model, options)  # not counted: brings the files into the cache
        for number in missing:
            found: dict[str, Measurement] = {}
            for one in in_turn(variants, number):
                with bar.doing(one.label):
                    found[one.label] = measure(one, model, options)
            record["rounds"].append(found)
            save()


def _memory_bytes(variant: Variant, shape: ModelShape) -> int:
    plan = resolve(variant.spec or "identity", shape.layers)
    return memory.estimate(shape, plan, tp=1, kv_bytes=0, processes=1)  # it ends before it has any


def measure(variant: Variant, model: str, options: dict[str, Any]) -> Measurement:
    """Load once, in a new process: seconds, and bytes of memory above those before the load.

    `peak` is anonymous memory, `resident_peak` all resident memory.
    """
    env = common.environment(variant)
    flags = [*variant.flags, *flags_of(options), "--enforce-eager", "--max-model-len", "256"]
    worker = Worker(variant.label, load, model, flags, env=env)
    try:
        _, before = worker.receive()
        result, peak = {}, 0
        for part in reversed(PARTS):  # the shorter one ends first
            while not worker.connection.poll(SAMPLE_SECONDS):
                peak = max(peak, memory.of_process(worker.process.pid).get("RssAnon", 0))
            seconds, after = worker.receive()
            peak = max(peak, after["RssAnon"])
            result[part] = {
                "seconds": seconds,
                "peak": peak - before["RssAnon"],
                "resident_peak": after["VmHWM"] - before["VmRSS"],
            }
        return result
    finally:
        worker.stop()


def load(connection: Connection, model: str, flags: list[str]) -> None:
    """Load a model; send (seconds, memory) before it, after reading weights, and at the end."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    inner, inner_read = BaseModelLoader.load_model, DefaultModelLoader.load_weights
    start = 0.0

    def load_weights(*args: Any, **kwargs: Any) -> None:
        inner_read(*args, **kwargs)
        connection.send((time.perf_counter() - start, memory.of_process("self")))

    def load_model(*args: Any, **kwargs: Any) -> None:
        nonlocal start
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        connection.send((0.0, memory.of_process("self")))
        start = time.perf_counter()
        inner(*args, **kwargs)
        connection.send((time.perf_counter() - start, memory.of_process("self")))
        sys.exit()  # the engine is of no use here

    BaseModelLoader.load_model = load_model
    DefaultModelLoader.load_weights = load_weights
    make_engine(model, flags)


def _write_random(folder: Path) -> Path:
    """A seeded random Llama of 1.1 GB in bf16: with a small model constant costs are most."""
    sys.path.insert(0, str(common.CHECKOUT / "tests" / "harness"))
    import torch
    from models import write_llama

    return write_llama(
        folder,
        layers=12,
        hidden=2048,
        heads=16,
        kv_heads=8,
        head_dim=128,
        intermediate=5632,
        vocab=8192,
        dtype=torch.bfloat16,
    )


def _parser() -> argparse.ArgumentParser:
    parser = common.arguments("Load time and peak memory of plans beside plain vLLM's.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("model", nargs="?", help=common.MODEL_HELP)
    which.add_argument("--random", action="store_true", help="a random Llama of 1.1 GB, 12 layers")
    return parser


if __name__ == "__main__":
    common.run_main(main)
