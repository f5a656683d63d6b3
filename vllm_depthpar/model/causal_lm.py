"""Restructured models on vLLM's own layers.

A block of m layers is *one* decoder layer with m times the heads, KV heads and intermediate size
(see `vllm_depthpar.model.fold`), or, where m divides the tensor-parallel size, one member layer per
group of ranks. Either way vLLM's kernels, sharding, KV cache, batching and compilation apply as
they are: these classes only decide what a block holds, how its weights arrive, what it reads, and
when its all-reduces run. All families' layers are Llama's but for their attention, which is in
`vllm_depthpar.model.attention`, and so is the shell around the layers.

Layer Parallelism: arXiv 2502.02790, equation 2. Ladder Residual: arXiv 2501.06589, section 3.
Unified Layer Skipping: arXiv 2404.06954.
"""

from __future__ import annotations

import copy
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
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.utils import AutoWeightsLoader, extract_layer_index

from vllm_depthpar.checkpoint.tensors import Expected, lacks, split_name
from vllm_depthpar.metrics.forward_timer import watch
from vllm_depthpar.model import last_words
from vllm_depthpar.model.attention import HeadNorm, attention_of
from vllm_depthpar.model.fold import fold_gain_, shard_of
from vllm_depthpar.model.inductor import keep_mutations_in_order
from vllm_depthpar.model.reductions import InFlight, Reductions
from vllm_depthpar.plan import Plan
from vllm_depthpar.plan.families import family_of
from vllm_depthpar.vllm_compat import (
    base_config,
    check_ranks_agree,
    compiles,
    let_draft_blocks_differ,
    logger,
    member_of_this_rank,
    narrowed_tensor_parallel,
    on_weights_loaded,
    plan_of,
)

Weights = Iterable[tuple[str, torch.Tensor]]

# The norm whose gain is folded into a projection.
_NORM_BEFORE = {
    "self_attn.qkv_proj": "input_layernorm",
    "mlp.gate_up_proj": "post_attention_layernorm",
}
# The checkpoint's projections in each of vLLM's, by what vLLM calls them there.
_SHARD_IDS: dict[str, tuple[object, ...]] = {
    "self_attn.qkv_proj": ("q", "k", "v"),
    "self_attn.o_proj": (None,),
    "mlp.gate_up_proj": (0, 1),
    "mlp.down_proj": (None,),
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
        layer = WideDecoderLayer(vllm_config, prefix, block)
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


class Part(NamedTuple):
    """Names one tensor of the checkpoint in a wide layer.

    Attributes:
        parameter: of the wide layer.
        shard_id: which part of a merged projection it is, in vLLM's words.
        member: whose it is.
    """

    parameter: str
    shard_id: object
    member: int


class WideDecoderLayer(BlockDecoderLayer):
    """A block of m layers as one decoder layer m times as wide, the members' norms folded in.

    Weights arrive tensor by tensor and in any order, when the model is made and whenever they are
    loaded again. They are held until the block is complete, and only then handed to the weight
    loaders of its parameters, which put them in their place in this rank's shard and fold the gains
    in. Until then the block is what it was: it never runs on the weights of two updates.
    """

    def __init__(self, vllm_config: VllmConfig, prefix: str, block: tuple[int, ...]) -> None:
        self.members = len(block)
        super().__init__(
            vllm_config, prefix, config=widened(vllm_config.model_config.hf_config, self.members)
        )
        self._block = block
        self._held: dict[Part, torch.Tensor] = {}
        attention = self.self_attn
        # TP that is no multiple of the members deals out KV heads, and copies none.
        for name, heads in (("q_norm", attention.num_heads), ("k_norm", attention.num_kv_heads)):
            if norm := getattr(attention, name, None):
                setattr(attention, name, HeadNorm(norm, heads))
        for name in _SHARD_IDS:
            linear = self.get_submodule(name)
            linear.weight.weight_loader = _load_part
            if linear.bias is not None and isinstance(linear, ColumnParallelLinear):
                linear.bias.weight_loader = _load_part
        self._parts = frozenset(self._expected())
        on_weights_loaded(attention.attn, self.let_go)

    def load_weights(self, weights: Weights) -> set[str]:
        """Take ("member.parameter", full tensor) pairs, of right shapes.

        Returns:
            The parameters that were loaded: all of the block's if it is complete now, else none.

        Raises:
            ValueError: a tensor has no place in the block.
        """
        loaded: set[str] = set()
        for name, tensor in weights:
            member, _, parameter = name.partition(".")
            part = Part(parameter, getattr(tensor, "shard_id", None), int(member))
            if part not in self._parts:
                raise ValueError(f"checkpoint tensor {parameter!r} has no place in a wide layer")
            # On a GPU it may lie in a buffer that the next tensors will be in.
            self._held[part] = tensor if tensor.is_cpu else tensor.clone()
            if len(self._held) == len(self._parts):
                self._load(self._held)
                self._held = {}
                loaded.update(name for name, _ in self.named_parameters())
        return loaded

    def missing(self) -> list[tuple[int, str]]:
        """What has to come before what has come is loaded, as (layer of the checkpoint, parameter);
        nothing if nothing has come."""
        if not self._held:
            return []
        parts = self._parts - self._held.keys()
        return sorted((self._block[part.member], part.parameter) for part in parts)

    def keep(self) -> None:
        """Hold what has come beyond the call that brought it: its memory may be used again."""
        self._held = {part: tensor.clone() for part, tensor in self._held.items()}

    def let_go(self) -> None:
        """Forget what was held: an update has ended, and the next must be complete by itself."""
        if missing := self.missing():
            logger.warning(
                "the update lacks %s of layer %d and %d more tensors of the layers %s, which keep "
                "the weights that they had",
                missing[0][1],
                missing[0][0],
                len(missing) - 1,
                ", ".join(map(str, self._block)),
            )
        self._held = {}

    def _load(self, parts: dict[Part, torch.Tensor]) -> None:
        # Of parameters that all members share, or that vLLM's own loaders take: what they become.
        whole = {f"{norm}.weight": torch.ones(self.hidden_size) for norm in _NORM_BEFORE.values()}
        head_gains: dict[str, list[torch.Tensor]] = {}
        for part in sorted(parts, key=lambda part: part.member):
            name, _, leaf = part.parameter.rpartition(".")
            module, tensor = self.get_submodule(name), parts[part]
            if name in _NORM_BEFORE.values():
                continue
            if isinstance(module, HeadNorm):
                head_gains.setdefault(part.parameter, []).append(tensor)
            elif leaf == "bias" and isinstance(module, RowParallelLinear):
                # Every member's output bias is added once: they sum.
                zeros = torch.zeros_like(tensor, dtype=torch.float32)
                whole[part.parameter] = whole.get(part.parameter, zeros) + tensor
            elif (place := _place(module, part, tensor)) is not None:
                gain = None
                if leaf == "weight" and name in _NORM_BEFORE:
                    gain = parts[Part(f"{_NORM_BEFORE[name]}.weight", None, part.member)]
                param = self.get_parameter(part.parameter)
                param.weight_loader(param, tensor, *place, gain)
        for name, gains in head_gains.items():
            whole[name] = self._of_this_rank(gains, len(self.get_parameter(name)))
        for name, tensor in whole.items():
            param = self.get_parameter(name)
            getattr(param, "weight_loader", default_weight_loader)(param, tensor)

    def _of_this_rank(self, gains: list[torch.Tensor], heads: int) -> torch.Tensor:
        """One row for each of this rank's heads: the gain, (head_dim,), of the member it is of."""
        qkv = self.self_attn.qkv_proj
        each = heads * qkv.tp_size // self.members
        rows = torch.stack(gains).repeat_interleave(each, 0)
        return rows[qkv.tp_rank * heads :][:heads]

    def _expected(self) -> Iterator[Part]:
        names: list[tuple[str, tuple[object, ...]]] = [
            (f"{norm}.weight", (None,)) for norm in _NORM_BEFORE.values()
        ]
        for projection, shard_ids in _SHARD_IDS.items():
            for leaf, _ in self.get_submodule(projection).named_parameters():
                names.append((f"{projection}.{leaf}", shard_ids))
        for name, module in self.named_modules():
            if isinstance(module, HeadNorm):
                names.append((f"{name}.weight", (None,)))
        for name, shard_ids in names:
            for shard_id in shard_ids:
                for member in range(self.members):
                    yield Part(name, shard_id, member)


def _load_part(
    param: nn.Parameter,
    loaded_weight: torch.Tensor,
    dim: int,
    source: slice,
    target: slice,
    gain: torch.Tensor | None = None,
) -> None:
    """Put a part of a member's tensor where it belongs, the gain folded in: the weight loader, as
    vLLM's parameters have one, of a wide layer's projections.

    Args:
        param: of the wide layer, on this rank.
        loaded_weight: the checkpoint's tensor, whole.
        dim: along which the parts lie.
        source: in the tensor.
        target: in the parameter.
        gain: (in,), of the norm before the projection.
    """
    before = (slice(None),) * dim
    part = param.data[(*before, target)]
    part.copy_(loaded_weight[(*before, source)])
    # vLLM loads onto the meta device first, so as to count.
    if gain is not None and not param.is_meta:
        fold_gain_(part, gain)


def _place(linear: LinearBase, part: Part, tensor: torch.Tensor) -> tuple[int, slice, slice] | None:
    """The dimension, source and target of `_load_part` for what this rank holds of a tensor; None
    if it holds nothing of it."""
    if isinstance(linear, ColumnParallelLinear):
        dim, (offset, size) = 0, _rows_of(linear, part.shard_id)
    else:
        dim, offset, size = 1, 0, linear.input_size_per_partition
    where = shard_of(part.member, tensor.shape[dim], linear.tp_rank, size)
    if where is None:
        return None
    source, target = where
    return dim, source, slice(target.start + offset, target.stop + offset)


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
        self.expected = Expected(base_config(vllm_config.model_config.hf_config))
        # Random ones need not be loaded before a part of them can be.
        self.has_weights = vllm_config.load_config.load_format == "dummy"
        if self.plan.ladder and not self.layers[0].reductions.overlap and is_global_first_rank():
            logger.warning(
                "plan %s: its ladder blocks gain no speed here: %s",
                self.plan.digest,
                "one rank has no all-reduce to hide"
                if get_tensor_model_parallel_world_size() == 1
                else "an all-reduce over shared memory runs on the threads that compute",
            )

    def load_weights(self, weights: Weights) -> set[str]:
        """Load a checkpoint with the original layers' names, or, once there are weights, any part
        of one: see `WideDecoderLayer`.

        Raises:
            UserError: a tensor has a wrong shape, or is of a layer that the model does not have, or
                is missing where there were no weights before.
        """
        with last_words.kept():
            loaded = super().load_weights(addressed(weights, self.plan, self.expected))
            for layer in self.layers:
                if isinstance(layer, WideDecoderLayer) and (missing := layer.missing()):
                    if not self.has_weights:
                        raise lacks(*missing[0])
                    layer.keep()
        self.has_weights = True
        return loaded


class DepthParForCausalLM(LlamaForCausalLM):
    """Any family's causal model, run by the plan in its config's key `depthpar`."""

    supports_lora = False

    def _init_model(
        self, vllm_config: VllmConfig, prefix: str = "", layer_type: object = None
    ) -> DepthParModel:
        check_ranks_agree(vllm_config)
        watch(self, vllm_config)
        if vllm_config.model_config.runner_type == "draft":
            let_draft_blocks_differ()
        return DepthParModel(vllm_config=vllm_config, prefix=prefix)

    def is_unused_checkpoint_weight(self, name: str) -> bool:
        """True for the weights of skipped layers: files that hold nothing else are not read."""
        place = split_name(name)
        return place is not None and place[1] in self.model.plan.skipped


def addressed(
    weights: Weights, plan: Plan, expected: Expected
) -> Iterator[tuple[str, torch.Tensor]]:
    """Rename layer K of the checkpoint to where the plan runs it; drop skipped layers.

    "layers.K.x" becomes "layers.B.x" for a layer that is alone in block B, and "layers.B.M.x"
    for member M of a block of several.

    Raises:
        UserError: a tensor is not what it is expected to be.
    """
    places = {
        layer: f"{position}.{member}" if len(block) > 1 else f"{position}"
        for position, block in enumerate(plan.blocks)
        for member, layer in enumerate(block)
    }
    for name, tensor in weights:
        expected.check(name, tensor.shape)
        place = split_name(name)
        if place is None:
            yield name, tensor
            continue
        before, layer, rest = place
        if layer in places:
            yield f"{before}layers.{places[layer]}.{rest}", tensor
