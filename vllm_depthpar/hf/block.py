"""A block, from the equations: layers of transformers that run side by side, early, or apart.

Written from the equations, with every layer's own norms, attention and MLP; nothing here is folded
or concatenated. With x the residual stream, and A_i and F_i the attention and the MLP of layer i,
each with its own RMSNorm inside, or, in Gemma's layers, one before it and one after, a block of
layers i runs

    x <- x + sum_i A_i(x)
    x <- x + sum_i F_i(x)

where the terms of missing halves are left out.

A block of one layer is a standard layer; a block of two is Layer Parallelism's pair
(arXiv 2502.02790, section 4). A layer in no block is absent, with its cache (Unified Layer
Skipping, arXiv 2404.06954).

A ladder block (Ladder Residual, arXiv 2501.06589, section 3) reads the stream elsewhere: with y the
stream of the block before it after that block's attention (before the first block: the embedding),

    y, x <- x + sum_i A_i(y), x + sum_i A_i(y) + sum_i F_i(x)

As in the authors' modeling_llama_ladder.py, a standard block before it hands on its y, and one
after it reads the complete x. A block with one all-reduce has no y: after it y is x.

A block of parallel residual (GPT-J, PaLM) runs

    x <- x + sum_i A_i(x) + sum_i F_i(x)

and a drop-sync block (Sync-Point Drop, arXiv 2502.20727) on R tensor-parallel ranks, with A_ir and
F_ir what rank r computes of A_i and F_i,

    a_r = sum_i A_ir(x)
    x <- x + sum_r (a_r + sum_i F_ir(x + a_r))

so that what it means depends on R. A block's heads, and the inner dimension of its MLPs, are those
of its layers one after the other, and a rank has a contiguous R-th of them, as in vLLM; in the
layout "whole" a rank has a contiguous R-th of those of each layer.

Gemma's layers have a norm after each module, too, N_i after the attention and M_i after the MLP, by
which A_i and F_i are no longer sums of what the ranks compute: A_i(x) = N_i(sum_r a_ir(x)). Their
layout is "whole". In a drop-sync block of them a rank's MLPs read the stream and its own
attentions' terms, normalized as if they were whole, since RMSNorm has no scale:

    a_ir = a_ir(x);  f_ir = f_ir(x + sum_j N_j(a_jr))
    x <- x + sum_i N_i(sum_r a_ir) + sum_i M_i(sum_r f_ir)

An MLP of experts is F_i as any other: its router chooses by what the MLP reads, and where ranks
read different streams, each rank's by its own; a rank has an R-th of every expert.

Desync residual (the Ladder authors' gpt_desync): where a sum T of a block, its attentions or its
MLPs, is not reduced, each rank goes on with its own stream, and the next that is makes them one,

    x_r <- x_r + T_r(x_r)           x <- sum_r (x_r / R + T_r(x_r))
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.modeling_layers import GradientCheckpointingLayer

from vllm_depthpar.errors import UserError
from vllm_depthpar.hf.decoder import BY_KIND, of_kind
from vllm_depthpar.hf.ranks import columns, cut_mlp, inputs_of, rows
from vllm_depthpar.plan.families import FAMILIES


class Apart(tuple[Tensor, ...]):
    """The residual streams of the ranks, (batch, tokens, hidden) each, where they differ."""

    __slots__ = ()


Stream: TypeAlias = Tensor | tuple[Tensor, Tensor] | Apart


class ParallelBlock(GradientCheckpointingLayer):
    """Layers that run side by side. `attend` and `feed` are the two sums of the equations.

    Attributes:
        members: transformers' own decoder layers, by their index in the checkpoint.
        mode: of the plan's block, see `vllm_depthpar.plan.Plan.mode`.
        before_ladder: whether the next block is a ladder block.
        ranks: R of the equations.
        unreduced: halves whose sum is not reduced, see `vllm_depthpar.plan.Plan.unreduced`.
        whole: whether each layer is cut into R parts by itself, see `Plan.layout`.
        norms: of each half, see `vllm_depthpar.plan.families.Family.norms`.
        attending, feeding: indices of the members that have an attention, and an MLP.
        plain_attentions, plain_mlps: those of them whose q, k and v, or gate, up and down, are
            three projections.
        multiplier: of what every attention and MLP gives (Granite's `residual_multiplier`).
    """

    def __init__(
        self,
        members: Mapping[int, nn.Module],
        mode: str,
        before_ladder: bool,
        ranks: int = 1,
        drop_attention: Collection[int] = (),
        drop_mlp: Collection[int] = (),
        unreduced: Collection[str] = (),
        whole: bool = False,
        norms: Mapping[str, tuple[str, ...]] = FAMILIES["llama"].norms,
    ) -> None:
        # Not a decoder layer's own constructor (see `restructure`), which would make its weights.
        nn.Module.__init__(self)
        self.members = nn.ModuleDict({str(index): layer for index, layer in members.items()})
        self.mode = mode
        self.before_ladder = before_ladder
        self.ranks = ranks
        self.unreduced = frozenset(unreduced) if ranks > 1 else frozenset()
        self.whole = whole
        self.norms = norms
        self.attending = [index for index in members if index not in drop_attention]
        self.feeding = [index for index in members if index not in drop_mlp]
        self.plain_attentions = [
            i for i in self.attending if hasattr(self._member(i).self_attn, "q_proj")
        ]
        self.plain_mlps = [i for i in self.feeding if hasattr(self._member(i).mlp, "gate_proj")]
        self.multiplier = float(getattr(next(iter(members.values())), "residual_multiplier", 1))

    def forward(self, hidden_states: Stream, *_: Any, **context: Any) -> Stream:
        """Run the block.

        Args:
            hidden_states: the residual stream, (batch, tokens, hidden); for a ladder block that is
                not the first, the pair (x, y) of the equations; or the streams of all ranks.
            context: what transformers hands every attention (rotary embedding, mask, cache), and
                `BY_KIND`, where that differs (see `of_kind`).

        Returns:
            The residual stream after the block, same shape; the pair if a ladder block is next; the
            streams of all ranks if the block's last sum is not reduced.
        """
        context = context | context.pop(BY_KIND, {})
        if self.unreduced or isinstance(hidden_states, Apart):
            after = self._desync(hidden_states, **context)
            # No plan lets a ladder block read what was before this block's MLP.
            return after if isinstance(after, Apart) or not self.before_ladder else (after, after)
        x, y = hidden_states if isinstance(hidden_states, tuple) else (hidden_states, hidden_states)
        if self.mode == "drop_sync" and self.ranks > 1:
            x = y = x + self._without_sync(x, **context)
        elif self.mode == "parallel_residual":
            x = y = x + self.attend(x, **context) + self.feed(x)
        else:
            ladder = self.mode == "ladder"
            y = x + self.attend(y if ladder else x, **context) if self.attending else x
            x = y + self.feed(x if ladder else y) if self.feeding else y
            if self.mode == "drop_sync":
                y = x
        return (x, y) if self.before_ladder else x

    def attend(self, stream: Tensor, **context: Any) -> Tensor:
        """Sum A_i(stream) over the block's layers; shapes as in `forward`."""
        return _total(
            self._given("attention", layer, self._attention(layer, stream, **context))
            for layer in map(self._member, self.attending)
        )

    def feed(self, stream: Tensor) -> Tensor:
        """Sum F_i(stream) over the block's layers; shapes as in `forward`."""
        return _total(
            self._given("mlp", layer, _term(layer.mlp(self.normalized("mlp", layer, stream))))
            for layer in self.feeding_layers
        )

    def read_by_mlp(self, stream: Tensor, **context: Any) -> tuple[Tensor, Apart]:
        """Compute what the MLPs of a standard block read, and what each rank's read of it where the
        attentions' all-reduce is dropped; shapes as in `forward`."""
        attention, terms = self._attentions(stream, **context)
        return stream + attention, Apart(stream + term for term in terms)

    def reads(
        self, half: str, stream: Stream, **context: Any
    ) -> dict[int, list[tuple[slice, Tensor]]]:
        """Compute what the projections of a half read: what its norms make of the stream.

        Returns:
            By layer, rows of its projections and what those read: all rows, or where ranks read
            different streams each rank's of the MLP. Nothing under `desync`, nor of experts or
            projections in one.
        """
        if self.unreduced or isinstance(stream, Apart):
            return {}
        x, y = stream if isinstance(stream, tuple) else (stream, stream)
        if half == "attention":
            members, read = self.plain_attentions, y if self.mode == "ladder" else x
        elif self.mode == "drop_sync" and self.ranks > 1:
            _, of_ranks = self.read_by_mlp(x, **context)
            return {index: self._reads_of_ranks(index, of_ranks) for index in self.plain_mlps}
        else:
            members, read = self.plain_mlps, x
            if self.attending and self.mode not in ("ladder", "parallel_residual"):
                read = x + self.attend(x, **context)
        every = slice(None)
        return {
            index: [(every, self.normalized(half, self._member(index), read))] for index in members
        }

    def _reads_of_ranks(self, index: int, streams: Apart) -> list[tuple[slice, Tensor]]:
        layer = self._member(index)
        size = layer.mlp.up_proj.out_features
        shares = self._shares(len(self.feeding), self.feeding.index(index), size)
        return [(mine, self.normalized("mlp", layer, streams[rank])) for rank, mine in shares]

    def _attention(self, layer: Any, stream: Tensor, **context: Any) -> Tensor:
        normalized = self.normalized("attention", layer, stream)
        return cast(Tensor, layer.self_attn(normalized, **of_kind(layer, context))[0])

    def normalized(self, half: str, layer: Any, stream: Tensor) -> Tensor:
        """Compute the norm before a layer's attention or MLP."""
        return cast(Tensor, getattr(layer, self.norms[half][0])(stream))

    def _given(self, half: str, layer: Any, term: Tensor) -> Tensor:
        """Compute what is added of what a module gives: the norm of it, if there is one after the
        module, and so many times it."""
        for norm in self.norms[half][1:]:
            term = getattr(layer, norm)(term)
        return term if self.multiplier == 1 else term * self.multiplier

    def _member(self, index: int) -> Any:
        return self.members[str(index)]

    def _without_sync(self, x: Tensor, **context: Any) -> Tensor:
        """Sum a_r and f_r over the ranks."""
        attention, terms = self._attentions(x, **context)
        mlp, _ = self._mlps(Apart(x + term for term in terms))
        return attention + mlp

    def _desync(self, before: Stream, **context: Any) -> Tensor | Apart:
        """Run both halves, each reduced or not."""
        # A block that no ladder block follows may stand after one that hands on a pair.
        stream = before if isinstance(before, Tensor | Apart) else before[0]
        if self.attending:
            stream = self._added("attention", stream, *self._attentions(stream, **context))
        if self.feeding:
            stream = self._added("mlp", stream, *self._mlps(stream))
        return stream

    def _added(
        self, half: str, stream: Tensor | Apart, total: Tensor, terms: list[Tensor]
    ) -> Tensor | Apart:
        """Add the sum of a half to the stream, reduced or not."""
        if half in self.unreduced:
            return Apart(map(torch.add, self._of_ranks(stream), terms))
        if isinstance(stream, Apart):
            return _total(x / self.ranks for x in stream) + total
        return stream + total

    def _of_ranks(self, stream: Tensor | Apart) -> Sequence[Tensor]:
        return stream if isinstance(stream, Apart) else [stream] * self.ranks

    def _attentions(self, stream: Tensor | Apart, **context: Any) -> tuple[Tensor, list[Tensor]]:
        """Compute sum_r T_r(x_r), and the terms T_r(x_r), of attentions on each rank's stream."""
        total = torch.zeros_like(self._of_ranks(stream)[0])
        terms = [total] * self.ranks
        for member, layer in enumerate(map(self._member, self.attending)):
            attention, output = layer.self_attn, layer.self_attn.o_proj
            with inputs_of(output) as seen:
                if isinstance(stream, Apart):
                    normalized = [self.normalized("attention", layer, x) for x in stream]
                    with self._cut(attention, member, normalized):
                        own = self._attention(layer, stream[0], **context)
                else:
                    own = self._attention(layer, stream, **context)
            total = total + self._given("attention", layer, own)
            parts = {
                rank: columns(output, seen[0], mine)
                for rank, mine in self._shares(len(self.attending), member, seen[0].shape[-1])
            }
            if getattr(output, "bias", None) is not None:
                first = self._rank_of_bias(len(self.attending), member)
                parts[first] = parts.get(first, 0) + output.bias
            for rank, part in parts.items():
                terms[rank] = terms[rank] + self._given("attention", layer, part)
        return total, terms

    def _mlps(self, stream: Tensor | Apart) -> tuple[Tensor, list[Tensor]]:
        """Compute the same of MLPs; the terms only where they are not reduced."""
        streams = self._of_ranks(stream)
        total = torch.zeros_like(streams[0])
        terms = [total] * self.ranks
        for member, layer in enumerate(self.feeding_layers):
            if self.feeding[member] not in self.plain_mlps:
                whole_parts = self._parts_of_mlp(layer, streams)
                total = total + self._given("mlp", layer, _total(whole_parts))
                if "mlp" in self.unreduced:
                    given = (self._given("mlp", layer, part) for part in whole_parts)
                    terms = list(map(torch.add, terms, given))
                continue
            gate, up, down = layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj
            shares = list(self._shares(len(self.feeding), member, up.out_features))
            parts = []
            for rank, mine in shares:
                x = self.normalized("mlp", layer, streams[rank])
                parts.append(layer.mlp.act_fn(rows(gate, x, mine)) * rows(up, x, mine))
            # Its columns are cut as these rows are: the sum over ranks is one product.
            inner = torch.cat(parts, -1)
            total = total + self._given("mlp", layer, down(inner))
            if "mlp" not in self.unreduced:
                continue
            for rank, mine in shares:
                part = self._given("mlp", layer, columns(down, inner, mine))
                terms[rank] = terms[rank] + part
            if getattr(down, "bias", None) is not None:
                first = self._rank_of_bias(len(self.feeding), member)
                terms[first] = terms[first] + down.bias * self.multiplier
        return total, terms

    def _parts_of_mlp(self, layer: Any, streams: Sequence[Tensor]) -> list[Tensor]:
        """Compute each rank's part of an MLP, of whatever tensors, on its stream."""
        cut = cut_mlp(dict(layer.mlp.named_parameters()), self.ranks)
        return [
            _term(functional_call(layer.mlp, mine, self.normalized("mlp", layer, stream)))
            for mine, stream in zip(cut, streams, strict=True)
        ]

    @contextmanager
    def _cut(self, attention: Any, member: int, streams: list[Tensor]) -> Iterator[None]:
        """Let an attention's projections take each rank's heads from that rank's stream."""
        members, _ = self._cut_together(len(self.attending), member)
        kv_heads = members * attention.k_proj.out_features // attention.head_dim
        if kv_heads % self.ranks:
            raise UserError(
                f"{self.ranks} ranks share {kv_heads} KV heads, and under 'desync' each has its "
                f"own; allowed: to serve it, or numbers of ranks that divide them"
            )

        def by_rank(linear: Any, *_: object) -> Tensor:
            shares = self._shares(len(self.attending), member, linear.out_features)
            return torch.cat([rows(linear, streams[rank], mine) for rank, mine in shares], -1)

        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        hooks = [linear.register_forward_hook(by_rank) for linear in projections]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _rank_of_bias(self, members: int, member: int) -> int:
        """Find the rank that adds a layer's output bias: vLLM's layers do it on their first."""
        members, member = self._cut_together(members, member)
        return member * self.ranks // members if self.ranks % members == 0 else 0

    def _shares(self, members: int, member: int, size: int) -> Iterator[tuple[int, slice]]:
        """List the ranks that have a part of a layer's dimension of a size, and which part."""
        members, member = self._cut_together(members, member)
        per_rank, rest = divmod(members * size, self.ranks)
        if rest:
            raise UserError(
                f"{self.ranks} ranks can't cut {members} times {size} evenly; allowed: "
                f"tensor-parallel sizes that fit the plan"
            )
        for rank in range(self.ranks):
            low = max(member * size, rank * per_rank) - member * size
            high = min((member + 1) * size, (rank + 1) * per_rank) - member * size
            if low < high:
                yield rank, slice(low, high)

    def _cut_together(self, members: int, member: int) -> tuple[int, int]:
        """Say of how many layers' dimensions one is made that is cut, and which of them this is."""
        return (1, 0) if self.whole else (members, member)

    @property
    def feeding_layers(self) -> list[Any]:
        """Those of the original decoder layers that have an MLP."""
        return [self._member(index) for index in self.feeding]

    @property
    def layers(self) -> list[GradientCheckpointingLayer]:
        """The original decoder layers."""
        return list(self.members.values())


def neurons(layer: Any, normalized: Tensor) -> Tensor:
    """Compute what a layer's down projection reads, (..., intermediate), where gate and up read
    `normalized`."""
    inner: Tensor = layer.mlp.act_fn(layer.mlp.gate_proj(normalized)) * layer.mlp.up_proj(
        normalized
    )
    return inner


def _term(given: Any) -> Tensor:
    """Take what an MLP computes: gpt-oss's give their router's scores, too."""
    return cast(Tensor, given[0] if isinstance(given, tuple) else given)


def _total(terms: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, terms)
