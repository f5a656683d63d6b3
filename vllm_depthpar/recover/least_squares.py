"""Recovery without gradients: what a changed block gets wrong, its own MLP can be fitted to add.

The output of a block is linear in the down projections of its layers. With h the inputs of the
down projections of a block side by side, W the projections and r the teacher's stream minus the
student's after the block, ridge regression

    D = argmin_D  sum_tokens |r - D h|^2 / |teacher|^2  +  ridge |D|^2

has a closed form, and W + D has the shape of W. Errors count relative to the stream, because
whatever reads the stream normalizes it first. Block by block in the order they run, so that a block
is fitted to what the ones before it left undone. As layer-wise reconstruction in pruning does
(SparseGPT, arXiv 2301.00774, section 3), but towards layers that are gone or came too late.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vllm_depthpar import hf
from vllm_depthpar.hf import ParallelBlock, Stream
from vllm_depthpar.recover.distillation import Distillation

# In units of the mean power of an input of the down projections; where none helps the block is left
# alone, as if by an infinite one.
RIDGES = (0.1, 0.3, 1.0, 3.0)
# Every so many batches one is held out, to choose the ridge by.
_HELD_OUT = 4


@torch.no_grad()
def refit(
    distillation: Distillation,
    tokens: Tensor,
    batch: int = 4,
    on_progress: Callable[[float], None] = lambda _: None,
) -> dict[int, float]:
    """Fit the down projections of the student's changed blocks, in place.

    Args:
        distillation: teacher and student, on one device.
        tokens: (windows, window), 2 batches or more. More tokens than a block's down projections
            have inputs.
        batch: windows that run together.
        on_progress: called with the share of the work done since the last call.

    Returns:
        The ridge of each changed block that can be fitted, by its position. A block whose end
        stands for no depth of the teacher (`Plan.end`) cannot.
    """
    plan, blocks, layers = distillation.plan, distillation.blocks, distillation.teacher_layers
    device = distillation.teacher.device
    batches = tokens.split(batch)
    states = [_begin(distillation, part.to(device)) for part in batches]
    depth, found = distillation.first, {}
    for position in range(distillation.first, plan.depth):
        block, end = blocks[position], plan.end(position)
        if end is not None:
            for state in states:
                with distillation.autocast():
                    for layer in layers[depth:end]:
                        state.target = layer(state.target, **hf.of_kind(layer, state.context))
            depth = end
        if end is not None and position in distillation.changed and block.feeding:
            distillation.own_downs([position])
            found[position] = fit_block(block, states, distillation.autocast)
        for state in states:
            with distillation.autocast():
                state.stream = block(state.stream, **state.context)
        on_progress(1 / (plan.depth - distillation.first))
    return found


@dataclass
class BatchState:
    """Where a batch of windows is.

    Attributes:
        stream: the student's.
        target: the teacher's.
        context: what layers take beside the stream, by its name.
    """

    stream: Stream
    target: Tensor
    context: dict[str, Any]


def _begin(distillation: Distillation, tokens: Tensor) -> BatchState:
    embedded = distillation.teacher.model.embed_tokens(tokens)
    context = hf.context(distillation.teacher, embedded)
    stream: Stream = embedded
    with distillation.autocast():
        for block in distillation.blocks[: distillation.first]:
            stream = block(stream, **context)
    return BatchState(stream, stream[0] if isinstance(stream, tuple) else stream, context)


def fit_block(
    block: ParallelBlock,
    states: list[BatchState],
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> float:
    """Fit the down projections of one block, in place; returns the ridge.

    Args:
        states: before the block; of some the stream after it decides which ridge is best.
        autocast: what the block computes in.
    """
    downs = [layer.mlp.down_proj for layer in block.feeding_layers]
    widths = [down.in_features for down in downs]
    size, hidden = sum(widths), downs[0].out_features
    like = downs[0].weight
    # Of the batches to fit on, and of those held out.
    squares = [like.new_zeros(size, size) for _ in range(2)]
    products = [like.new_zeros(size, hidden) for _ in range(2)]
    for number, state in enumerate(states):
        held_out = int(number % _HELD_OUT == _HELD_OUT - 1 or number == len(states) - 1)
        with _inputs_of(downs) as inputs, autocast():
            after = block(state.stream, **state.context)
        after = after[0] if isinstance(after, tuple) else after
        target = state.target.float()
        scale = target.pow(2).mean(-1, keepdim=True).rsqrt()
        h = (torch.cat([inputs[down] for down in downs], -1) * scale).flatten(0, 1)
        r = ((target - after) * scale).flatten(0, 1)
        squares[held_out].addmm_(h.T, h)
        products[held_out].addmm_(h.T, r)
    power = squares[0].diagonal().mean()
    best, least, ridge = like.new_zeros(size, hidden), like.new_zeros(()), torch.inf
    for candidate in RIDGES:
        regularized = squares[0] + candidate * power * torch.eye(size, device=like.device)
        fitted = torch.cholesky_solve(products[0], torch.linalg.cholesky(regularized))
        # What is left of |r|^2 on the held-out batches, less what there was.
        change = (fitted * (squares[1] @ fitted - 2 * products[1])).sum()
        if change < least:
            best, least, ridge = fitted, change, candidate
    for down, part in zip(downs, best.split(widths), strict=True):
        down.weight += part.T
    return ridge


@contextmanager
def _inputs_of(modules: list[nn.Linear]) -> Iterator[dict[nn.Linear, Tensor]]:
    """Record what the modules were last called with, while this context lasts."""
    inputs: dict[nn.Linear, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, given: inputs.update({module: given[0]}))
        for module in modules
    ]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()
