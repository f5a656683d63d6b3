"""Links by name: what joins tensor-parallel ranks."""

from __future__ import annotations

import re

from vllm_depthpar.errors import UserError
from vllm_depthpar.predict.machines import Link

# Fitted on the ladder authors' runs on H100s, as devices' shares are: NCCL over NVLink, and with
# its peer to peer off, so that it goes through the host's memory. vLLM's own all-reduce kernels for
# small tensors are said to be faster than NCCL; where they run, a link's latency here is too high.
_NCCL = (12.1, 1.9)
_STAGED = (19.5, 8.1)
_NVLINK_ACHIEVED = 0.89


def _nvlink(gigabytes: float) -> float:
    """By the data sheet, which counts both directions."""
    return _NVLINK_ACHIEVED * gigabytes / 2


_AS_H100 = f"latency and {_NVLINK_ACHIEVED:.0%} of bandwidth as fitted for H100"
# Name; microseconds between two ranks, and what each further one adds; GB/s that one rank sends at;
# source.
_LINKS = (
    ("nvlink2", *_NCCL, _nvlink(300), f"NVIDIA V100 data sheet: 300 GB/s; {_AS_H100}"),
    ("nvlink3", *_NCCL, _nvlink(600), f"NVIDIA A100 data sheet: 600 GB/s; {_AS_H100}"),
    ("nvlink4", *_NCCL, _nvlink(900), f"NVIDIA H100 data sheet: 900 GB/s; {_AS_H100}"),
    ("nvlink5", *_NCCL, _nvlink(1800), f"NVIDIA B200 data sheet: 1.8 TB/s; {_AS_H100}"),
    ("p2p-off", *_STAGED, 228, "fitted: eight H100s with NCCL_P2P_DISABLE=1"),
    # Without peer to peer every byte goes through the host's memory, in over one bus and out over
    # another: half of the bus is an assumption.
    ("pcie5", *_STAGED, 63 / 2, "PCIe 5.0 x16: 63 GB/s, half of it; latency of p2p-off"),
    ("pcie4", *_STAGED, 31.5 / 2, "PCIe 4.0 x16: 31.5 GB/s, half of it; latency of p2p-off"),
    # The latency of Ethernet is an assumption: an ordinary switch and the kernel's TCP.
    ("100g-ethernet", 20, 0, 12.5, "100 Gbit/s; 20 us assumed"),
    ("10g-ethernet", 30, 0, 1.25, "10 Gbit/s; 30 us assumed"),
    ("1g-ethernet", 50, 0, 0.125, "1 Gbit/s; 50 us assumed"),
)
_SHARED_MEMORY = Link(
    "shm",
    90e-6,
    98e6,
    shared_memory=True,
    source="CPU ranks on one host, fitted on benchmarks/results/cluster-eager-shm.json",
)

LINKS = {
    name: Link(name, latency * 1e-6, gigabytes * 1e9, peer * 1e-6, source=source)
    for name, latency, peer, gigabytes, source in _LINKS
} | {_SHARED_MEMORY.name: _SHARED_MEMORY}

OWN_LINK = "latency=0.2ms,bandwidth=1gbit (s, ms, us; gbit, mbit, GB, MB per second)"
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Zµ/]+)")
_UNITS = {
    "latency": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6},
    "bandwidth": {"gbit": 1e9 / 8, "mbit": 1e6 / 8, "gb": 1e9, "mb": 1e6},
}


def link_named(text: str) -> Link:
    """Find the link of a name, or read one's own numbers: ``latency=0.2ms,bandwidth=1gbit``.

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
