"""Restructured models on vLLM's own layers.

A block of m layers is *one* decoder layer with m times the heads, KV heads and intermediate size
(see `vllm_depthpar.fold`), or, where m divides the tensor-parallel size, one member layer per
group of ranks. Either way vLLM's kernels, sharding, KV cache, batching and compilation apply as
they are: these classes only decide what a block holds, how its weights arrive, what it reads, and
when its all-reduces run. All families' layers are Llama's but for their attention, which is in
`vllm_depthpar.vllm_attention`, and so is the shell around the layers.

Layer Parallelism: arXiv 2502.02790, equation 2. Ladder Residual: arXiv 2501.06589, section 3.
Unified Layer Skipping: arXiv 2404.06954.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, is_global_first_rank
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.utils import AutoWeightsLoader, extract_layer_index

from vllm_depthpar.compat import (
    compiles,
    let_draft_blocks_differ,
    logger,
    member_of_this_rank,
    narrowed_tensor_parallel,
    plan_of,
)
from vllm_depthpar.families import family_of
from vllm_depthpar.fold import fold_gain_, shard_of
from vllm_depthpar.inductor import keep_mutations_in_order
from vllm_depthpar.meter import watch
from vllm_depthpar.plan import Plan
from vllm_depthpar.reductions import InFlight, Reductions
from vllm_depthpar.vllm_attention import HeadNorm, attention_of

Weights = Iterable[tuple[str, torch.Tensor]]

_LAYER = re.compile(r"(^|.*\.)layers\.(\d+)\.(.*)")
# The norm whose gain is folded into a projection.
_NORM_BEFORE = {
    "self_attn.qkv_proj": "input_layernorm",
    "mlp.gate_up_proj": "post_attention_layernorm",
}


def make_decoder_layer(*, vllm_config: VllmConfig, prefix: str) -> nn.Module:
    """Build the decoder layer that runs one block of the plan.

    Args:
        prefix: "model.layers.B", B the position of the block in the plan.
    """
    plan, position = plan_of(vllm_config), extract_layer_index(prefix)
    block = plan.blocks[position]
    # Named after its first layer, so that what addresses layers of the checkpoint by index
    # (ignore lists of quantized checkpoints, layer_types) finds them.
    prefix = f"{prefix.rpartition('.')[0]}.{block[0]}"
    layer: BlockDecoderLayer
    if len(block) == 1:
        layer = BlockDecoderLayer(vllm_config, prefix)
    elif get_tensor_model_parallel_world_size() % len(block) == 0:
        layer = DealtDecoderLayer(vllm_config, prefix, members=len(block))
    else:
        layer = WideDecoderLayer(vllm_config, prefix, members=len(block))
    layer.join(ladder=plan.is_ladder(position), before_ladder=plan.is_ladder(position + 1))
    return layer


class Pending(NamedTuple):
    """What a block hands to a ladder block in place of one term: two that may be on their way.

    Attributes:
        attention: to be added before the next attention; None if the stream has it already.
        mlp: to be added before the next MLP; None before the first block.
    """

    attention: InFlight | None
    mlp: InFlight | None


class BlockDecoderLayer(LlamaDecoderLayer):
    """One block of a plan, standard or ladder, with its all-reduces in our hands.

    vLLM's decoder layers pass on (hidden_states, residual): a term, and the stream that the next
    layer's norm adds it to. So do these; to a ladder block the term is a `Pending`. Either kind of
    block adds inside its two norms and nowhere else, as a plain layer does.
    """

    def __init__(
        self, vllm_config: VllmConfig, prefix: str, config: PreTrainedConfig | None = None
    ) -> None:
        family = family_of(vllm_config.model_config.hf_config.to_dict())
        super().__init__(vllm_config, prefix, config, attn_layer_type=attention_of(family))

    def join(self, ladder: bool, before_ladder: bool) -> None:
        """Say whether this is a ladder block, and whether the next block is."""
        self.ladder = ladder
        self.before_ladder = before_ladder
        self.reductions = Reductions()
        self.self_attn.o_proj.reduce_results = False
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
            if residual is None:  # the first block: attention and MLP both read the embedding
                return self._ladder(positions, Pending(None, None), hidden_states)
            return self._ladder(positions, hidden_states, residual)
        hidden_states, residual = _norm(self.input_layernorm, hidden_states, residual)
        attention = self.reductions.all_reduce(self.self_attn(positions, hidden_states))
        hidden_states, residual = _norm(self.post_attention_layernorm, attention, residual)
        mlp = self.mlp(hidden_states)
        if self.before_ladder:
            return Pending(None, self.reductions.start(mlp)), residual
        return self.reductions.all_reduce(mlp), residual

    def _ladder(
        self, positions: torch.Tensor, pending: Pending, residual: torch.Tensor
    ) -> tuple[torch.Tensor | Pending, torch.Tensor]:
        # The MLP's all-reduce of the block before is on its way during this attention, and this
        # attention's during this MLP. `behind` is how a compiler knows.
        term = None
        if pending.attention is not None and pending.mlp is not None:
            term = self.reductions.wait(pending.attention, behind=pending.mlp.ticket)
        hidden_states, residual = _norm(self.input_layernorm, term, residual)
        attention = self.self_attn(positions, hidden_states)
        flight = self.reductions.start(attention) if self.before_ladder else None

        term = None
        if pending.mlp is not None:
            behind = attention if flight is None else flight.ticket
            term = self.reductions.wait(pending.mlp, behind)
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
    """The norm of stream + term, and stream + term; either may be missing."""
    if term is None:
        return norm(stream), stream
    if stream is None:
        return norm(term), term
    return norm(term, stream)


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


class WideDecoderLayer(BlockDecoderLayer):
    """A block of m layers as one decoder layer m times as wide, the members' norms folded in.

    Weights arrive tensor by tensor and in any order; each goes straight to its place in this
    rank's shard. `finish_loading` then folds the gains in place.
    """

    def __init__(self, vllm_config: VllmConfig, prefix: str, members: int) -> None:
        super().__init__(
            vllm_config, prefix, config=widened(vllm_config.model_config.hf_config, members)
        )
        self.members = members
        attention = self.self_attn
        # TP that is no multiple of the members deals out KV heads, and copies none.
        for name, heads in (("q_norm", attention.num_heads), ("k_norm", attention.num_kv_heads)):
            if norm := getattr(attention, name, None):
                setattr(attention, name, HeadNorm(norm, heads))
        self._reset()

    def _reset(self) -> None:
        self._gains: dict[tuple[str, int], torch.Tensor] = {}
        self._summed_biases: dict[str, torch.Tensor] = {}
        # (projection, shard id, member) -> rows of the parameter, None where it is elsewhere.
        self._loaded: dict[tuple[str, object, int], slice | None] = {}

    def load_weights(self, weights: Weights) -> set[str]:
        """Take ("member.parameter", full tensor) pairs; returns the parameters they belong to."""
        names = set()
        for name, tensor in weights:
            member, _, parameter = name.partition(".")
            self._load(parameter, int(member), tensor)
            names.add(parameter)
        return names

    def _load(self, name: str, member: int, tensor: torch.Tensor) -> None:
        module_name, _, leaf = name.rpartition(".")
        if module_name in _NORM_BEFORE.values():
            self._gains[module_name, member] = tensor.to(torch.float32, copy=True)
            return
        linear = self.get_submodule(module_name)
        if isinstance(linear, HeadNorm):
            self._loaded[name, None, member] = self._load_gains(linear, member, tensor)
            return
        param = getattr(linear, leaf, None)
        if not isinstance(linear, LinearBase) or not isinstance(param, nn.Parameter):
            raise ValueError(f"checkpoint tensor {name!r} has no place in a wide layer")
        if isinstance(linear, RowParallelLinear):
            if leaf == "weight":
                where = self._place(param.data, 1, tensor, member, linear.tp_rank)
            else:
                # Every member's output bias is added once: they sum.
                total = self._summed_biases.setdefault(
                    name, torch.zeros(param.shape, dtype=torch.float32, device=param.device)
                )
                total += tensor.to(total)
                where = None
            self._loaded[name, None, member] = where
            return
        shard_id = tensor.shard_id  # set by vLLM's WeightsMapper
        offset, size = _rows_of(linear, shard_id)
        where = self._place(
            param.data.narrow(0, offset, size), 0, tensor, member, linear.tp_rank, offset
        )
        self._loaded[name, shard_id, member] = where

    def _load_gains(self, norm: HeadNorm, member: int, tensor: torch.Tensor) -> slice | None:
        """Give the gain of a member, (head_dim,), to its heads on this rank."""
        qkv, gains = self.self_attn.qkv_proj, norm.weight.data
        heads = len(gains) * qkv.tp_size // self.members
        return self._place(gains, 0, tensor.expand(heads, -1), member, qkv.tp_rank)

    @staticmethod
    def _place(
        shard: torch.Tensor, dim: int, tensor: torch.Tensor, member: int, rank: int, offset: int = 0
    ) -> slice | None:
        where = shard_of(member, tensor.shape[dim], rank, shard.shape[dim])
        if where is None:
            return None
        source, target = where
        index = (slice(None),) * dim
        shard[(*index, target)].copy_(tensor[(*index, source)])
        return slice(target.start + offset, target.stop + offset)

    def finish_loading(self) -> None:
        """Fold the gains once everything has arrived.

        Raises:
            ValueError: the checkpoint lacked a tensor of this block.
        """
        if not self._loaded and not self._gains:
            return  # `--load-format dummy`
        for key in self._expected():
            if key not in self._loaded:
                raise ValueError(f"checkpoint lacks {key[0]!r} ({key[1]}) of member {key[2]}")
        for projection, norm in _NORM_BEFORE.items():
            weight = self.get_submodule(projection).weight.data
            for member in range(self.members):
                if (norm, member) not in self._gains:
                    raise ValueError(f"checkpoint lacks '{norm}.weight' of member {member}")
                for (name, _, owner), rows in self._loaded.items():
                    if name == f"{projection}.weight" and owner == member and rows is not None:
                        fold_gain_(weight[rows], self._gains[norm, member])
            nn.init.ones_(self.get_submodule(norm).weight)
        for name, total in self._summed_biases.items():
            self.get_parameter(name).data.copy_(total)
        self._reset()

    def _expected(self) -> Iterator[tuple[str, object, int]]:
        shard_ids: dict[str, tuple[object, ...]] = {
            "self_attn.qkv_proj": ("q", "k", "v"),
            "mlp.gate_up_proj": (0, 1),
            "self_attn.o_proj": (None,),
            "mlp.down_proj": (None,),
        }
        for projection, ids in shard_ids.items():
            for leaf, _ in self.get_submodule(projection).named_parameters():
                for shard_id in ids:
                    for member in range(self.members):
                        yield f"{projection}.{leaf}", shard_id, member
        for name, module in self.named_modules():
            if isinstance(module, HeadNorm):
                for member in range(self.members):
                    yield f"{name}.weight", None, member


def _rows_of(linear: ColumnParallelLinear, shard_id: object) -> tuple[int, int]:
    """Where a merged projection keeps one of its parts: (first row, rows) on this rank."""
    if isinstance(linear, QKVParallelLinear):
        q = linear.num_heads * linear.head_size
        kv = linear.num_kv_heads * linear.head_size
        return {"q": (0, q), "k": (q, kv), "v": (q + kv, kv)}[str(shard_id)]
    size = linear.output_partition_sizes[0]
    return int(str(shard_id)) * size, size


def widened(config: PreTrainedConfig, members: int) -> PreTrainedConfig:
    """The config of one decoder layer as wide as `members` layers of `config`."""
    wide = copy.copy(config)
    wide.head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    wide.num_key_value_heads = members * (
        getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    )
    wide.num_attention_heads = members * config.num_attention_heads
    wide.intermediate_size = members * config.intermediate_size
    return wide


class DepthParModel(LlamaModel):
    """A model whose `layers` are the blocks of a plan."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: object) -> None:
        if compiles(vllm_config):
            keep_mutations_in_order()
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=make_decoder_layer)
        self.plan = plan_of(vllm_config)
        if self.plan.ladder and not self.layers[0].reductions.overlap and is_global_first_rank():
            logger.warning(
                "plan %s: its ladder blocks gain no speed here: %s",
                self.plan.digest,
                "one rank has no all-reduce to hide"
                if get_tensor_model_parallel_world_size() == 1
                else "an all-reduce over shared memory runs on the threads that compute",
            )

    def load_weights(self, weights: Weights) -> set[str]:
        """Load a checkpoint with the original layers' names."""
        loaded = super().load_weights(addressed(weights, self.plan))
        for layer in self.layers:
            if isinstance(layer, WideDecoderLayer):
                layer.finish_loading()
        return loaded


class DepthParForCausalLM(LlamaForCausalLM):
    """Any family's causal model, run by the plan in its config's key `depthpar`."""

    supports_lora = False

    def _init_model(
        self, vllm_config: VllmConfig, prefix: str = "", layer_type: object = None
    ) -> DepthParModel:
        watch(self, vllm_config)
        if vllm_config.model_config.runner_type == "draft":
            let_draft_blocks_differ()
        return DepthParModel(vllm_config=vllm_config, prefix=prefix)

    def is_unused_checkpoint_weight(self, name: str) -> bool:
        """True for the weights of skipped layers: files that hold nothing else are not read."""
        match = _LAYER.match(name)
        return match is not None and int(match[2]) in self.model.plan.skipped


def addressed(weights: Weights, plan: Plan) -> Iterator[tuple[str, torch.Tensor]]:
    """Rename layer K of the checkpoint to where the plan runs it; drop skipped layers.

    "layers.K.x" becomes "layers.B.x" for a layer that is alone in block B, and "layers.B.M.x"
    for member M of a block of several.
    """
    places = {
        layer: f"{position}.{member}" if len(block) > 1 else f"{position}"
        for position, block in enumerate(plan.blocks)
        for member, layer in enumerate(block)
    }
    for name, tensor in weights:
        match = _LAYER.match(name)
        if match is None:
            yield name, tensor
        elif int(match[2]) in places:
            yield f"{match[1]}layers.{places[int(match[2])]}.{match[3]}", tensor
