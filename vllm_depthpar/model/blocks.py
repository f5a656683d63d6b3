"""Blocks of a plan as decoder layers: one term of attention and one of MLP each, reduced by us.

Layer Parallelism: arXiv 2502.02790, equation 2. Ladder Residual: arXiv 2501.06589, section 3.
Sync-Point Drop: arXiv 2502.20727, section 3. Desync residual: gpt_desync in Ladder Residual's code.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.model_executor.models.utils import AutoWeightsLoader

from vllm_depthpar.model.attention import attention_of
from vllm_depthpar.model.reductions import InFlight, Reductions
from vllm_depthpar.plan.families import family_of
from vllm_depthpar.vllm_compat import member_of_this_rank, narrowed_tensor_parallel

Weights = Iterable[tuple[str, torch.Tensor]]


class Pending(NamedTuple):
    """What a block hands to a ladder block in place of one term: two that may be on their way.

    Attributes:
        attention: to be added before the next attention; None if the stream has it already.
        mlp: to be added before the next MLP.
    """

    attention: InFlight | None
    mlp: InFlight


class BlockDecoderLayer(LlamaDecoderLayer):
    """One block of a plan, of any mode, with its all-reduces in our hands.

    vLLM's decoder layers pass on (hidden_states, residual): a term, and the stream that the next
    layer's norm adds it to. So do these; to a ladder block the term is a `Pending`. Either kind of
    block adds inside its two norms and nowhere else, as a plain layer does. Blocks that reduce once
    add their two terms, too.
    """

    # Whether both norms are the same: gains folded in, both read one normalized stream.
    norms_are_alike = False

    def __init__(
        self,
        vllm_config: VllmConfig,
        prefix: str,
        config: PreTrainedConfig | None = None,
        attends: bool = True,
        feeds: bool = True,
    ) -> None:
        """Build the block.

        Args:
            config: of the layer (the model's).
            attends, feeds: whether it has an attention and an MLP; without, it has no weights and
                no KV cache of that half, and no norm before it.
        """
        family = family_of(vllm_config.model_config.hf_config.to_dict())
        attention = attention_of(family) if attends else _Absent
        super().__init__(vllm_config, prefix, config, attn_layer_type=attention)
        self.attends, self.feeds = attends, feeds
        if not attends:
            del self.self_attn, self.input_layernorm
        if not feeds:
            del self.mlp, self.post_attention_layernorm

    def take_over_all_reduces(
        self,
        mode: str,
        before_ladder: bool,
        unreduced: Collection[str],
        apart: bool,
    ) -> None:
        """Switch vLLM's all-reduces of this block off: from here on `reductions` runs them.

        After the layer is built, and not while it is: a dealt layer is built in its member's share
        of the ranks, and these all-reduces are over all of them.

        Args:
            mode: of the block, see `vllm_depthpar.plan.Plan.mode`.
            before_ladder: whether the next block is a ladder block.
            unreduced, apart: see `Plan.unreduced` and `Plan.is_apart`.
        """
        self.mode = mode
        self.ladder = mode == "ladder"
        self.before_ladder = before_ladder
        self.reductions = Reductions()
        self.ranks = get_tensor_model_parallel_world_size()
        # One rank is never apart from others.
        self.unreduced = frozenset(unreduced) if self.ranks > 1 else frozenset()
        self.apart = apart and self.ranks > 1
        if self.attends:
            self.self_attn.o_proj.reduce_results = False
        if self.feeds:
            self.mlp.down_proj.reduce_results = False

    def forward(
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
        if not self.attends:
            return self._feed(hidden_states, residual)
        hidden_states, residual = _norm(self.input_layernorm, hidden_states, residual)
        if self.mode == "parallel_residual":
            return self._parallel_residual(positions, hidden_states, residual)
        if self.mode == "drop_sync":
            # This rank's attention alone is added to what its MLP reads. Not in place, as the norm
            # would: the stream is still needed as it is, and so is the term.
            attention = self.self_attn(positions, hidden_states)
            mlp = self.mlp(self.post_attention_layernorm(residual + attention))
            return self.reductions.all_reduce(attention + mlp), residual
        attention = self.reductions.all_reduce(self.self_attn(positions, hidden_states))
        return self._feed(attention, residual) if self.feeds else (attention, residual)

    def _feed(
        self, term: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor | Pending, torch.Tensor]:
        """Run the MLP of a standard block, on the stream and a term that is to be added to it."""
        hidden_states, residual = _norm(self.post_attention_layernorm, term, residual)
        mlp = self.mlp(hidden_states)
        if self.before_ladder:
            return Pending(None, self.reductions.start(mlp)), residual
        return self.reductions.all_reduce(mlp), residual

    def _parallel_residual(
        self, positions: torch.Tensor, normalized: torch.Tensor, stream: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        attention = self.self_attn(positions, normalized)
        if not self.norms_are_alike:
            normalized = self.post_attention_layernorm(stream)
        return self.reductions.all_reduce(attention + self.mlp(normalized)), stream

    def _desync(
        self, positions: torch.Tensor, term: torch.Tensor, stream: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        apart = self.apart
        if self.attends:
            normalized, stream = _norm(self.input_layernorm, term, stream)
            term, stream = self._reduced(
                "attention", self.self_attn(positions, normalized), stream, apart
            )
            apart = "attention" in self.unreduced
        if self.feeds:
            normalized, stream = _norm(self.post_attention_layernorm, term, stream)
            term, stream = self._reduced("mlp", self.mlp(normalized), stream, apart)
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
        hidden_states, residual = _norm(self.input_layernorm, term, residual)
        attention = self.self_attn(positions, hidden_states)
        flight = self.reductions.start(attention) if self.before_ladder else None

        term = None
        if mlp_before is not None:
            behind = attention if flight is None else flight.ticket
            term = self.reductions.wait(mlp_before, behind)
        hidden_states, residual = _norm(self.post_attention_layernorm, term, residual)
        mlp = self.mlp(hidden_states)
        if flight is not None:
            return Pending(flight, self.reductions.start(mlp)), residual
        # What follows reads the complete stream, so that neither term can hide any longer: one
        # all-reduce of their sum, and on as after a standard block.
        return self.reductions.all_reduce(attention + mlp), residual


def _norm(
    norm: RMSNorm, term: torch.Tensor | None, stream: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the norm of stream + term, and stream + term; either may be missing."""
    if term is None:
        return norm(stream), stream
    if stream is None:
        return norm(term), term
    return norm(term, stream)


class _Absent(nn.Module):
    """In place of an attention that is not there."""

    def __init__(self, **_: object) -> None:
        super().__init__()


class DealtDecoderLayer(BlockDecoderLayer):
    """A block of m layers where m divides TP: each rank holds a shard of one member only.

    The ranks are dealt out to the members in contiguous groups of TP / m, which is the paper's
    placement. On its rank a member is an ordinary decoder layer with its own norms, nothing is
    folded, and any quantization works; the all-reduce over all ranks sums shards and members.
    """

    def __init__(self, vllm_config: VllmConfig, prefix: str, members: int) -> None:
        self.members = members
        self.member = member_of_this_rank(members)
        with narrowed_tensor_parallel(members):
            super().__init__(vllm_config, prefix)

    def load_weights(self, weights: Weights) -> set[str]:
        """Load this rank's member from ("member.parameter", full tensor) pairs."""
        mine = f"{self.member}."
        with narrowed_tensor_parallel(self.members):
            return AutoWeightsLoader(self).load_weights(
                (name.removeprefix(mine), tensor)
                for name, tensor in weights
                if name.startswith(mine)
            )
