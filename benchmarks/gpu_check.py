"""What nobody has run on a GPU yet, in ten minutes on one: python benchmarks/gpu_check.py

Four parts; the commands that they run are printed, and can be run again by themselves:

- verify: `depthpar verify` of each kind of plan on a random model, on one rank and on as many as
  there are GPUs for (2, 4): folded blocks, dealt ones, ladders whose all-reduces run on a side
  stream; in CUDA graphs of whole passes, in graphs of pieces, and without.
- capture: the side stream's all-reduces in a CUDA graph of their own (a test).
- speed: `depthpar bench` of plain vLLM and of half the layers in pairs, one rank, at published
  sizes of 1B, 3B and 7B, random weights.
- metrics: what an engine publishes of its forward passes and all-reduces.

Prints a table of what was found, and of what was skipped and why; all numbers are written to
gpu-check/found.json after every check. Exit code 1 if anything is wrong. `--device cpu` runs the
same on tiny sizes and without graphs: a test of this script, and no measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/harness"))  # for `models`
sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout: this is a script

import torch
from models import write_llama

from benchmarks import common
from benchmarks.cost_model import shapes
from vllm_depthpar.bench.engine_load import run_batch
from vllm_depthpar.errors import UserError
from vllm_depthpar.launch import hardware
from vllm_depthpar.launch.engine import Worker, flags_of, make_engine
from vllm_depthpar.launch.variants import variants
from vllm_depthpar.metrics import metric_files
from vllm_depthpar.util import files, markdown

VERIFY, CAPTURE, SPEED, METRICS = PARTS = ("verify", "capture", "speed", "metrics")
OK, WRONG, SKIPPED = "ok", "WRONG", "skipped"
SHAPES = ("llama-3.2-1b", "llama-3.2-3b", "llama-2-7b")
# Of the model that is verified, which CPUs and one to four GPUs can share.
SIZES: dict[str, dict[str, Any]] = {
    "cuda": {"layers": 12, "hidden": 1024, "heads": 16, "kv_heads": 8, "head_dim": 64}
    | {"intermediate": 2816, "vocab": 8192, "dtype": torch.bfloat16},
    "cpu": {"layers": 6, "dtype": torch.float32},
}
# Of all graphs that vLLM captures, those that nine sequences and one can be in.
GRAPHS = "--cudagraph-capture-sizes 1 2 4 8 16"
TOKENS = 48  # that the engine whose metrics are read generates


@dataclass
class Row:
    """One line of the table.

    Attributes:
        check: what was run, as "verify, 2 ranks".
        what: of it; a plan, mostly.
        result: one of OK, WRONG, SKIPPED.
        found: numbers or the reason, for people.
        command: what to give to see it again.
        numbers: JSON-ready, all of them.
    """

    check: str
    what: str
    result: str
    found: str
    command: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)


def plans(layers: int) -> dict[str, str]:
    """One plan of each kind, by what it is, for a number of layers that 6 divides."""
    pairs = [layers // 3, layers]
    specs: dict[str, dict[str, Any]] = {
        "pairs": {"pair": pairs},
        "groups of 3": {"pair": [0, layers // 2], "group": 3},
        "ladder": {"ladder": "all"},
        "ladder over pairs": {"pair": pairs, "ladder": "all"},
        "skip": {"skip": {"speedup": 1.5}},
        "one all-reduce a block, and halves": {
            "drop_sync": [0, 1],
            "parallel_residual": [layers - 2],
            "drop_attention": [2],
            "drop_mlp": [3],
        },
        "desync": {"desync": {"every": 4}},
    }
    return {kind: json.dumps(spec) for kind, spec in specs.items()}


@dataclass(frozen=True)
class Machine:
    """What is checked, and where files go.

    Attributes:
        device: "cuda" or "cpu".
        ranks: that there are devices for.
        work: a folder for what commands read and write.
    """

    device: str
    ranks: int
    work: Path

    @property
    def model(self) -> Path:
        """The folder of the random model."""
        return self.work / "model"

    @property
    def layers(self) -> int:
        """How many the model has."""
        return int(SIZES[self.device]["layers"])

    @property
    def dtype(self) -> list[str]:
        """The flag for the model's."""
        return ["--dtype", str(SIZES[self.device]["dtype"]).removeprefix("torch.")]


def run(command: list[str], env: Mapping[str, str] | None = None) -> tuple[str, str]:
    """Run Python, with these arguments.

    Returns:
        The command as a shell takes it, and what it said last if it failed, else "".
    """
    given = [f"{name}={value}" for name, value in (env or {}).items()]
    shown = shlex.join([*given, "python", *command])
    print(shown, file=sys.stderr)
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
    )
    if not done.returncode:
        return shown, ""
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return shown, lines[-1] if lines else f"exit code {done.returncode}, and no word"


def verify(
    machine: Machine,
    check: str,
    kinds: Mapping[str, str],
    ranks: int,
    *,
    eager: bool = False,
    engine_args: str = GRAPHS,
    env: Mapping[str, str] | None = None,
) -> Iterator[Row]:
    """Serve plans on so many ranks, and compare each with the reference.

    Args:
        kinds: JSON of plans, by what they are.
    """
    eager = eager or machine.device == "cpu"
    out = machine.work / "verify.json"
    out.unlink(missing_ok=True)
    command = ["-m", "vllm_depthpar.cli", "verify", str(machine.model), *machine.dtype]
    command += ["--tp", str(ranks)]
    for spec in kinds.values():
        command += ["--plan", spec]
    command += ["--eager"] if eager else [f"--engine-args={engine_args}"]
    shown, words = run([*command, "--out", str(out)], env)
    if not out.exists():
        yield Row(check, ", ".join(kinds), WRONG, words, shown)
        return
    for kind, row in zip(("plain", *kinds), json.loads(out.read_text())["rows"], strict=True):
        prompt = row["prompt"]["difference"]["mean"], row["prompt"]["explained"]["mean"]
        generated = row["generated"]["difference"]["mean"]
        found = (
            f"{row['mode']}; off by {prompt[0]:.1e} nats in prompts, of which rounding explains "
            f"{prompt[1]:.1e}, {generated:.1e} in answers"
        )
        fault = row["fault"]
        yield Row(check, kind, WRONG if fault else OK, fault or found, shown, row)


def verified(machine: Machine) -> Iterator[Row]:
    """Check all kinds of plans, on as many ranks as there are devices for."""
    kinds = plans(machine.layers)
    ladders = {kind: spec for kind, spec in kinds.items() if "ladder" in kind}
    for ranks in (1, 2, 4):
        check = f"verify, {ranks} rank{'s' * (ranks > 1)}"
        if ranks > machine.ranks:
            yield Row(check, "all kinds", SKIPPED, f"{machine.ranks} devices here")
        else:
            yield from verify(machine, check, kinds, ranks)
    if machine.device == "cpu":
        yield Row("verify, graphs of pieces", "ladders", SKIPPED, "CUDA graphs need a GPU")
        return
    ranks = min(2, machine.ranks)
    of = f"{ranks} rank{'s' * (ranks > 1)}"
    yield from verify(machine, f"verify, {of}, eager", ladders, ranks, eager=True)
    pieces = f'{GRAPHS} --compilation-config \'{{"cudagraph_mode": "PIECEWISE"}}\''
    check = f"verify, {of}, graphs of pieces"
    yield from verify(machine, check, ladders, ranks, engine_args=pieces)
    if ranks == 1:
        yield Row("verify, side stream", "ladders", SKIPPED, "one GPU has no all-reduce")
        return
    for name in ("VLLM_ALLREDUCE_USE_FLASHINFER_PCIE_IPC", "VLLM_USE_NCCL_SYMM_MEM"):
        if "FLASHINFER" in name and not find_spec("flashinfer"):
            yield Row(f"verify, {name}=1", "ladders", SKIPPED, "flashinfer is not installed")
        else:
            yield from verify(machine, f"verify, {name}=1", ladders, ranks, env={name: "1"})


def captured(machine: Machine) -> Iterator[Row]:
    """Capture the side stream's all-reduces in a CUDA graph, as a test does."""
    check, what = "capture", "all-reduce on a side stream"
    if machine.device == "cpu":
        yield Row(check, what, SKIPPED, "CUDA graphs need a GPU")
    elif not find_spec("pytest"):
        yield Row(check, what, SKIPPED, "pytest is not installed (extra dev)")
    else:
        test = os.path.relpath(common.CHECKOUT / "tests/numerics/test_reductions.py")
        shown, words = run(["-m", "pytest", "-q", test, "-k", "cuda_graph"])
        yield Row(check, what, WRONG if words else OK, words or "replays twice, right", shown)


def measured(machine: Machine) -> Iterator[Row]:
    """Measure plain vLLM and half of the layers in pairs, at published sizes, on one rank."""
    sizes = {name: shapes.config(name) for name in SHAPES}
    if machine.device == "cpu":
        yield Row("speed", ", ".join(SHAPES), SKIPPED, "no GPU; a tiny shape in their place")
        small = {"num_hidden_layers": 8, "hidden_size": 128, "vocab_size": 1000}
        small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
        sizes = {"tiny": shapes.config("smollm2-135m") | small}
    for name, config in sizes.items():
        model, out = machine.work / name, machine.work / f"{name}.json"
        model.mkdir(exist_ok=True)
        out.unlink(missing_ok=True)  # it would go on with what is there
        files.write_json(model / "config.json", config)
        plain, _, half, _ = shapes.plans(config["num_hidden_layers"])
        command = ["-m", "vllm_depthpar.cli", "bench", str(model), *machine.dtype]
        command += [
            "--plans",
            f"{plain},{half}",
            "--parts",
            "throughput",
            "--batches",
            "1,8",
            "--load-format",
            "dummy",
        ]
        command += ["--one-at-a-time", "--rounds", "1", "--out", str(out)]
        command += ["--eager", "--output-len", "8"] if machine.device == "cpu" else []
        shown, words = run(command)
        if words:
            yield Row("speed", name, WRONG, words, shown)
            continue
        report = json.loads(out.read_text())
        for load, of_load in report["summary"]["loads"].items():
            key = "decode_tokens_per_second"
            before, after = of_load[plain][key], of_load[half][key]
            found = (
                f"{load}: {before['median']:.0f} tokens/s plain, {after['median']:.0f} with "
                f"{half}, {after['speedup']['median']:.2f} times as fast"
            )
            yield Row("speed", name, OK, found, shown, {"load": load, **of_load})


def published(machine: Machine) -> Iterator[Row]:
    """Read what an engine publishes: with graphs, and where there are ranks for it a ladder's
    all-reduces without."""
    of_ladder = plans(machine.layers)["ladder"]
    modes = [(1, False)] if machine.device == "cuda" else []
    modes += [(min(2, machine.ranks), True)]
    for ranks, eager in modes:
        check = f"metrics, {ranks} rank{'s' * (ranks > 1)}, {'eager' if eager else 'CUDA graphs'}"
        (one,) = variants(str(machine.model), [of_ladder])
        flags = [*one.flags, *machine.dtype, "--max-model-len", "256"]
        flags += flags_of({"tensor_parallel_size": ranks, "enforce_eager": eager})
        flags += [] if eager else shlex.split(GRAPHS)
        env = {**common.environment(one, ranks), metric_files.ENV: "1"}
        worker = Worker(check, publish, str(machine.model), flags, env=env)
        try:
            numbers = worker.receive()
        except RuntimeError as error:
            yield Row(check, "ladder", WRONG, str(error).splitlines()[-1])
            continue
        finally:
            worker.stop()
        yield judged(check, numbers, timed=eager and ranks > 1)


def publish(connection: Connection, model: str, flags: list[str]) -> None:
    """Be an engine's process: generate for two sequences, and send the sums of what was published,
    by metric, phase and kind."""
    for folder in (metric_files.FOLDER_ENV, metric_files.VLLM_FOLDER_ENV):
        os.environ.pop(folder, None)  # a server's in whose environment this runs
    engine = make_engine(model, flags)
    from vllm_depthpar import vllm_compat
    from vllm_depthpar.metrics.collector import collect

    run_batch(engine, batch=2, prompt_tokens=32, tokens=TOKENS, vocab=500, seed=0)
    sums = {
        f"{sample.name.removeprefix(metric_files.PREFIX)} {of}": sample.value
        for metric in collect()
        for sample in metric.samples
        if (of := " ".join(sample.labels.get(key, "") for key in ("phase", "kind")).strip())
        and "le" not in sample.labels
    }
    vllm_compat.shut_down(engine)
    connection.send(sums)


def judged(check: str, numbers: dict[str, float], timed: bool) -> Row:
    """Judge what an engine published.

    Args:
        timed: whether its all-reduces have to have been timed.
    """
    count = numbers.get("forward_seconds_count decode", 0.0)
    seconds = numbers.get("forward_seconds_sum decode", 0.0)
    all_reduces = numbers.get("all_reduces_total decode", 0.0)
    exposed, hidden = (
        numbers.get(f"all_reduce_seconds_total decode {kind}", 0.0)
        for kind in ("exposed", "hidden")
    )
    found = f"{count:.0f} decoding passes"
    fault = None
    if count < TOKENS - 1:  # the prefill's pass makes the first
        fault = f"{found}, fewer than tokens"
    else:
        found += f" of {1e3 * seconds / count:.2f} ms, "
        if all_reduces:
            found += (
                f"{all_reduces:.0f} all-reduces, {1e6 * exposed / all_reduces:.0f} us of each "
                f"exposed, {1e6 * hidden / all_reduces:.0f} us hidden"
            )
        else:
            found += "no all-reduces timed"
        if timed != bool(all_reduces):
            fault = f"{found}, which {'should' if timed else 'cannot'} be"
        elif exposed + hidden > seconds:
            fault = f"{found}: longer than the passes"
    return Row(check, "ladder", WRONG if fault else OK, fault or found, numbers=numbers)


RUN: dict[str, Callable[[Machine], Iterator[Row]]] = {
    VERIFY: verified,
    CAPTURE: captured,
    SPEED: measured,
    METRICS: published,
}


def main() -> None:
    """Check, print the table, write the JSON.

    Raises:
        UserError: there is no GPU.
        RuntimeError: something is wrong.
    """
    args = _parser().parse_args()
    names = hardware.gpus()
    device = args.device or ("cuda" if names else "cpu")
    if device == "cuda" and not names:
        raise UserError("--device cuda: there is no GPU here; allowed: --device cpu")
    report: dict[str, Any] = {**common.facts(), "device": device, "seconds": 0.0, "rows": []}
    begun = time.monotonic()
    rows: list[Row] = []
    machine = Machine(device, len(names) if device == "cuda" else 2, args.out)
    machine.model.mkdir(parents=True, exist_ok=True)
    write_llama(machine.model, **SIZES[device])
    for part in PARTS:
        for row in RUN[part](machine) if part in args.parts else left_out(part):
            print(f"{row.check}: {row.what}: {row.result}: {row.found}", file=sys.stderr)
            rows.append(row)
            report["rows"].append(asdict(row))
            report["seconds"] = time.monotonic() - begun
            files.write_json(args.out / "found.json", report)
    cells = [[row.check, row.what, row.result, row.found] for row in rows]
    print(markdown.table(["check", "of", "", "found"], cells))
    took = f"{report['seconds'] / 60:.0f} minutes"
    where = args.out / "found.json"
    print(f"\n{', '.join(names) or 'no GPU'}; {took}; all numbers and commands: {where}")
    if wrong := [row for row in rows if row.result == WRONG]:
        raise RuntimeError(f"{len(wrong)} of {len(rows)} are wrong; the first: {wrong[0].check}")


def left_out(part: str) -> Iterator[Row]:
    """Say that a part was not asked for."""
    yield Row(part, "", SKIPPED, "not among --parts")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Check on a GPU what was never run on one.")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="(cuda where there is a GPU)")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        metavar="PART",
        help=f"any of {', '.join(PARTS)} (all)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-check"), metavar="FOLDER", help="(gpu-check)"
    )
    return parser


if __name__ == "__main__":
    common.run_main(main)
