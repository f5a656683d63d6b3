"""Recovery without gradients: projections are fitted to what changed blocks get wrong.

Two things are linear, and have a closed form. *What a layer reads*: attention and MLP of a layer in
a changed block read another stream than in the teacher, without a term or with one too many, and
those of a layer after it one with its errors. With t what the teacher's reads, after its norm, and
z what the student's does,

    C = argmin_C  sum_tokens |t - C z|^2  +  ridge |C - I|^2

predicts one from the other, and goes into the projections that read: W becomes W C, each rank's
rows by themselves where ranks read different streams (`drop_sync`). A prediction is smaller than
what it predicts, so that it counts by the block's end whether it helps. *What a block adds*: with h
the inputs of the down projections of a block side by side, W the projections and r the teacher's
stream minus the student's after the block,

    D = argmin_D  sum_tokens |r - D h|^2 / |teacher|^2  +  ridge |D|^2

and W becomes W + D. Errors count relative to the stream, because whatever reads the stream
normalizes it first. Block by block in the order they run, so that a block is fitted to what those
before it left undone. As layer-wise reconstruction in pruning does (SparseGPT, arXiv 2301.00774,
section 3), but towards layers that are gone, came too late, or see less.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from vllm_depthpar import hf
from vllm_depthpar.hf import ParallelBlock, Stream
from vllm_depthpar.recover.distillation import Distillation

# In units of the mean power of what is read; where none helps nothing is changed, as if by an
# infinite one.
RIDGES = (0.1, 0.3, 1.0, 3.0)
INPUT_RIDGES = (1e-3, 1e-2, 0.1, 1.0)
# Every so many batches one is held out, to choose the ridge by.
_HELD_OUT = 4


@torch.no_grad()
def refit(
    distillation: Distillation,
    tokens: Tensor,
    batch: int = 4,
    on_progress: Callable[[float], None] = lambda _: None,
) -> dict[int, float]:
    """Fit the projections of the student's blocks that learn, in place: those that read, then down.

    Args:
        distillation: teacher and student, on one device.
        tokens: (windows, window), 2 batches or more. More tokens than a block's down projections
            have inputs.
        batch: windows that run together.
        on_progress: called with the share of the work done since the last call.

    Returns:
        The ridge of the down projections of each block that can be fitted, by its position. A
        block whose end stands for no depth of the teacher (`Plan.end`) cannot.
    """
    plan, blocks, layers = distillation.plan, distillation.blocks, distillation.teacher_layers
    device = distillation.teacher.device
    batches = tokens.split(batch)
    states = [_begin(distillation, part.to(device)) for part in batches]
    depth, found = distillation.first, {}
    for position in range(distillation.first, plan.depth):
        block, end = blocks[position], plan.end(position)
        fits = end is not None and position in distillation.learning and bool(block.feeding)
        if end is not None:
            members = range(depth, end)
            norms = {
                (index, half): getattr(layers[index], before)
                for index in members
                for half, (before, *_) in block.norms.items()
                # The attention with which the first of them begins reads what it should.
                if fits
                and (
                    position > distillation.learning[0]
                    or half == "mlp"
                    or index > depth
                    or block.mode == "ladder"
                )
            }
            for state in states:
                with _calls_of(norms) as calls, distillation.autocast():
                    for index in members:
                        layer = layers[index]
                        state.target = layer(state.target, **hf.of_kind(layer, state.context))
                state.reads = {key: read for key, [(_, read)] in calls.items()}
            depth = end
        if fits:
            distillation.own(_fitted(block, states[0].reads))
            for half in _READERS:
                fit_inputs(block, half, states, distillation.autocast)
            found[position] = fit_block(block, states, distillation.autocast)
        for state in states:
            with distillation.autocast():
                state.stream = block(state.stream, **state.context)
        on_progress(1 / (plan.depth - distillation.first))
    return found


def _fitted(block: ParallelBlock, reads: Collection[tuple[int, str]]) -> list[str]:
    """List what of a block is fitted, by the names in the checkpoint."""
    readers = [
        (index, name)
        for half, members in (("attention", block.plain_attentions), ("mlp", block.plain_mlps))
        for index in members
        if (index, half) in reads
        for name in _READERS[half]
    ]
    downs = [(index, "mlp.down_proj") for index in block.plain_mlps if not block.norms["mlp"][1:]]
    return [f"model.layers.{index}.{name}.weight" for index, name in readers + downs]


@dataclass
class BatchState:
    """Where a batch of windows is.

    Attributes:
        stream: the student's.
        target: the teacher's.
        context: what layers take beside the stream, by its name.
        reads: what the teacher's layers of the block read after their norms, by layer and half.
    """

    stream: Stream
    target: Tensor
    context: dict[str, Any]
    reads: dict[tuple[int, str], Tensor] = field(default_factory=dict)


def _begin(distillation: Distillation, tokens: Tensor) -> BatchState:
    embedded = hf.embed(distillation.teacher, tokens)
    context = hf.context(distillation.teacher, embedded)
    stream: Stream = embedded
    with distillation.autocast():
        for block in distillation.blocks[: distillation.first]:
            stream = block(stream, **context)
    return BatchState(stream, stream[0] if isinstance(stream, tuple) else stream, context)


# What reads the stream in the halves of a layer.
_READERS = {
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp": ("mlp.gate_proj", "mlp.up_proj"),
}


def fit_inputs(
    block: ParallelBlock,
    half: str,
    states: list[BatchState],
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Fit the projections of one half of a block's layers to what they read, in place.

    Layers of which the teacher's part is not in `BatchState.reads` are left alone, and blocks of
    ranks that each have a stream of their own (`desync`).

    Args:
        half: "attention" or "mlp".
        states: before the block.
    """
    if not any(of == half for _, of in states[0].reads):
        return
    # By layer and part of its projections' rows; and those rows.
    problems: dict[tuple[int, int], tuple[_Ridge, slice]] = {}
    for number, state in enumerate(states):
        with autocast():
            reads = block.reads(half, state.stream, **state.context)
        for index, parts in reads.items():
            if (index, half) not in state.reads:
                continue
            right = state.reads[index, half].flatten(0, 1).float()
            for part, (mine, of_part) in enumerate(parts):
                read = of_part.flatten(0, 1).float()
                problem, _ = problems.setdefault((index, part), (_Ridge(read, right), mine))
                problem.add(read, right - read, _is_held_out(number, len(states)))
    readers = []
    for (index, _), (problem, mine) in problems.items():
        for name in _READERS[half]:
            weight = block.members[str(index)].get_submodule(name).weight
            readers.append((weight, weight[mine].clone(), mine, problem))
    if readers:
        _choose(block, readers, states, autocast)


Reader: TypeAlias = "tuple[Tensor, Tensor, slice, _Ridge]"


def _choose(
    block: ParallelBlock,
    readers: Sequence[Reader],
    states: list[BatchState],
    autocast: Callable[[], AbstractContextManager[object]],
) -> None:
    """Give projections the ridge, the same for all, that leaves least to be added after the block.

    Args:
        readers: a weight, what some rows of it were, which, and what they are to be fitted to.
    """
    kept = [state for number, state in enumerate(states) if _is_held_out(number, len(states))]

    def give(ridge: float) -> None:
        for weight, before, mine, problem in readers:
            change = before @ problem.fitted(ridge).T if ridge < torch.inf else 0
            weight[mine] = before + change

    def error(ridge: float) -> float:
        give(ridge)
        left = [_left_over(block, state, autocast)[0] for state in kept]
        return sum(float(one.pow(2).mean()) for one in left)

    give(min((torch.inf, *INPUT_RIDGES), key=error))


def _left_over(
    block: ParallelBlock,
    state: BatchState,
    autocast: Callable[[], AbstractContextManager[object]],
) -> tuple[Tensor, Tensor]:
    """Compute what is missing after a block, relative to the stream's size, and one over that."""
    with autocast():
        after = block(state.stream, **state.context)
    after = after[0] if isinstance(after, tuple) else after
    target = state.target.float()
    scale = target.pow(2).mean(-1, keepdim=True).rsqrt()
    return (target - after) * scale, scale


def fit_block(
    block: ParallelBlock,
    states: list[BatchState],
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> float:
    """Fit the down projections of one block, in place; returns the ridge. Where norms come after
    them there is no closed form, nor where there are experts: nothing is changed, as by an infinite
    one.

    Args:
        states: before the block; of some the stream after it decides which ridge is best.
        autocast: what the block computes in.
    """
    if block.norms["mlp"][1:] or not block.plain_mlps:
        return torch.inf
    downs = {index: block.members[str(index)].mlp.down_proj for index in block.plain_mlps}
    widths = [down.in_features for down in downs.values()]
    problem: _Ridge | None = None
    for number, state in enumerate(states):
        with _calls_of(downs) as calls:
            r, scale = _left_over(block, state, autocast)
        given = torch.cat([given for [(given, _)] in calls.values()], -1) * block.multiplier
        h = (given * scale).flatten(0, 1)
        r = r.flatten(0, 1)
        problem = problem or _Ridge(h, r)
        problem.add(h, r, _is_held_out(number, len(states)))
    assert problem is not None  # there are states
    change, ridge = problem.solve(RIDGES)
    for down, part in zip(downs.values(), change.split(widths), strict=True):
        down.weight += part.T
    return ridge


def _is_held_out(number: int, count: int) -> bool:
    return number % _HELD_OUT == _HELD_OUT - 1 or number == count - 1


class _Ridge:
    """Ridge regression of r on h, whose ridge is what is best on rows held out."""

    def __init__(self, h: Tensor, r: Tensor) -> None:
        """Begin with no rows; h and r, (rows, size), say how large and where."""
        size, out = h.shape[-1], r.shape[-1]
        # Of rows to fit on, and of those held out.
        self._squares = [h.new_zeros(size, size) for _ in range(2)]
        self._products = [h.new_zeros(size, out) for _ in range(2)]

    def add(self, h: Tensor, r: Tensor, held_out: bool) -> None:
        """Add rows."""
        self._squares[held_out].addmm_(h.T, h)
        self._products[held_out].addmm_(h.T, r)

    def fitted(self, ridge: float) -> Tensor:
        """Find D transposed, (size of h, size of r)."""
        squares, products = self._squares[0], self._products[0]
        power = ridge * squares.diagonal().mean()
        regularized = squares + power * torch.eye(len(squares), device=squares.device)
        return torch.cholesky_solve(products, torch.linalg.cholesky(regularized))

    def solve(self, ridges: Sequence[float]) -> tuple[Tensor, float]:
        """Find D transposed and its ridge: 0, and an infinite one, if none helps."""
        squares, products = self._squares[1], self._products[1]
        best, least, best_ridge = torch.zeros_like(products), products.new_zeros(()), torch.inf
        for ridge in ridges:
            found = self.fitted(ridge)
            # What is left of |r|^2 on the rows held out, less what there was.
            change = (found * (squares @ found - 2 * products)).sum()
            if change < least:
                best, least, best_ridge = found, change, ridge
        return best, best_ridge


Key = TypeVar("Key")


@contextmanager
def _calls_of(modules: Mapping[Key, nn.Module]) -> Iterator[dict[Key, list[tuple[Tensor, Tensor]]]]:
    """Record what modules are given and return, call by call, while this context lasts."""
    calls: dict[Key, list[tuple[Tensor, Tensor]]] = {key: [] for key in modules}

    def recorder(key: Key) -> Callable[..., None]:
        return lambda _, given, returned: calls[key].append((given[0], returned))

    hooks = [module.register_forward_hook(recorder(key)) for key, module in modules.items()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
