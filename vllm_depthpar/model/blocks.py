"""Blocks of a plan: the terms of their members, one of attention and one of MLP, reduced by us.

Layer Parallelism: arXiv 2502.02790, equation 2. Ladder Residual: arXiv 2501.06589, section 3.
Sync-Point Drop: arXiv 2502.20727, section 3. Desync residual: gpt_desync in Ladder Residual's code.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size

from vllm_depthpar.model.members import Half, Member
from vllm_depthpar.model.reductions import InFlight, Reductions


class Terms(NamedTuple):
    """This rank's parts of what a block adds to the stream.

    Attributes:
        parts: (tokens, hidden) each, to be reduced in one all-reduce: their sum alone, or where a
            norm comes after each, which has to see all ranks' sum, one for each module.
        norms: those, one for each part; () if there is none.
    """

    parts: tuple[torch.Tensor, ...]
    norms: tuple[nn.Module, ...]

    def beside(self, others: Terms) -> Terms:
        """Join the terms of a block's other half, to be reduced together."""
        if not self.norms:
            return Terms((self.parts[0] + others.parts[0],), ())
        return Terms(self.parts + others.parts, self.norms + others.norms)

    def joined(self) -> torch.Tensor:
        """Make the one tensor that is reduced of the parts."""
        return self.parts[0] if len(self.parts) == 1 else torch.stack(self.parts)


def _sum(total: torch.Tensor, norms: Sequence[nn.Module]) -> torch.Tensor:
    """Sum what is added to the stream, of what `Terms.joined` is once it is reduced."""
    if not norms:
        return total
    parts = total.unbind() if len(norms) > 1 else (total,)
    return reduce(torch.add, (norm(part) for norm, part in zip(norms, parts, strict=True)))


class Sent(NamedTuple):
    """Terms that may be on their way."""

    flight: InFlight
    norms: tuple[nn.Module, ...]


class Pending(NamedTuple):
    """What a block hands to a ladder block in place of one term: two that may be on their way.

    Attributes:
        attention: to be added before the next attention; None if the stream has it already.
        mlp: to be added before the next MLP.
    """

    attention: Sent | None
    mlp: Sent


class Block:
    """One block of a plan, of any mode, with its all-reduces in our hands.

    No module: its members are the model's, under the names that they have in the checkpoint. A
    block is one decoder layer, or several whose terms it sums on each rank; or, where a norm comes
    after each, reduces side by side.

    vLLM's decoder layers pass on (hidden_states, residual): a term, and the stream that the next
    layer's norm adds it to. So do blocks; to a ladder block the term is a `Pending`. Either kind of
    block adds inside its norms and nowhere else, as a plain layer does. Blocks that reduce once
    add their two terms, too.
    """

    def __init__(
        self,
        attentions: Sequence[Member],
        mlps: Sequence[Member],
        mode: str,
        before_ladder: bool,
        unreduced: Collection[str],
        apart: bool,
    ) -> None:
        """Make the block.

        Args:
            attentions, mlps: the layers whose attentions and MLPs run side by side in it; either
                may be none.
            mode: see `vllm_depthpar.plan.Plan.mode`.
            before_ladder: whether the next block is a ladder block.
            unreduced, apart: see `Plan.unreduced` and `Plan.is_apart`.
        """
        self.attentions = tuple(layer.half("attention") for layer in attentions)
        self.mlps = tuple(layer.half("mlp") for layer in mlps)
        self.norms_are_alike = all(layer.norms_are_alike for layer in attentions)
        self.mode = mode
        self.ladder = mode == "ladder"
        self.before_ladder = before_ladder
        self.reductions = Reductions()
        self.ranks = get_tensor_model_parallel_world_size()
        # One rank is never apart from others.
        self.unreduced = frozenset(unreduced) if self.ranks > 1 else frozenset()
        self.apart = apart and self.ranks > 1

    def __call__(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor | Pending,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor | Pending, torch.Tensor]:
        """Run the block.

        Args:
            positions: (tokens,), or of three axes (3, tokens).
            hidden_states: (tokens, hidden), for the first block the embedding; for any other what
                the block before it returned, as `residual` is.

        Returns:
            The term that is still to be added to the stream, and the stream, (tokens, hidden).
        """
        if self.ladder:
            return self._ladder(positions, hidden_states, residual)
        if self.unreduced or self.apart:
            return self._desync(positions, hidden_states, residual)
        if self.mode == "parallel_residual":
            return self._parallel_residual(positions, hidden_states, residual)
        if self.mode == "drop_sync":
            # This rank's attention alone is added to what its MLP reads. Not in place, as the norm
            # would: the stream is still needed as it is, and so is the term.
            attention, stream = self._attend(positions, hidden_states, residual)
            mlp, _ = self._feed(None, stream + _sum(attention.joined(), attention.norms))
            return self._all_reduce(attention.beside(mlp)), stream
        term, stream = hidden_states, residual
        if self.attentions:
            attention, stream = self._attend(positions, term, stream)
            term = self._all_reduce(attention)
        if self.mlps:
            mlp, stream = self._feed(term, stream)
            if self.before_ladder:
                return Pending(None, self._start(mlp)), stream
            term = self._all_reduce(mlp)
        return term, stream

    def _terms(self, halves: Sequence[Half], outputs: Sequence[torch.Tensor]) -> Terms:
        norms = tuple(half.after for half in halves if half.after is not None)
        if norms and self.ranks > 1:
            return Terms(tuple(outputs), norms)
        if norms:  # one rank's parts are all there is
            outputs = [norm(output) for norm, output in zip(norms, outputs, strict=True)]
        return Terms((reduce(torch.add, outputs),), ())

    def _all_reduce(self, terms: Terms) -> torch.Tensor:
        return _sum(self.reductions.all_reduce(terms.joined()), terms.norms)

    def _start(self, terms: Terms) -> Sent:
        return Sent(self.reductions.start(terms.joined()), terms.norms)

    def _wait(self, sent: Sent, behind: torch.Tensor) -> torch.Tensor:
        return _sum(self.reductions.wait(sent.flight, behind), sent.norms)

    def _attend(
        self,
        positions: torch.Tensor,
        term: torch.Tensor | None,
        stream: torch.Tensor | None,
    ) -> tuple[Terms, torch.Tensor]:
        """Run this rank's attentions on stream + term, and compute that: either may be missing."""
        first, *others = self.attentions
        normalized, stream = _norm(first.before, term, stream)
        outputs = [first.module(positions, normalized)]
        outputs += [half.module(positions, half.before(stream)) for half in others]
        return self._terms(self.attentions, outputs), stream

    def _feed(
        self, term: torch.Tensor | None, stream: torch.Tensor | None
    ) -> tuple[Terms, torch.Tensor]:
        """Run this rank's MLPs on stream + term, and compute that: either may be missing."""
        first, *others = self.mlps
        normalized, stream = _norm(first.before, term, stream)
        outputs = [first.module(normalized)]
        outputs += [half.module(half.before(stream)) for half in others]
        return self._terms(self.mlps, outputs), stream

    def _parallel_residual(
        self, positions: torch.Tensor, term: torch.Tensor, stream: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.norms_are_alike:
            (attention,), (mlp,) = self.attentions, self.mlps
            normalized, stream = _norm(attention.before, term, stream)
            total = attention.module(positions, normalized) + mlp.module(normalized)
            return self.reductions.all_reduce(total), stream
        attentions, stream = self._attend(positions, term, stream)
        mlps, _ = self._feed(None, stream)
        return self._all_reduce(attentions.beside(mlps)), stream

    def _desync(
        self, positions: torch.Tensor, term: torch.Tensor, stream: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        apart = self.apart
        if self.attentions:
            attention, stream = self._attend(positions, term, stream)
            term, stream = self._reduced("attention", attention, stream, apart)
            apart = "attention" in self.unreduced
        if self.mlps:
            mlp, stream = self._feed(term, stream)
            term, stream = self._reduced("mlp", mlp, stream, apart)
        return term, stream

    def _reduced(
        self, half: str, terms: Terms, stream: torch.Tensor, apart: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Reduce terms, unless they are under `desync`, as none with a norm after it is; with them
        the streams, where they differ."""
        (term,) = terms.parts
        if half in self.unreduced:
            return term, stream
        if not apart:
            return self.reductions.all_reduce(term), stream
        # The sum is the whole stream; nothing is left to add it to.
        return self.reductions.all_reduce(term + stream / self.ranks), torch.zeros_like(stream)

    def _ladder(
        self,
        positions: torch.Tensor,
        pending: torch.Tensor | Pending,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor | Pending, torch.Tensor]:
        if isinstance(pending, Pending):
            # The MLP's all-reduce of the block before is on its way during this attention, and this
            # attention's during this MLP. `behind` is how a compiler knows.
            mlp_before, term = pending.mlp, None
            if pending.attention is not None:
                term = self._wait(pending.attention, pending.mlp.flight.ticket)
        else:
            # The first block, or one after a block that reduces once: the stream is complete.
            mlp_before, term = None, pending
        attention, stream = self._attend(positions, term, residual)
        sent = self._start(attention) if self.before_ladder else None

        term = None
        if mlp_before is not None:
            behind = attention.parts[-1] if sent is None else sent.flight.ticket
            term = self._wait(mlp_before, behind)
        mlp, stream = self._feed(term, stream)
        if sent is not None:
            return Pending(sent, self._start(mlp)), stream
        # What follows reads the complete stream, so that neither term can hide any longer: one
        # all-reduce of both, and on as after a standard block.
        return self._all_reduce(attention.beside(mlp)), stream


def _norm(
    norm: nn.Module, term: torch.Tensor | None, stream: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the norm of stream + term, and stream + term; either may be missing."""
    if term is None:
        return norm(stream), stream
    if stream is None:
        return norm(term), term
    return norm(term, stream)
