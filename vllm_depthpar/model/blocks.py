"""Blocks of a plan: the terms of their members, one of attention and one of MLP, reduced by us.

Layer Parallelism: arXiv 2502.02790, equation 2. Ladder Residual: arXiv 2501.06589, section 3.
Sync-Point Drop: arXiv 2502.20727, section 3. Desync residual: gpt_desync in Ladder Residual's code.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.layernorm import RMSNorm

from vllm_depthpar.model.decoder_layers import DecoderLayer
from vllm_depthpar.model.reductions import InFlight, Reductions


class Pending(NamedTuple):
    """What a block hands to a ladder block in place of one term: two that may be on their way.

    Attributes:
        attention: to be added before the next attention; None if the stream has it already.
        mlp: to be added before the next MLP.
    """

    attention: InFlight | None
    mlp: InFlight


class Block:
    """One block of a plan, of any mode, with its all-reduces in our hands.

    No module: its members are the model's, under the names that they have in the checkpoint. A
    block is one decoder layer, or several whose terms it sums on each rank.

    vLLM's decoder layers pass on (hidden_states, residual): a term, and the stream that the next
    layer's norm adds it to. So do blocks; to a ladder block the term is a `Pending`. Either kind of
    block adds inside its norms and nowhere else, as a plain layer does. Blocks that reduce once
    add their two terms, too.
    """

    def __init__(
        self,
        attentions: Sequence[DecoderLayer],
        mlps: Sequence[DecoderLayer],
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
        self.attentions, self.mlps = tuple(attentions), tuple(mlps)
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
            positions: (tokens,).
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
            mlp, _ = self._feed(None, stream + attention)
            return self.reductions.all_reduce(attention + mlp), stream
        term, stream = hidden_states, residual
        if self.attentions:
            attention, stream = self._attend(positions, term, stream)
            term = self.reductions.all_reduce(attention)
        if self.mlps:
            mlp, stream = self._feed(term, stream)
            if self.before_ladder:
                return Pending(None, self.reductions.start(mlp)), stream
            term = self.reductions.all_reduce(mlp)
        return term, stream

    def _attend(
        self,
        positions: torch.Tensor,
        term: torch.Tensor | None,
        stream: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum this rank's attentions of stream + term, and that: either may be missing."""
        first, *others = self.attentions
        normalized, stream = _norm(first.input_layernorm, term, stream)
        attention = first.self_attn(positions, normalized)
        for layer in others:
            attention = attention + layer.self_attn(positions, layer.input_layernorm(stream))
        return attention, stream

    def _feed(
        self, term: torch.Tensor | None, stream: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum this rank's MLPs of stream + term, and that: either may be missing."""
        first, *others = self.mlps
        normalized, stream = _norm(first.post_attention_layernorm, term, stream)
        mlp = first.mlp(normalized)
        for layer in others:
            mlp = mlp + layer.mlp(layer.post_attention_layernorm(stream))
        return mlp, stream

    def _parallel_residual(
        self, positions: torch.Tensor, term: torch.Tensor, stream: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        first = self.attentions[0]
        if first.norms_are_alike:
            normalized, stream = _norm(first.input_layernorm, term, stream)
            attention, mlp = first.self_attn(positions, normalized), first.mlp(normalized)
        else:
            attention, stream = self._attend(positions, term, stream)
            mlp, _ = self._feed(None, stream)
        return self.reductions.all_reduce(attention + mlp), stream

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
        self, half: str, term: torch.Tensor, stream: torch.Tensor, apart: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Reduce a term, unless it is under `desync`; with it the streams, where they differ."""
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
                term = self.reductions.wait(pending.attention, behind=pending.mlp.ticket)
        else:
            # The first block, or one after a block that reduces once: the stream is complete.
            mlp_before, term = None, pending
        attention, stream = self._attend(positions, term, residual)
        flight = self.reductions.start(attention) if self.before_ladder else None

        term = None
        if mlp_before is not None:
            behind = attention if flight is None else flight.ticket
            term = self.reductions.wait(mlp_before, behind)
        mlp, stream = self._feed(term, stream)
        if flight is not None:
            return Pending(flight, self.reductions.start(mlp)), stream
        # What follows reads the complete stream, so that neither term can hide any longer: one
        # all-reduce of their sum, and on as after a standard block.
        return self.reductions.all_reduce(attention + mlp), stream


def _norm(
    norm: RMSNorm, term: torch.Tensor | None, stream: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the norm of stream + term, and stream + term; either may be missing."""
    if term is None:
        return norm(stream), stream
    if stream is None:
        return norm(term), term
    return norm(term, stream)
