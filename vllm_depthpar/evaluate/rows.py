"""A plan as what `evaluator` runs, which can also be what no plan says. Plain data: no torch."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_depthpar.plan import Plan
from vllm_depthpar.plan.plan import Half, halves_of
from vllm_depthpar.plan.spec import STANDARD, WHOLE

# In the names of blocks, under which what was measured is kept.
_LETTERS = {STANDARD: "", "ladder": "L", "drop_sync": "D", "parallel_residual": "P"}


@dataclass(frozen=True, order=True)
class Block:
    """What runs between two points of the residual stream.

    Attributes:
        layers: the layers that run side by side.
        mode: of the block (see `vllm_depthpar.plan.Plan.mode`).
        drop_attention, drop_mlp: those of the layers that run without that half.
        unreduced: halves whose sum is not reduced (see `vllm_depthpar.plan.Plan.unreduced`).
        whole: whether ranks cut each layer by itself (see `Plan.layout`), where that matters.
        merged: run one layer whose weights are the mean of these layers' (a transformation of the
            effective-depth study, arXiv 2502.02790, section 3, that no plan can ask for).
    """

    layers: tuple[int, ...]
    mode: str = STANDARD
    drop_attention: tuple[int, ...] = ()
    drop_mlp: tuple[int, ...] = ()
    unreduced: tuple[str, ...] = ()
    whole: bool = False
    merged: bool = False

    @property
    def depends_on_ranks(self) -> bool:
        """Whether what it computes depends on the tensor-parallel size."""
        return self.mode == "drop_sync" or bool(self.unreduced)

    @property
    def runs(self) -> frozenset[Half]:
        """The halves of layers that run in it."""
        dropped = {(layer, "attention") for layer in self.drop_attention}
        return halves_of(self.layers) - dropped - {(layer, "mlp") for layer in self.drop_mlp}

    def __str__(self) -> str:
        named = (
            f"{layer}" + "m" * (layer in self.drop_attention) + "a" * (layer in self.drop_mlp)
            for layer in self.layers
        )
        marks = _LETTERS[self.mode] + "".join(f"~{half}" for half in self.unreduced)
        return "+".join(named) + marks + "W" * self.whole + "M" * self.merged


# Blocks in the order they run.
Row = tuple[Block, ...]


def row_of(plan: Plan) -> Row:
    """Take a plan's blocks, so that equal ones are the same."""
    return tuple(_block(plan, position) for position in range(plan.depth))


def _block(plan: Plan, position: int) -> Block:
    mode, layers = plan.mode(position), plan.blocks[position]
    # Side by side is a sum, without order; but here it says which ranks have which layer.
    ranks_matter = mode == "drop_sync" or bool(plan.desync)
    return Block(
        layers if ranks_matter else tuple(sorted(layers)),
        mode,
        tuple(sorted(plan.drop_attention.intersection(layers))),
        tuple(sorted(plan.drop_mlp.intersection(layers))),
        plan.unreduced(position),
        whole=ranks_matter and len(layers) > 1 and plan.layout == WHOLE,
    )
