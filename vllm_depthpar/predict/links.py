"""Links by name: what joins tensor-parallel ranks, with the all-reduce that vLLM uses over it.

A latency is what an all-reduce adds to a layer. On Hopper and Blackwell vLLM 0.32 sums and
normalises in one kernel of FlashInfer's wherever nothing stands between the two; the norm's part is
in the layer's own cost here, for ladders, which do not fuse, as for the rest.
"""

from __future__ import annotations

import re

from vllm_depthpar.errors import UserError
from vllm_depthpar.predict.machines import Link
from vllm_depthpar.util.names import nearest_first

# Microseconds of latency between two ranks, and what each further one adds.
#
# One-shot kernels over NVLink, among eight GPUs 6 us. On H100s, for 4 and 32 KB, 3.9 and 4.5 us on
# two, 3.7 and 4.8 on four, 5.7 and 7.8 on eight (sgl-project/sglang#2904: kernels of the kind that
# FlashInfer has); vLLM 0.28's, fused with the norm, for 74 KB on two 6.1 to 7.0 us
# (flagos-ai/FlagGems-vllm#773). That V100s, A100s and B200s take as long is an assumption.
_ONE_SHOT = (4.0, 0.33)
# Fitted on the ladder authors' runs on H100s, as devices' shares are: NCCL over NVLink, and with
# its peer to peer off, so that it goes through the host's memory.
_NCCL = (12.1, 1.9)
_STAGED = (19.5, 8.1)
# NCCL between hosts by RDMA: two DGX Sparks, 8 to 16 KB, 30 to 35 us; for 64 KB, 65 us, which is
# twice what bandwidth explains (NVIDIA/dgx-spark-playbooks#103). A further host: two steps of a
# ring, of 2.7 us in NCCL's own table (src/graph/tuning.cc). Faster cards are assumed no quicker.
_RDMA = (30, 5.4)


def _one_way(gigabytes: float) -> float:
    """Compute what one rank sends at, of a data sheet that counts both directions; the share that
    it achieves was fitted on H100s."""
    return 0.89 * gigabytes / 2


# Name, the two latencies, GB/s that one rank sends at, source.
_LINKS = (
    ("nvlink5", *_ONE_SHOT, _one_way(1800), "NVIDIA B200 data sheet; vLLM's all-reduce"),
    ("nvlink4", *_ONE_SHOT, _one_way(900), "NVIDIA H100 data sheet; vLLM's all-reduce"),
    ("nvlink3", *_ONE_SHOT, _one_way(600), "NVIDIA A100 data sheet; vLLM's all-reduce"),
    ("nvlink2", *_ONE_SHOT, _one_way(300), "NVIDIA V100 data sheet; vLLM's all-reduce"),
    ("nvlink4-nccl", *_NCCL, _one_way(900), "NVIDIA H100 data sheet; NCCL, fitted on eight H100s"),
    # vLLM's kernels on eight MI355Xs: 6.3 us for 24 KB (vllm-project/vllm#39080).
    ("infinity-fabric", *_ONE_SHOT, _one_way(896), "AMD MI300X data sheet; vLLM's all-reduce"),
    ("p2p-off", *_STAGED, 228, "fitted on eight H100s with NCCL_P2P_DISABLE=1"),
    # Every byte goes through the host's memory, in over one bus and out over another: that this
    # leaves half of a bus is an assumption.
    ("pcie5", *_STAGED, 63 / 2, "half of PCIe 5.0 x16 without peer to peer, latency of p2p-off"),
    ("pcie4", *_STAGED, 31.5 / 2, "half of PCIe 4.0 x16 without peer to peer, latency of p2p-off"),
    ("pcie3", *_STAGED, 15.8 / 2, "half of PCIe 3.0 x16 without peer to peer, latency of p2p-off"),
    # RTX PRO 6000s, 1 to 16 KB: NCCL 13 to 15 us on four and 24 us on eight, at 40 GB/s; a one-shot
    # kernel, of the kind that vLLM has for two, 6.4 us (voipmonitor/rtx6kpro).
    ("pcie5-p2p", 6.4, 3.05, 40, "measured on RTX PRO 6000s, peer to peer"),
    # NCCL on four behind one switch: 25.7 GB/s (tinygrad/open-gpu-kernel-modules#36).
    ("pcie4-p2p", 8.2, 3.9, 25.7, "RTX 4090s, peer to peer, latency halfway between PCIe 5 and 3"),
    # NCCL on four behind one switch, in CUDA graphs: 19.4 us for 4 KB, 83.5 us for 384 KB
    # (haohervchb/sglang-V100#2). On two: as PCIe 5.
    ("pcie3-p2p", 10, 4.7, 12.6, "measured on four V100s, peer to peer"),
    # NVIDIA on what one card should reach: NVIDIA/nccl-tests#290, #29.
    ("400g-ethernet", *_RDMA, 47, "RDMA; as NVIDIA expects, latency of 200g-ethernet"),
    # 19 to 21 GB/s: NVIDIA/dgx-spark-playbooks#25.
    ("200g-ethernet", *_RDMA, 20, "RDMA, measured with NCCL between two DGX Sparks"),
    ("100g-ethernet", *_RDMA, 12.2, "RDMA; as NVIDIA expects, latency of 200g-ethernet"),
    ("25g-ethernet", *_RDMA, 3.05, "RDMA; a quarter of 100g-ethernet, latency of 200g-ethernet"),
    # Between CPU hosts: an ordinary switch and the kernel's TCP.
    ("10g-ethernet", 30, 0, 1.25, "10 Gbit/s; latency of TCP assumed"),
    ("1g-ethernet", 50, 0, 0.125, "1 Gbit/s; latency of TCP assumed"),
)
_SHARED_MEMORY = Link(
    "shm",
    90e-6,
    98e6,
    shared_memory=True,
    source="CPU ranks on one host, fitted on benchmarks/results/cluster-eager-shm.json",
)

LINKS = {
    name: Link(
        name,
        latency * 1e-6,
        gigabytes * 1e9,
        peer * 1e-6,
        source=f"{source}: {latency:g} us, {peer:g} us a further rank, {gigabytes:.3g} GB/s",
    )
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
        known = ", ".join(nearest_first(text, LINKS))
        raise UserError(f"link {text!r} is unknown; allowed: {known}, or {OWN_LINK}")
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
