"""Make one wide layer of several: tensors in, tensors out, no model code.

RMSNorm(x; g) W^T = (x / rms(x)) (W diag(g))^T. With each layer's gain g folded into its own
projections, layers that read the same stream read the same normalized x, and their projections
concatenate: q, k, v, gate and up along the output dimension, o and down along the input dimension.
"""

from __future__ import annotations

import torch

# Elements folded at a time where it takes an fp32 copy: 1 MiB, which stays in a core's cache.
_CHUNK = 1 << 18


def shard_of(member: int, size: int, rank: int, per_rank: int) -> tuple[slice, slice] | None:
    """Find the part of one layer's dimension that falls on a rank of the wide layer.

    The wide dimension is the members' dimensions one after the other, cut into equal
    contiguous shards.

    Args:
        member: position of the layer in its block.
        size: length of the dimension in one layer.
        rank: tensor-parallel rank.
        per_rank: length of the dimension on one rank of the wide layer.

    Returns:
        (where to read in the layer's tensor, where to write in the rank's shard), or None if
        nothing of this layer is on this rank.
    """
    start, first = member * size, rank * per_rank
    low, high = max(start, first), min(start + size, first + per_rank)
    if low >= high:
        return None
    return slice(low - start, high - start), slice(low - first, high - first)


def fold_gain_(weight: torch.Tensor, gain: torch.Tensor) -> None:
    """Multiply weight[o, i] by gain[i] in place: in fp32, rounded once to the weight's dtype.

    Args:
        weight: [out, in], any floating dtype.
        gain: [in], the RMSNorm gain of the layer that the weight belongs to.
    """
    gain = gain.to(device=weight.device, dtype=torch.float32)
    rounded = gain.to(weight.dtype)
    if torch.equal(rounded.float(), gain):
        # PyTorch multiplies half-precision numbers in fp32 and rounds once: one pass, no copy.
        weight.mul_(rounded)
        return
    for rows in weight.split(max(1, _CHUNK // weight.shape[1])):
        rows.copy_(rows.float() * gain)
