"""Restructured models on vLLM's own layers.

A block of m layers is *one* decoder layer with m times the heads, KV heads and intermediate size
(see `vllm_depthpar.model.fold`), or, where m divides the tensor-parallel size, one member layer per
group of ranks. Either way vLLM's kernels, sharding, KV cache, batching and compilation apply as
they are: these classes only decide what a block holds, how its weights arrive, what it reads, and
when its all-reduces run. All families' layers are Llama's but for their attention, which is in
`vllm_depthpar.model.attention`, and so is the shell around the layers.

Unified Layer Skipping: arXiv 2404.06954. The other methods: `vllm_depthpar.model.blocks`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, is_global_first_rank
from vllm.model_executor.models.llama import LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.utils import extract_layer_index

from vllm_depthpar.checkpoint.tensors import Expected, lacks, split_name
from vllm_depthpar.metrics.forward_timer import watch
from vllm_depthpar.model import last_words
from vllm_depthpar.model.agreement import check_agreement
from vllm_depthpar.model.blocks import BlockDecoderLayer, DealtDecoderLayer, Weights
from vllm_depthpar.model.inductor import keep_mutations_in_order
from vllm_depthpar.model.wide_block import WideDecoderLayer
from vllm_depthpar.plan import Plan
from vllm_depthpar.plan.attached import base_config, plan_of
from vllm_depthpar.plan.model_shape import half_of
from vllm_depthpar.plan.spec import HALVES
from vllm_depthpar.vllm_compat import compiles, let_draft_blocks_differ, logger, on_weights_loaded


def make_decoder_layer(*, vllm_config: VllmConfig, prefix: str) -> nn.Module:
    """Build the decoder layer that runs one block of the plan.

    Args:
        prefix: "model.layers.B", B the position of the block in the plan.
    """
    plan, position = plan_of(vllm_config.model_config), extract_layer_index(prefix)
    block, attention, mlp = plan.blocks[position], plan.attention(position), plan.mlp(position)
    # Named after its first layer, so that what addresses layers of the checkpoint by index
    # (ignore lists of quantized checkpoints, layer_types) finds them.
    prefix = f"{prefix.rpartition('.')[0]}.{(attention or block)[0]}"
    layer: BlockDecoderLayer
    if len(block) == 1:
        layer = BlockDecoderLayer(vllm_config, prefix, attends=bool(attention), feeds=bool(mlp))
    elif plan.is_whole(position) and get_tensor_model_parallel_world_size() % len(block) == 0:
        layer = DealtDecoderLayer(vllm_config, prefix, members=len(block))
    else:
        layer = WideDecoderLayer(vllm_config, prefix, attention, mlp)
    layer.take_over_all_reduces(
        plan.mode(position),
        plan.is_ladder(position + 1),
        plan.unreduced(position),
        plan.is_apart(position),
    )
    return layer


class DepthParModel(LlamaModel):
    """A model whose `layers` are the blocks of a plan."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: object) -> None:
        if compiles(vllm_config):
            keep_mutations_in_order()
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=make_decoder_layer)
        self.plan = plan_of(vllm_config.model_config)
        anchor = next(layer.self_attn.attn for layer in self.layers if layer.attends)
        for layer in self.layers:
            if isinstance(layer, WideDecoderLayer):
                on_weights_loaded(anchor, layer.let_go)
        self.expected = Expected(base_config(vllm_config.model_config))
        # Random ones need not be loaded before a part of them can be.
        self.has_weights = vllm_config.load_config.load_format == "dummy"
        if self.plan.ladder and not self.layers[0].reductions.overlap and is_global_first_rank():
            logger.warning(
                "plan %s: its ladder blocks gain no speed here: %s",
                self.plan.digest,
                self.layers[0].reductions.hindrance,
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
        check_agreement(vllm_config.model_config)
        watch(self, vllm_config)
        if vllm_config.model_config.runner_type == "draft":
            let_draft_blocks_differ()
        return DepthParModel(vllm_config=vllm_config, prefix=prefix)

    def is_unused_checkpoint_weight(self, name: str) -> bool:
        """Say whether the plan does not run a weight: files that hold nothing else are not
        read."""
        place, plan = split_name(name), self.model.plan
        if place is None:
            return False
        _, layer, rest = place
        return (layer, half_of(rest)) not in plan.runs


def addressed(
    weights: Weights, plan: Plan, expected: Expected
) -> Iterator[tuple[str, torch.Tensor]]:
    """Rename layer K of the checkpoint to where the plan runs it; drop what it does not run.

    "layers.K.x" becomes "layers.B.x" for a layer that is alone in block B, and "layers.B.M.x"
    in a block of several, where it is member M of those with that half.

    Raises:
        UserError: a tensor is not what it is expected to be.
    """
    places = {
        (layer, half): f"{position}.{member}" if len(block) > 1 else f"{position}"
        for position, block in enumerate(plan.blocks)
        for half in HALVES
        for member, layer in enumerate(getattr(plan, half)(position))
    }
    for name, tensor in weights:
        expected.check(name, tensor.shape)
        place = split_name(name)
        if place is None:
            yield name, tensor
            continue
        before, layer, rest = place
        if (place_in_plan := places.get((layer, half_of(rest)))) is not None:
            yield f"{before}layers.{place_in_plan}.{rest}", tensor
