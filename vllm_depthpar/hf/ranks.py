"""What one of the ranks has of a layer: of its MLP's weights, and of what a projection computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from vllm_depthpar.errors import UserError


def cut_mlp(weights: Mapping[str, Tensor], ranks: int) -> list[dict[str, Tensor]]:
    """Cut the weights of an MLP, many experts or one, by transformers' names, into those of ranks.

    Raises:
        UserError: the ranks can't share it.
    """
    part_of = _part_of_stacked if "experts.down_proj_bias" in weights else _part_of
    return [
        {name: part_of(name, weight, rank, ranks) for name, weight in weights.items()}
        for rank in range(ranks)
    ]


def _part_of_stacked(name: str, weight: Tensor, rank: int, ranks: int) -> Tensor:
    if "gate_up_proj" in name:  # (experts, hidden, both), a neuron's gate and up side by side
        return _part(weight, rank, ranks, dim=-1)
    if name.endswith("down_proj"):
        return _part(weight, rank, ranks, dim=-2)
    if name.endswith("down_proj_bias") and rank:  # of the first rank
        return torch.zeros_like(weight)
    return weight


def _part_of(name: str, weight: Tensor, rank: int, ranks: int) -> Tensor:
    if "gate_up_proj" in name:  # (both, hidden), or of all experts (experts, both, hidden)
        halves = weight.chunk(2, -2)
        return torch.cat([_part(half, rank, ranks, dim=-2) for half in halves], -2)
    if name == "dense_4h_to_h.bias" and rank:  # of the first rank
        return torch.zeros_like(weight)
    if "down_proj" in name or name == "dense_4h_to_h.weight":
        return _part(weight, rank, ranks, dim=-1)
    if "dense_h_to_4h" in name:
        return _part(weight, rank, ranks, dim=0)
    if "gate_proj" in name or "up_proj" in name:
        return _part(weight, rank, ranks, dim=-2)
    return weight  # of the router, which every rank has


def _part(weight: Tensor, rank: int, ranks: int, dim: int) -> Tensor:
    size = weight.shape[dim]
    if size % ranks:
        raise UserError(
            f"{ranks} ranks can't cut {size} evenly; allowed: tensor-parallel sizes that fit the "
            f"plan"
        )
    return weight.narrow(dim, rank * size // ranks, size // ranks)


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Record what a module is given meanwhile; it computes all the same."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        hook.remove()


def columns(linear: nn.Module, inputs: Tensor, mine: slice) -> Tensor:
    """Compute a rank's part of a projection that is cut along its inputs; without the bias."""
    if isinstance(linear, nn.Linear):
        return nn.functional.linear(inputs[..., mine], linear.weight[:, mine])
    # An adapter around one: it is linear, so what it makes of the others' zeros is its bias.
    zeros = torch.zeros_like(inputs)
    alone = torch.cat([zeros[..., : mine.start], inputs[..., mine], zeros[..., mine.stop :]], -1)
    return cast(Tensor, linear(alone) - linear(zeros[:1]))


def rows(linear: nn.Module, inputs: Tensor, mine: slice) -> Tensor:
    """Compute a rank's part of a projection that is cut along its outputs."""
    if isinstance(linear, nn.Linear):
        bias = None if linear.bias is None else linear.bias[mine]
        return nn.functional.linear(inputs, linear.weight[mine], bias)
    return cast(Tensor, linear.forward(inputs)[..., mine])  # without hooks: one may call this
