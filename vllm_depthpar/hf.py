"""The same plans on transformers: the reference that serving is compared with, and trainable.

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

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from vllm_depthpar.checkpoint import ladder_config
from vllm_depthpar.checkpoint.config import read_config, read_tensors
from vllm_depthpar.checkpoint.experts import stacked
from vllm_depthpar.checkpoint.quantized import dequantizer
from vllm_depthpar.checkpoint.tensors import (
    WEIGHTS,
    check_files,
    check_folder,
    has_safetensors,
    split_name,
    stored,
)
from vllm_depthpar.errors import UserError
from vllm_depthpar.plan import Plan, resolve
from vllm_depthpar.plan.families import FAMILIES, Family, family_of
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.plan.multimodal import CLASSES, language_config
from vllm_depthpar.plan.plan import Half, halves_of
from vllm_depthpar.plan.precedence import KEY
from vllm_depthpar.plan.spec import WHOLE


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
            with _inputs_of(output) as seen:
                if isinstance(stream, Apart):
                    normalized = [self.normalized("attention", layer, x) for x in stream]
                    with self._cut(attention, member, normalized):
                        own = self._attention(layer, stream[0], **context)
                else:
                    own = self._attention(layer, stream, **context)
            total = total + self._given("attention", layer, own)
            parts = {
                rank: _columns(output, seen[0], mine)
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
                parts.append(layer.mlp.act_fn(_rows(gate, x, mine)) * _rows(up, x, mine))
            # Its columns are cut as these rows are: the sum over ranks is one product.
            inner = torch.cat(parts, -1)
            total = total + self._given("mlp", layer, down(inner))
            if "mlp" not in self.unreduced:
                continue
            for rank, mine in shares:
                part = self._given("mlp", layer, _columns(down, inner, mine))
                terms[rank] = terms[rank] + part
            if getattr(down, "bias", None) is not None:
                first = self._rank_of_bias(len(self.feeding), member)
                terms[first] = terms[first] + down.bias * self.multiplier
        return total, terms

    def _parts_of_mlp(self, layer: Any, streams: Sequence[Tensor]) -> list[Tensor]:
        """Compute each rank's part of an MLP, of whatever tensors, on its stream."""
        cut = _cut_mlp(dict(layer.mlp.named_parameters()), self.ranks)
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
            return torch.cat([_rows(linear, streams[rank], mine) for rank, mine in shares], -1)

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


def _cut_mlp(weights: Mapping[str, Tensor], ranks: int) -> list[dict[str, Tensor]]:
    """Cut the weights of an MLP, many experts or one, by transformers' names, into those of ranks.

    Raises:
        UserError: the ranks can't share it.
    """
    part_of = _part_of_stacked if "experts.down_proj_bias" in weights else _part_of
    return [
        {name: part_of(name, weight, rank, ranks) for name, weight in weights.items()}
        for rank in range(ranks)
    ]


def _term(given: Any) -> Tensor:
    """Take what an MLP computes: gpt-oss's give their router's scores, too."""
    return cast(Tensor, given[0] if isinstance(given, tuple) else given)


def _part_of_stacked(name: str, weight: Tensor, rank: int, ranks: int) -> Tensor:
    if "gate_up_proj" in name:  # (experts, hidden, both), a neuron's gate and up side by side
        return _part(weight, rank, ranks, dim=-1)
    if name.endswith("down_proj"):
        return _part(weight, rank, ranks, dim=-2)
    if name.endswith("down_proj_bias") and rank:  # of the first rank
        return torch.zeros_like(weight)
    return weight


def _part_of(name: str, weight: Tensor, rank: int, ranks: int) -> Tensor:
    if "gate_up_proj" in name:  # (both, hidden), or of all experts (experts, both, hidden)
        halves = weight.chunk(2, -2)
        return torch.cat([_part(half, rank, ranks, dim=-2) for half in halves], -2)
    if "down_proj" in name:
        return _part(weight, rank, ranks, dim=-1)
    if "gate_proj" in name or "up_proj" in name:
        return _part(weight, rank, ranks, dim=-2)
    return weight  # of the router, which every rank has


def _part(weight: Tensor, rank: int, ranks: int, dim: int) -> Tensor:
    size = weight.shape[dim]
    if size % ranks:
        raise UserError(
            f"{ranks} ranks can't cut {size} evenly; allowed: tensor-parallel sizes that fit the "
            f"plan"
        )
    return weight.narrow(dim, rank * size // ranks, size // ranks)


@contextmanager
def _inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Record what a module is given meanwhile; it computes all the same."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        hook.remove()


def _columns(linear: nn.Module, inputs: Tensor, mine: slice) -> Tensor:
    """Compute a rank's part of a projection that is cut along its inputs; without the bias."""
    if isinstance(linear, nn.Linear):
        return nn.functional.linear(inputs[..., mine], linear.weight[:, mine])
    # An adapter around one: it is linear, so what it makes of the others' zeros is its bias.
    zeros = torch.zeros_like(inputs)
    alone = torch.cat([zeros[..., : mine.start], inputs[..., mine], zeros[..., mine.stop :]], -1)
    return cast(Tensor, linear(alone) - linear(zeros[:1]))


def _rows(linear: nn.Module, inputs: Tensor, mine: slice) -> Tensor:
    """Compute a rank's part of a projection that is cut along its outputs."""
    if isinstance(linear, nn.Linear):
        bias = None if linear.bias is None else linear.bias[mine]
        return nn.functional.linear(inputs, linear.weight[mine], bias)
    return cast(Tensor, linear.forward(inputs)[..., mine])  # without hooks: one may call this


def load(
    path: str | PathLike[str],
    spec: object = None,
    dtype: torch.dtype = torch.float32,
    ranks: int | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a checkpoint and restructure it.

    Args:
        path: folder of the checkpoint. Weights that compressed-tensors, GPTQ or AWQ quantized are
            dequantized.
        spec: a `Plan`, or a spec that `vllm_depthpar.plan.resolve` takes; None for the plan that
            the checkpoint's config.json carries.
        dtype: what the weights are converted to.
        ranks: the tensor-parallel size whose model it is to be (default: the plan's `tp`, else 1);
            it matters to `drop_sync` and `desync` alone.
        kwargs: more arguments of `from_pretrained`. Pickled weights are read only where they say
            ``use_safetensors=False``.

    Returns:
        The model, in evaluation mode.

    Raises:
        UserError: the plan is wrong, or the checkpoint of no family that can be restructured, or
            its tensors are not what its config.json says; before weights load.
        OSError: there is no checkpoint at `path`.
    """
    config = config_of(path)
    text = language_config(config.to_dict())
    if spec is None and text.get(KEY) is None:
        raise UserError(f"{path} carries no plan; allowed: a spec, or a checkpoint that does")
    if not isinstance(spec, Plan):
        spec = resolve(text[KEY] if spec is None else spec, text["num_hidden_layers"])
    _check_layers(spec, text["num_hidden_layers"])
    return restructure(_weights(path, config, dtype, absent=spec.absent, **kwargs), spec, ranks)


def load_unmodified(
    path: str | PathLike[str],
    dtype: torch.dtype = torch.float32,
    absent: Collection[Half] = (),
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a checkpoint as transformers does; arguments and errors as `load`.

    Args:
        absent: halves of layers that the checkpoint may lack; what they then hold means nothing.
    """
    return _weights(path, config_of(path), dtype, absent, **kwargs)


def outline(path: str | PathLike[str], plan: Plan, device: torch.device) -> PreTrainedModel:
    """Make a checkpoint's model, restructured, without its weights: they are on the device "meta".

    Args:
        path: folder of the checkpoint.
        plan: a plan for its number of layers; for so many ranks as its `tp` says.
        device: what its rotary embedding, which has no weights, is made for.

    Raises:
        UserError, OSError: see `load`.
    """
    config = config_of(path)
    with _by_transformers(path):
        model = _without_weights(config, device)
    return restructure(model.eval(), plan)


def _model_type(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Find transformers' class for a checkpoint of one of our families."""
    name = CLASSES.get(config.model_type) or _family(config).architectures[0]
    found: type[PreTrainedModel] = getattr(transformers, name)
    return found


def _family(config: PreTrainedConfig) -> Family:
    return family_of(language_config(config.to_dict()))


def _without_weights(config: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    """Make a model with weights on the device "meta", and what no checkpoint has on `device`."""
    with torch.device("meta"):
        model = _model_type(config)(config)
    inner = body(model)
    with device:
        inner.rotary_emb = type(inner.rotary_emb)(inner.config)
        if hasattr(inner.embed_tokens, "embed_scale"):
            inner.embed_tokens.embed_scale = torch.tensor(inner.embed_tokens.scalar_embed_scale)
    return model


def body(model: PreTrainedModel) -> Any:
    """Find a model's decoder, of a multimodal one that of its language model: embedding, layers,
    last norm, rotary embedding."""
    return getattr(model.model, "language_model", model.model)


def config_of(path: str | PathLike[str]) -> PreTrainedConfig:
    """Read the config.json of a checkpoint folder; errors as `load`."""
    ladder_config.register()
    if (Path(path) / "config.json").exists():
        read_config(str(path))  # before transformers does, whose errors are not for users
    with _by_transformers(path):
        config = AutoConfig.from_pretrained(path)
    if _family(config).caps_scores:  # which transformers' faster attentions leave out
        config._attn_implementation = "eager"
    return config


@contextmanager
def _by_transformers(path: str | PathLike[str]) -> Iterator[None]:
    """Say in one line what transformers can't make of a checkpoint: its errors are of any kind."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"transformers can't load {path} ({why}); allowed: checkpoints that it can"
        ) from error


def _weights(
    path: str | PathLike[str],
    config: PreTrainedConfig,
    dtype: torch.dtype,
    absent: Collection[Half] = (),
    **kwargs: Any,
) -> PreTrainedModel:
    """Load all layers. Those `absent` need not be in the checkpoint: exported ones lack them."""
    check_files(Path(path))
    if kwargs.get("use_safetensors", True):
        if Path(path).is_dir() and not has_safetensors(Path(path)):
            raise UserError(
                f"{path} has no {WEIGHTS}; allowed: safetensors checkpoints, or "
                f"use_safetensors=False for pickled ones"
            )
        text = language_config(config.to_dict())
        run = halves_of(range(text["num_hidden_layers"])).difference(absent)
        check_folder(Path(path), text, run)
    quantized = getattr(config, "quantization_config", None) is not None
    with _by_transformers(path):
        if quantized:
            model, not_there = _dequantized(Path(path), config, dtype)
        else:
            options = {"use_safetensors": True, **kwargs}
            model, report = _model_type(config).from_pretrained(
                path, config=config, dtype=dtype, output_loading_info=True, **options
            )
            not_there = report["missing_keys"]
    places = filter(None, map(split_name, not_there))
    missing = {(layer, _family(config).half_of(rest)) for _, layer, rest in places}
    if lost := sorted(missing.difference(absent)):
        raise UserError(
            f"weights of layer {lost[0][0]} are not in {path}; allowed: plans of its other layers"
        )
    return cast(PreTrainedModel, model)


def _dequantized(
    path: Path, config: PreTrainedConfig, dtype: torch.dtype
) -> tuple[PreTrainedModel, list[str]]:
    """Load a quantized checkpoint as what it stands for; and list what it does not hold."""
    dequantize = dequantizer(path)
    del config.quantization_config
    model = _without_weights(config, torch.device("cpu"))
    names = list(stored(path))
    tensors = dequantize(dict(read_tensors(str(path), names)))
    if (experts := _family(config).experts) is not None:
        tensors = stacked(tensors, experts)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    report = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return model.eval(), sorted(set(report.missing_keys) - tied)


def restructure(model: PreTrainedModel, plan: Plan, ranks: int | None = None) -> PreTrainedModel:
    """Apply a plan to a model, in place.

    The kept layers stay the modules they were, without the halves that the plan drops. Those with
    an attention are renumbered in the order they run, so that caches have one slot for each.

    Args:
        model: a model as loaded, not restructured before.
        plan: a plan for its number of layers.
        ranks: see `load`.

    Returns:
        The same model.

    Raises:
        UserError: the plan is for another number of layers, or none for such a model, or the model
            was restructured before.
    """
    inner = body(model)
    layers, config = inner.layers, inner.config
    if any(isinstance(layer, ParallelBlock) for layer in layers):
        raise UserError("the model is already restructured; allowed: a model as loaded")
    _check_layers(plan, len(layers))
    shape = ModelShape.from_config(language_config(model.config.to_dict()))
    shape.check_plan(plan)
    norms = shape.family.norms
    attentions = [index for at in range(plan.depth) for index in plan.attention(at)]
    for slot, index in enumerate(attentions):
        layers[index].self_attn.layer_idx = slot
    for index in plan.drop_attention:
        _delete(layers[index], "self_attn", *norms["attention"])
    for index in plan.drop_mlp:
        _delete(layers[index], "mlp", *norms["mlp"])
    # Decoder layers to transformers: gradient checkpointing, the recording of hidden states and
    # device maps treat them as such.
    block_type = type("ParallelBlock", (ParallelBlock, type(layers[0])), {})
    inner.layers = nn.ModuleList(
        block_type(
            {index: layers[index] for index in block},
            plan.mode(position),
            before_ladder=plan.is_ladder(position + 1),
            ranks=ranks or plan.tp or 1,
            drop_attention=plan.drop_attention,
            drop_mlp=plan.drop_mlp,
            unreduced=plan.unreduced(position),
            whole=plan.layout == WHOLE or shape.always_whole,
            norms=norms,
        )
        for position, block in enumerate(plan.blocks)
    )
    # transformers runs so many blocks, and gives caches so many slots, which are empty at first.
    count = max(plan.depth, len(attentions))
    config.num_hidden_layers = count
    if kinds := getattr(config, "layer_types", None):
        # A cache has slots of the kinds that are named here, and those are the attentions'.
        of_slots = [kinds[index] for index in attentions]
        config.layer_types = of_slots + of_slots[-1:] * (count - len(of_slots))
        if len(set(kinds)) > 1:
            inner.register_forward_pre_hook(_tell_kinds, with_kwargs=True)
    return model


# The argument of every block under which it finds what differs with the kind of attention:
# transformers hands it that of the layer that was in its place.
BY_KIND = "by_kind"


def of_kind(layer: Any, context: Mapping[str, Any]) -> dict[str, Any]:
    """Choose what a layer's attention takes beside the stream, of what `context` makes."""
    kind = getattr(layer.self_attn, "layer_type", None)

    def of(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        if kind is not None:
            return value[kind]
        (alike,) = value.values()  # attentions that don't say what they are are of one kind
        return alike

    return {name: of(value) for name, value in context.items()}


def _tell_kinds(
    body: Any, args: tuple[Any, ...], given: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Add `BY_KIND` to what a decoder's forward is given."""
    given = dict(zip(("input_ids", "attention_mask", "position_ids"), args, strict=False)) | given
    stream, cache = given.get("inputs_embeds"), given.get("past_key_values")
    if stream is None:
        stream = body.embed_tokens(given.pop("input_ids"))
    if (positions := given.get("position_ids")) is None:
        begin = cache.get_seq_length() if cache is not None else 0
        positions = torch.arange(stream.shape[1], device=stream.device)[None] + begin
    by_kind = _context(body, stream, positions, given.get("attention_mask"), cache)
    return (), {**given, "inputs_embeds": stream, "position_ids": positions, BY_KIND: by_kind}


def context(model: PreTrainedModel, stream: Tensor) -> dict[str, Any]:
    """Make what blocks take beside the stream, for whole texts without padding.

    What differs with the kind of attention is a mapping of kinds: a layer that is no block takes
    what `of_kind` chooses.

    Args:
        model: restructured or not.
        stream: what the layers are to run on, (batch, tokens, hidden).
    """
    positions = torch.arange(stream.shape[1], device=stream.device)[None]
    return _context(body(model), stream, positions)


def _context(
    body: Any, stream: Tensor, positions: Tensor, mask: Any = None, cache: Any = None
) -> dict[str, Any]:
    config, rotary = body.config, body.rotary_emb
    given = {"attention_mask": mask, "past_key_values": cache}
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        windowed = getattr(config, "sliding_window", None)
        masks = _MASKS[_SLIDING if windowed else _FULL](config, stream, **given)
    elif isinstance(mask, Mapping):  # made by `generate`
        masks = mask
    else:
        masks = {kind: _MASKS[kind](config, stream, **given) for kind in set(kinds)}
    of_kinds = getattr(rotary, "layer_types", None)  # with parameters of their own
    return {
        "position_embeddings": rotary(stream, positions)
        if of_kinds is None
        else {kind: rotary(stream, positions, kind) for kind in of_kinds},
        "attention_mask": masks,
    }


_FULL, _SLIDING = "full_attention", "sliding_attention"
_MASKS = {_FULL: create_causal_mask, _SLIDING: create_sliding_window_causal_mask}


def embed(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Look up tokens as the first layer reads them."""
    inner = body(model)
    found: Tensor = inner.embed_tokens(tokens)  # a Gemma's multiplies, too
    return found * getattr(inner, "embedding_multiplier", 1)


def last_hidden(model: PreTrainedModel, stream: Tensor) -> Tensor:
    """Compute what the head reads of the stream after the last layer."""
    inner = body(model)
    return cast(Tensor, inner.norm(stream)) / getattr(inner.config, "logits_scaling", 1)


def logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Compute the logits in fp32, soft-capped where the model's are, of `last_hidden`."""
    return capped(model.lm_head(hidden).float(), cap_of(model))


def cap_of(model: PreTrainedModel) -> float | None:
    """Say at what a model's logits are soft-capped; None if they aren't."""
    cap: float | None = getattr(body(model).config, "final_logit_softcapping", None)
    return cap


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Soft-cap logits: they approach `cap` and its negative."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def checkpoint_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors of a restructured model to what they are called in the checkpoint."""
    return {
        re.sub(r"^model\.layers\.\d+\.members\.", "model.layers.", name): tensor
        for name, tensor in tensors.items()
    }


def is_of_experts(name: str) -> bool:
    """Whether a model's tensor is of experts or their router, which most checkpoints have in
    another form."""
    return re.search(r"\.mlp\.(experts|gate|router)\.", name) is not None


def _delete(layer: nn.Module, *names: str) -> None:
    for name in names:
        delattr(layer, name)


def _check_layers(plan: Plan, layers: int) -> None:
    if plan.layers != layers:
        raise UserError(f"the plan is for {plan.layers} layers; allowed: {layers}, as in the model")


def _total(terms: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, terms)
