"""What a block asks of a layer, whoever's the layer is: its two halves, and to leave sums alone."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from vllm_depthpar.plan.families import Family


class Half(NamedTuple):
    """An attention or an MLP, as a block runs it.

    Attributes:
        before: the norm of what it reads.
        module: what makes this rank's part of a term of what is normalized.
        after: the norm of the term, once all ranks' parts are summed; None if it is added as it is.
    """

    before: nn.Module
    module: nn.Module
    after: nn.Module | None


# The modules of a half, by what `vllm_depthpar.plan.spec.HALVES` calls it.
_MODULES = {"attention": "self_attn", "mlp": "mlp"}


class Member:
    """A decoder layer of vLLM's whose block runs it: its sums over ranks are not its own affair.

    Mixed into vLLM's classes. Not called as a whole: a block calls the modules of its halves.
    """

    # Whether both norms are the same: gains folded in, both read one normalized stream.
    norms_are_alike = False

    def hand_over(self, family: Family, attends: bool, feeds: bool) -> None:
        """Leave sums over ranks to the block, and drop the halves that it does without.

        Args:
            family: the model's.
            attends, feeds: whether it is to have an attention and an MLP; without, it has no
                weights of that half, its norms among them.
        """
        self.norm_names = family.norms
        layer: Any = self
        for half, kept in (("attention", attends), ("mlp", feeds)):
            if not kept:
                for name in (_MODULES[half], *self.norm_names[half]):
                    delattr(layer, name)
        if attends:
            layer.self_attn.o_proj.reduce_results = False
        if feeds:
            layer.mlp.down_proj.reduce_results = False

    def half(self, name: str) -> Half:
        """Take one of its halves, by its name in `vllm_depthpar.plan.spec.HALVES`."""
        before, *after = (getattr(self, norm) for norm in self.norm_names[name])
        return Half(before, getattr(self, _MODULES[name]), *after or [None])
