"""Devices by name: GPUs by their data sheets, and this machine as it was measured.

What a GPU achieves of its data sheet is in none. The shares are fitted on the ladder authors' runs
of Llama 3 70B on H100s (gpt-fast, compiled, CUDA graphs: `benchmarks/predict_published.py`); that
others reach the same is an assumption, and so is that 50 us a layer are theirs.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from vllm_depthpar.errors import UserError
from vllm_depthpar.predict.machines import Device
from vllm_depthpar.util.files import cache_folder, read_json, write_json
from vllm_depthpar.util.names import nearest_first

# The device that `depthpar predict --calibrate` measures.
THIS = "this"

_BANDWIDTH_ACHIEVED = 0.93
_FLOPS_ACHIEVED = 0.48
_LAYER_SECONDS = 50e-6
# Of the time of an all-reduce: its kernel takes multiprocessors from those that compute. Fitted
# on NCCL's; vLLM's own kernels are assumed to take as many.
GPU_OVERLAP = 0.73

# Name, GB/s of memory, TFLOP/s of dense bf16 products summed in fp32, source.
_DATA_SHEETS = (
    ("h100", 3350, 989, "NVIDIA H100 SXM data sheet"),
    ("h200", 4800, 989, "NVIDIA H200 SXM data sheet"),
    # The data sheet says 8 TB/s; the driver's bus width and clock give this (pytorch/ao#4002).
    ("b200", 7670, 2250, "NVIDIA HGX B200 data sheet, memory as its driver reports"),
    ("a100-80g", 2039, 312, "NVIDIA A100 80GB SXM data sheet"),
    ("a100-40g", 1555, 312, "NVIDIA A100 40GB SXM data sheet"),
    ("l40s", 864, 362, "NVIDIA L40S data sheet"),
    ("l4", 300, 121, "NVIDIA L4 data sheet"),
    ("a10", 600, 125, "NVIDIA A10 data sheet"),
    ("rtx-3090", 936, 71, "NVIDIA GA102 whitepaper"),
    ("rtx-4090", 1008, 165.2, "NVIDIA Ada whitepaper"),
    ("rtx-5090", 1792, 209.5, "NVIDIA RTX Blackwell whitepaper"),
    ("rtx-pro-6000", 1792, 503.8, "NVIDIA RTX PRO 6000 Blackwell data sheet"),
    ("mi300x", 5300, 1307.4, "AMD Instinct MI300X data sheet"),
    # No figure of bf16 is published: an eighth of the petaFLOP of sparse FP4, as of B200s and
    # RTX PRO 6000s.
    ("dgx-spark", 273, 125, "NVIDIA DGX Spark data sheet, FLOP/s derived"),
)


def _gpu(name: str, gigabytes: float, teraflops: float, source: str) -> Device:
    achieved = f"achieved: {_BANDWIDTH_ACHIEVED:.0%} and {_FLOPS_ACHIEVED:.0%}, fitted on H100s"
    return Device(
        name,
        memory_bandwidth=_BANDWIDTH_ACHIEVED * gigabytes * 1e9,
        flops=((1, _FLOPS_ACHIEVED * teraflops * 1e12),),
        layer_seconds=_LAYER_SECONDS,
        overlap=GPU_OVERLAP,
        source=f"{source}: {gigabytes:g} GB/s, {teraflops:g} TFLOP/s; {achieved}",
    )


DEVICES = {row[0]: _gpu(*row) for row in _DATA_SHEETS}

# What an all-reduce takes from a CPU rank, through this package's exchange and, on top, through
# plain vLLM's Gloo: fitted on benchmarks/results/cluster-eager-plain.json, one core a rank.
CPU_REDUCTIONS = {
    "reduce_seconds": 0.31e-3,
    "reduce_bandwidth": 91e6,
    "plain_reduce_seconds": 1.21e-3,
}


def device_named(name: str) -> Device:
    """Find the device of a name: a preset, or `THIS`, which `--calibrate` measured.

    Raises:
        UserError: there is none, or this machine has not been measured.
    """
    if name == THIS:
        return _measured()
    if name in DEVICES:
        return DEVICES[name]
    known = nearest_first(name, (THIS, *DEVICES))
    raise UserError(f"device {name!r} is unknown; allowed: {', '.join(known)}")


def is_measured() -> bool:
    """Say whether this machine has been measured: whether there is a device `THIS`."""
    return _file().exists()


def save(device: Device) -> Path:
    """Keep what was measured as `THIS`; returns the file."""
    fields = asdict(device)
    # What has its default is left out: JSON has no infinity.
    given = {name: value for name, value in fields.items() if value != getattr(Device, name, None)}
    write_json(path := _file(), given)
    return path


def _measured() -> Device:
    path = _file()
    if not path.exists():
        raise UserError(
            f"this machine has not been measured yet; allowed: add --calibrate, or --device with "
            f"one of {', '.join(DEVICES)}"
        )
    fields = read_json(path, allowed="what --calibrate writes")
    try:
        flops = tuple((int(rows), float(rate)) for rows, rate in fields.pop("flops"))
        return Device(**fields, flops=flops)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} can't be read ({type(error).__name__}); allowed: what --calibrate writes"
        ) from None


def _file() -> Path:
    return cache_folder() / "machine.json"
