"""What a block asks of a layer, whoever's the layer is: its two halves, and to leave sums alone."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from vllm_depthpar.plan.families import Family
from vllm_depthpar.vllm_compat import leave_sums


class Half(NamedTuple):
    """An attention or an MLP, as a block runs it.

    Attributes:
        before: the norm of what it reads.
        module: makes this rank's part of a term of what is normalized.
        after: the norm of the term, once all ranks' parts are summed; None if it is added as it is.
    """

    before: nn.Module
    module: Any
    after: nn.Module | None


class Member:
    """A decoder layer of vLLM's whose block runs it: its sums over ranks are not its own affair.

    Mixed into vLLM's classes. Not called as a whole: a block calls the modules of its halves.
    """

    # Whether both norms are the same: gains folded in, both read one normalized stream.
    norms_are_alike = False
    # What a module gives is multiplied by it.
    multiplier = 1.0

    def hand_over(self, family: Family, attends: bool, feeds: bool) -> None:
        """Leave sums over ranks to the block, and drop the halves that it does without.

        Args:
            family: the model's.
            attends, feeds: whether it is to have an attention and an MLP; without, it has no
                weights of that half, its norms among them.
        """
        self.norm_names = family.norms
        self.modules_of = {"attention": "self_attn", "mlp": family.mlp}
        for half, kept in (("attention", attends), ("mlp", feeds)):
            if not kept:
                for name in (self.modules_of[half], *self.norm_names[half]):
                    delattr(self, name)
        if attends:
            leave_sums(self._module("attention"), family.projection("o_proj"))
        if feeds:
            leave_sums(self._module("mlp"), family.projection("down_proj"))

    def _module(self, half: str) -> Any:
        return getattr(self, self.modules_of[half])

    def half(self, name: str) -> Half:
        """Take one of its halves, by its name in `vllm_depthpar.plan.spec.HALVES`."""
        before, *after = (getattr(self, norm) for norm in self.norm_names[name])
        module = self._module(name)
        if self.multiplier != 1:
            module = partial(_multiplied, module, self.multiplier)
        return Half(before, module, *after or [None])


def _multiplied(module: nn.Module, by: float, *given: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, module(*given)) * by
