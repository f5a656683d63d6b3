"""A block of several layers as one decoder layer of vLLM's, as wide as all of them.

See `vllm_depthpar.model.fold` for why they are the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from vllm_depthpar.model.attention import HeadNorm
from vllm_depthpar.model.decoder_layers import DecoderLayer, Weights
from vllm_depthpar.model.fold import fold_gain_, shard_of
from vllm_depthpar.plan.families import FAMILIES
from vllm_depthpar.vllm_compat import logger

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


class WideDecoderLayer(DecoderLayer):
    """A block of m layers as one decoder layer m times as wide, the members' norms folded in.

    Weights arrive tensor by tensor and in any order, when the model is made and whenever they are
    loaded again. They are held until the block is complete, and only then handed to the weight
    loaders of its parameters, which put them in their place in this rank's shard and fold the gains
    in. Until then the block is what it was: it never runs on the weights of two updates.
    """

    norms_are_alike = True

    def __init__(
        self,
        vllm_config: VllmConfig,
        prefix: str,
        attention: tuple[int, ...],
        mlp: tuple[int, ...],
    ) -> None:
        """Build the block.

        Args:
            attention, mlp: the layers of the checkpoint whose attentions and MLPs it runs.
        """
        config = widened(vllm_config.model_config.hf_config, len(attention), len(mlp))
        super().__init__(vllm_config, prefix, config, bool(attention), bool(mlp))
        self._layers = {"self_attn": attention, "mlp": mlp}
        # The norm whose gain is folded into a projection, of those that are there.
        self._norms = {
            name: norm for name, norm in _NORM_BEFORE.items() if self._layers[_half(name)]
        }
        self._held: dict[Part, torch.Tensor] = {}
        if attention:
            self._give_heads_their_gains()
        for name in self._projections():
            linear = self.get_submodule(name)
            linear.weight.weight_loader = _load_part
            if linear.bias is not None and isinstance(linear, ColumnParallelLinear):
                linear.bias.weight_loader = _load_part
        self._parts = frozenset(self._expected())

    def _give_heads_their_gains(self) -> None:
        attention = self.self_attn
        # TP that is no multiple of the members deals out KV heads, and copies none.
        for name, heads in (("q_norm", attention.num_heads), ("k_norm", attention.num_kv_heads)):
            if norm := getattr(attention, name, None):
                setattr(attention, name, HeadNorm(norm, heads))

    def _projections(self) -> list[str]:
        return [name for name in _SHARD_IDS if self._layers[_half(name)]]

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
        """List what has to come before what has come is loaded, as (layer of the checkpoint,
        parameter); nothing if nothing has come."""
        if not self._held:
            return []
        parts = self._parts - self._held.keys()
        return sorted((self._layer_of(part), part.parameter) for part in parts)

    def _layer_of(self, part: Part) -> int:
        """Which layer of the checkpoint a tensor is of."""
        return self._layers[_half(part.parameter)][part.member]

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
                ", ".join(map(str, sorted({*self._layers["self_attn"], *self._layers["mlp"]}))),
            )
        self._held = {}

    def _load(self, parts: dict[Part, torch.Tensor]) -> None:
        # Of parameters that all members share, or that vLLM's own loaders take: what they become.
        norms = self._norms.values()
        whole = {f"{norm}.weight": torch.ones(self.hidden_size) for norm in norms}
        head_gains: dict[str, list[torch.Tensor]] = {}
        for part in sorted(parts, key=lambda part: part.member):
            name, _, leaf = part.parameter.rpartition(".")
            module, tensor = self.get_submodule(name), parts[part]
            if name in norms:
                continue
            if isinstance(module, HeadNorm):
                head_gains.setdefault(part.parameter, []).append(tensor)
            elif leaf == "bias" and isinstance(module, RowParallelLinear):
                # Every member's output bias is added once: they sum.
                zeros = torch.zeros_like(tensor, dtype=torch.float32)
                whole[part.parameter] = whole.get(part.parameter, zeros) + tensor
            elif (place := _place(module, part, tensor)) is not None:
                gain = None
                if leaf == "weight" and name in self._norms:
                    gain = parts[Part(f"{self._norms[name]}.weight", None, part.member)]
                param = self.get_parameter(part.parameter)
                param.weight_loader(param, tensor, *place, gain)
        for name, gains in head_gains.items():
            whole[name] = self._of_this_rank(gains, len(self.get_parameter(name)))
        for name, tensor in whole.items():
            param = self.get_parameter(name)
            getattr(param, "weight_loader", default_weight_loader)(param, tensor)

    def _of_this_rank(self, gains: list[torch.Tensor], heads: int) -> torch.Tensor:
        """Stack a row for each head of this rank: the gain, (head_dim,), of the member it is of."""
        qkv = self.self_attn.qkv_proj
        each = heads * qkv.tp_size // len(gains)
        rows = torch.stack(gains).repeat_interleave(each, 0)
        return rows[qkv.tp_rank * heads :][:heads]

    def _expected(self) -> Iterator[Part]:
        names: list[tuple[str, tuple[object, ...]]] = [
            (f"{norm}.weight", (None,)) for norm in self._norms.values()
        ]
        for projection in self._projections():
            for leaf, _ in self.get_submodule(projection).named_parameters():
                names.append((f"{projection}.{leaf}", _SHARD_IDS[projection]))
        for name, module in self.named_modules():
            if isinstance(module, HeadNorm):
                names.append((f"{name}.weight", (None,)))
        for name, shard_ids in names:
            for shard_id in shard_ids:
                for member in range(len(self._layers[_half(name)])):
                    yield Part(name, shard_id, member)


def _half(parameter: str) -> str:
    """Which half of a layer a parameter or a module is of, by its name."""
    return "self_attn" if FAMILIES["llama"].half_of(f"{parameter}.") == "attention" else "mlp"


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
    """Find the dimension, source and target of `_load_part` for what this rank holds of a tensor;
    None if it holds nothing of it."""
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
    """Find where a merged projection keeps one of its parts: (first row, rows) on this rank."""
    if isinstance(linear, QKVParallelLinear):
        q = linear.num_heads * linear.head_size
        kv = linear.num_kv_heads * linear.head_size
        return {"q": (0, q), "k": (q, kv), "v": (q + kv, kv)}[str(shard_id)]
    size = linear.output_partition_sizes[0]
    return int(str(shard_id)) * size, size


def widened(config: PreTrainedConfig, attentions: int, mlps: int) -> PreTrainedConfig:
    """Make the config of one decoder layer as wide as so many attentions and MLPs of `config`.

    Of a half that it does not have, the sizes of one layer.
    """
    attentions, mlps = attentions or 1, mlps or 1
    wide = copy.copy(config)
    wide.head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    wide.num_key_value_heads = attentions * (
        getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    )
    wide.num_attention_heads = attentions * config.num_attention_heads
    wide.intermediate_size = mlps * config.intermediate_size
    return wide
