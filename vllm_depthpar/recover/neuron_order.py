"""Neurons dealt out anew: what a dropped sync point costs less of, for nothing.

Under `drop_sync` rank r's MLP reads the stream with its own attention heads' output alone. Which of
an MLP's neurons (rows of gate and up with their column of down) a rank has is free: their sum is
the same in any order, and plain vLLM cuts whatever order a checkpoint has into contiguous parts.
So each neuron goes to the rank whose heads tell it most. With h_i what neuron i is after the
activation, of the whole attention, h_ir of rank r's alone, d_i its column of down and x the stream,

    minimize  sum_i c[r(i), i],     c[r, i] = |d_i|^2  mean_tokens (h_ir - h_i)^2 / mean(x^2)

over the deals r that give each rank as many. Sync-Point Drop (arXiv 2502.20727) groups heads to the
same end, where a rank has several of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vllm_depthpar import hf
from vllm_depthpar.checkpoint.tensors import split_name
from vllm_depthpar.hf import ParallelBlock
from vllm_depthpar.plan import resolve

# What its neurons' order is in, of a layer's tensors, and along which dimension.
_DIMENSIONS = {
    "mlp.gate_proj.weight": 0,
    "mlp.gate_proj.bias": 0,
    "mlp.up_proj.weight": 0,
    "mlp.up_proj.bias": 0,
    "mlp.down_proj.weight": 1,
}


class Order(NamedTuple):
    """An order of the neurons of an MLP.

    Attributes:
        neurons: (intermediate,) which one comes where.
        before, after: the sum that is minimized, of the checkpoint's order and of this one.
    """

    neurons: Tensor
    before: float
    after: float


@torch.no_grad()
def orders(
    model: PreTrainedModel,
    tokens: Tensor,
    ranks: int,
    batch: int = 4,
    on_progress: Callable[[float], None] = lambda _: None,
) -> list[Order]:
    """Find an order of the neurons of each layer, whichever layers will drop their sync points.

    Args:
        model: not restructured; it becomes unusable for anything else.
        tokens: to calibrate on, (windows, window).
        ranks: that the layers will be cut into; they divide the neurons of an MLP.
        batch: windows that run together.
        on_progress: called with the share of the work done since the last call.
    """
    layers = len(hf.body(model).layers)
    neurons = model.config.intermediate_size
    hf.restructure(model, resolve({"drop_sync": "all", "tp": ranks}, layers))
    states: list[tuple[Tensor, dict[str, Any]]] = []
    for part in tokens.split(batch):
        stream = hf.embed(model, part.to(model.device))
        states.append((stream, hf.context(model, stream)))
    found = []
    for block in hf.body(model).layers:
        costs = torch.zeros(ranks, neurons, device=model.device)
        for at, (stream, context) in enumerate(states):
            after, errors = _run(block, stream, context)
            states[at] = after, context
            costs += errors
        costs /= tokens.numel()
        before = torch.arange(neurons, device=model.device).view(ranks, -1)
        after = deal(costs)
        every = range(ranks)
        found.append(
            Order(after.flatten(), _total(costs, every, before), _total(costs, every, after))
        )
        on_progress(1 / layers)
    return found


def reordered(tensors: Mapping[str, Tensor], found: Sequence[Order]) -> dict[str, Tensor]:
    """Put tensors of a checkpoint, by their names there, into the orders of their layers."""
    changed = dict(tensors)
    for name, tensor in tensors.items():
        if (place := split_name(name)) is None:
            continue
        _, layer, rest = place
        if rest in _DIMENSIONS:
            neurons = found[layer].neurons.to(tensor.device)
            changed[name] = tensor.index_select(_DIMENSIONS[rest], neurons)
    return changed


def _run(block: ParallelBlock, stream: Tensor, context: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Run a layer, of which nothing is left out; returns the stream after it, and its neurons'
    costs on each rank, (ranks, neurons), summed over the tokens."""
    (layer,) = block.feeding_layers
    read, of_ranks = block.read_by_mlp(stream, **context)
    scale = read.float().pow(2).mean(-1, keepdim=True).rsqrt()
    right, *wrong = (
        hf.neurons(layer, block.normalized("mlp", layer, x)) for x in (read, *of_ranks)
    )
    errors = [((neurons - right) * scale).pow(2) for neurons in wrong]
    size = layer.mlp.down_proj.weight.float().pow(2).sum(0)
    return read + block.feed(read), torch.stack([e.flatten(0, -2).sum(0) for e in errors]) * size


def deal(costs: Tensor) -> Tensor:
    """Deal neurons out to ranks, as many to each.

    Args:
        costs: (ranks, neurons), of a neuron on a rank.

    Returns:
        (ranks, neurons / ranks), the neurons of each rank in ascending order. No exchange between
        two ranks makes their sum smaller; of two ranks it is the smallest.
    """
    ranks, count = costs.shape
    each = count // ranks
    dealt = torch.arange(count, device=costs.device).view(ranks, each)
    improved = True
    while improved:
        improved = False
        for one, other in combinations(range(ranks), 2):
            both = torch.cat([dealt[one], dealt[other]])
            # Those first that lose most on the other. Ties stay where they are: the sort is stable.
            preferred = (costs[one] - costs[other])[both].sort(stable=True).indices
            now, parted = both.view(2, each), both[preferred].view(2, each)
            if _total(costs, (one, other), parted) < _total(costs, (one, other), now):
                dealt[[one, other]] = parted
                improved = True
    return dealt.sort(1).values


def _total(costs: Tensor, ranks: Sequence[int], dealt: Tensor) -> float:
    """Sum the costs of the neurons that ranks have."""
    return sum(
        float(costs[rank, mine].sum(dtype=torch.float64))
        for rank, mine in zip(ranks, dealt, strict=True)
    )
