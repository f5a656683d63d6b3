"""A plan as what `evaluator` runs, which can also be what no plan says. Plain data: no torch."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_depthpar.plan import Plan


@dataclass(frozen=True, order=True)
class Block:
    """What runs between two points of the residual stream.

    Attributes:
        layers: the layers that run side by side.
        ladder: whether it reads the stream as a ladder block (see `vllm_depthpar.hf`).
        merged: run one layer whose weights are the mean of these layers' (a transformation of the
            effective-depth study, arXiv 2502.02790, section 3, that no plan can ask for).
    """

    layers: tuple[int, ...]
    ladder: bool = False
    merged: bool = False

    def __str__(self) -> str:
        return "+".join(map(str, self.layers)) + "L" * self.ladder + "M" * self.merged


# Blocks in the order they run.
Row = tuple[Block, ...]


def row_of(plan: Plan) -> Row:
    """Take a plan's blocks, so that equal ones are the same."""
    return tuple(
        # Side by side is a sum: without order.
        Block(tuple(sorted(block)), plan.is_ladder(position))
        for position, block in enumerate(plan.blocks)
    )
