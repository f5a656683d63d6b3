"""Machines as data: what a device and a link do per second, and what every use of them costs.

A `Device` is one tensor-parallel rank's share of a machine, a `Link` is what joins the ranks. The
numbers are achieved ones. Those of GPUs are a data sheet's times the fraction that was achieved in
the published measurements that `benchmarks/cost_model/predict_published.py` fits; each entry says
which is which, and what is assumed.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from vllm_depthpar.errors import UserError
from vllm_depthpar.util.files import cache_folder, write_json

# The device that `depthpar predict --calibrate` measures.
THIS = "this"


@dataclass(frozen=True)
class Device:
    """One rank's processor and memory.

    Attributes:
        memory_bandwidth: bytes per second that weights are read at, in products with few rows.
        flops: (rows, FLOP/s) of matrix products with so many rows of activations, rows ascending;
            one entry where the number of rows makes no difference.
        layer_seconds: what every decoder layer takes whatever its size: launches, norms, glue.
        step_seconds: what every step takes whatever the model: scheduling, sampling.
        reduce_seconds: what starting and finishing one all-reduce takes from the rank that
            computes, so that nothing hides it.
        reduce_bandwidth: bytes per second of an all-reduce that this rank itself moves, likewise
            hidden by nothing: a CPU's kernel copies on the core that computes.
        plain_reduce_seconds: what an all-reduce takes longer in plain vLLM.
        overlap: the share of an all-reduce's time on the way that a rank can compute in; what it
            lacks to 1 the all-reduce takes from the rank's own processor.
        source: where the numbers are from.
    """

    name: str
    memory_bandwidth: float
    flops: tuple[tuple[int, float], ...]
    layer_seconds: float = 0.0
    step_seconds: float = 0.0
    reduce_seconds: float = 0.0
    reduce_bandwidth: float = math.inf
    plain_reduce_seconds: float = 0.0
    overlap: float = 1.0
    source: str = ""

    def flops_at(self, rows: int) -> float:
        """FLOP/s of products with so many rows; between two known ones time grows evenly."""
        (low, at_low), *others = self.flops
        if rows <= low:
            return at_low
        for high, at_high in others:
            if rows <= high:
                seconds = low / at_low + (rows - low) / (high - low) * (
                    high / at_high - low / at_low
                )
                return rows / seconds
            low, at_low = high, at_high
        return at_low


@dataclass(frozen=True)
class Link:
    """What joins the ranks.

    Attributes:
        latency_seconds: from one rank to another, for a message of no size.
        bandwidth: bytes per second that one rank sends at.
        peer_seconds: what every rank beyond the second adds to the latency of an all-reduce.
        shared_memory: the ranks are processes on the cores of one host, whose all-reduces run over
            its memory on the threads that compute: nothing can hide them.
        source: where the numbers are from.
    """

    name: str
    latency_seconds: float
    bandwidth: float
    peer_seconds: float = 0.0
    shared_memory: bool = False
    source: str = ""

    def all_reduce_seconds(self, size: float, ranks: int) -> float:
        """Time on the way of an all-reduce of `size` bytes between two ranks or more.

        The faster of one step, in which every rank sends all of its term to every other, and two,
        a reduce-scatter and an all-gather.
        """
        latency = self._latency(ranks)
        one = latency + (ranks - 1) * size / self.bandwidth
        two = 2 * latency + 2 * (ranks - 1) / ranks * size / self.bandwidth
        return min(one, two)

    def gather_seconds(self, size: float, ranks: int) -> float:
        """Time on the way until one rank has the `size` bytes of every other."""
        return self._latency(ranks) + (ranks - 1) * size / self.bandwidth

    def _latency(self, ranks: int) -> float:
        return self.latency_seconds + (ranks - 2) * self.peer_seconds


# Constants of GPUs that no data sheet has, fitted on the ladder authors' runs of Llama 3 70B on
# H100s (gpt-fast, compiled, CUDA graphs, NCCL): `benchmarks/cost_model/predict_published.py`. That
# other GPUs reach the same shares is an assumption. vLLM's own all-reduce kernels for small tensors
# are said to be faster than NCCL; where they run, a link's latency here is too high.
_BANDWIDTH_ACHIEVED = 0.93
_FLOPS_ACHIEVED = 0.48
_LAYER_SECONDS = 50e-6
GPU_OVERLAP = 0.73
_NVLINK_ACHIEVED = 0.89
_NVLINK_LATENCY, _NVLINK_PEER = 12.1e-6, 1.9e-6
_STAGED_LATENCY, _STAGED_PEER = 19.5e-6, 8.1e-6
_STAGED_BANDWIDTH = 228e9


def _gpu(name: str, bandwidth: float, flops: float, source: str) -> Device:
    """A GPU by its data sheet: bytes per second, and dense bf16 FLOP/s."""
    return Device(
        name,
        memory_bandwidth=_BANDWIDTH_ACHIEVED * bandwidth,
        flops=((1, _FLOPS_ACHIEVED * flops),),
        layer_seconds=_LAYER_SECONDS,
        overlap=GPU_OVERLAP,
        source=f"{source}; achieved: {_BANDWIDTH_ACHIEVED:.0%} and {_FLOPS_ACHIEVED:.0%}",
    )


def _nvlink(name: str, both_ways: float, source: str) -> Link:
    """NVLink by its data sheet, which counts bytes per second in both directions."""
    return Link(
        name,
        _NVLINK_LATENCY,
        _NVLINK_ACHIEVED * both_ways / 2,
        _NVLINK_PEER,
        source=f"{source}; latency and {_NVLINK_ACHIEVED:.0%} of bandwidth as fitted for H100",
    )


def _pcie(name: str, bandwidth: float, source: str) -> Link:
    """PCIe x16, GPUs without peer to peer; bytes per second one way."""
    return Link(
        name,
        _STAGED_LATENCY,
        # Assumed: every byte goes through the host's memory, in over one bus and out over another.
        bandwidth / 2,
        _STAGED_PEER,
        source=f"{source}, half of it; latency as fitted with NCCL's peer to peer off",
    )


DEVICES = {
    device.name: device
    for device in (
        _gpu("h100", 3.35e12, 989e12, "NVIDIA H100 SXM data sheet: 3.35 TB/s, 989 TFLOP/s"),
        _gpu("h200", 4.8e12, 989e12, "NVIDIA H200 SXM data sheet: 4.8 TB/s, 989 TFLOP/s"),
        _gpu(
            "a100-80g", 2.039e12, 312e12, "NVIDIA A100 80GB SXM data sheet: 2.039 TB/s, 312 TFLOP/s"
        ),
        _gpu(
            "a100-40g", 1.555e12, 312e12, "NVIDIA A100 40GB SXM data sheet: 1.555 TB/s, 312 TFLOP/s"
        ),
    )
}

# The latency of Ethernet is an assumption: an ordinary switch and the kernel's TCP.
LINKS = {
    link.name: link
    for link in (
        _nvlink("nvlink2", 300e9, "NVIDIA V100 data sheet: 300 GB/s"),
        _nvlink("nvlink3", 600e9, "NVIDIA A100 data sheet: 600 GB/s"),
        _nvlink("nvlink4", 900e9, "NVIDIA H100 data sheet: 900 GB/s"),
        _nvlink("nvlink5", 1800e9, "NVIDIA B200 data sheet: 1.8 TB/s"),
        Link(
            "p2p-off",
            _STAGED_LATENCY,
            _STAGED_BANDWIDTH,
            _STAGED_PEER,
            source="fitted: eight H100s with NCCL_P2P_DISABLE=1",
        ),
        _pcie("pcie5", 63e9, "PCIe 5.0 x16: 63 GB/s"),
        _pcie("pcie4", 31.5e9, "PCIe 4.0 x16: 31.5 GB/s"),
        Link("100g-ethernet", 20e-6, 12.5e9, source="100 Gbit/s; 20 us assumed"),
        Link("10g-ethernet", 30e-6, 1.25e9, source="10 Gbit/s; 30 us assumed"),
        Link("1g-ethernet", 50e-6, 0.125e9, source="1 Gbit/s; 50 us assumed"),
        Link(
            "shm",
            90e-6,
            98e6,
            shared_memory=True,
            source="CPU ranks on one host, fitted on cluster-eager-shm.json of benchmarks/network",
        ),
    )
}

# What an all-reduce takes from a CPU rank, through this package's exchange and, on top, through
# plain vLLM's Gloo: fitted on benchmarks/network/results/cluster-eager-plain.json, one core a rank.
CPU_REDUCTIONS = {
    "reduce_seconds": 0.31e-3,
    "reduce_bandwidth": 91e6,
    "plain_reduce_seconds": 1.21e-3,
}


def device_named(name: str) -> Device:
    """The device of a name: a preset, or `THIS`, which `--calibrate` measured.

    Raises:
        UserError: there is none, or this machine has not been measured.
    """
    if name == THIS:
        return _measured()
    if name in DEVICES:
        return DEVICES[name]
    raise UserError(f"device {name!r} is unknown; allowed: {', '.join((THIS, *DEVICES))}")


def link_named(text: str) -> Link:
    """The link of a name, or one of its own numbers: ``latency=0.2ms,bandwidth=1gbit``.

    Raises:
        UserError: neither.
    """
    if text in LINKS:
        return LINKS[text]
    if "=" not in text:
        raise UserError(f"link {text!r} is unknown; allowed: {', '.join(LINKS)}, or {OWN_LINK}")
    numbers: dict[str, float] = {}
    for part in text.split(","):
        key, _, value = part.strip().partition("=")
        match = _QUANTITY.fullmatch(value.strip())
        scale = _UNITS.get(key, {}).get(match[2].lower().removesuffix("/s")) if match else None
        if match is None or scale is None or key in numbers:
            raise UserError(f"link {text!r}: {part.strip()!r} is wrong; allowed: {OWN_LINK}")
        numbers[key] = float(match[1]) * scale
    if numbers.keys() != _UNITS.keys() or numbers["bandwidth"] == 0:
        raise UserError(f"link {text!r} needs a latency and a bandwidth above 0, as {OWN_LINK}")
    return Link(text, numbers["latency"], numbers["bandwidth"], source="the command line")


def save(device: Device) -> Path:
    """Keep what was measured as `THIS`; returns the file."""
    fields = asdict(device)
    # What has its default is left out: JSON has no infinity.
    given = {name: value for name, value in fields.items() if value != getattr(Device, name, None)}
    write_json(path := _file(), given)
    return path


def _measured() -> Device:
    path = _file()
    try:
        fields = json.loads(path.read_text())
        flops = tuple((int(rows), float(rate)) for rows, rate in fields.pop("flops"))
        return Device(**fields, flops=flops)
    except FileNotFoundError:
        raise UserError(
            f"this machine has not been measured yet; allowed: add --calibrate, or --device with "
            f"one of {', '.join(DEVICES)}"
        ) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} can't be read ({type(error).__name__}); allowed: what --calibrate writes"
        ) from None


def _file() -> Path:
    return cache_folder() / "machine.json"


OWN_LINK = "latency=0.2ms,bandwidth=1gbit (s, ms, us; gbit, mbit, GB, MB per second)"
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Zµ/]+)")
_UNITS = {
    "latency": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6},
    "bandwidth": {"gbit": 1e9 / 8, "mbit": 1e6 / 8, "gb": 1e9, "mb": 1e6},
}
