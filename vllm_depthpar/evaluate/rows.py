"""A plan as what `evaluator` runs, which can also be what no plan says. Plain data: no torch."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_depthpar.plan import Plan
from vllm_depthpar.plan.spec import STANDARD

# In the names of blocks, under which what was measured is kept.
_LETTERS = {STANDARD: "", "ladder": "L", "drop_sync": "D", "parallel_residual": "P"}


@dataclass(frozen=True, order=True)
class Block:
    """What runs between two points of the residual stream.

    Attributes:
        layers: the layers that run side by side.
        mode: of the block (see `vllm_depthpar.plan.Plan.mode`).
        merged: run one layer whose weights are the mean of these layers' (a transformation of the
            effective-depth study, arXiv 2502.02790, section 3, that no plan can ask for).
    """

    layers: tuple[int, ...]
    mode: str = STANDARD
    merged: bool = False

    def __str__(self) -> str:
        return "+".join(map(str, self.layers)) + _LETTERS[self.mode] + "M" * self.merged


# Blocks in the order they run.
Row = tuple[Block, ...]


def row_of(plan: Plan) -> Row:
    """Take a plan's blocks, so that equal ones are the same."""
    return tuple(_block(layers, plan.mode(at)) for at, layers in enumerate(plan.blocks))


def _block(layers: tuple[int, ...], mode: str) -> Block:
    # Side by side is a sum, without order; but in this mode it says which ranks have which layer.
    return Block(layers if mode == "drop_sync" else tuple(sorted(layers)), mode)
