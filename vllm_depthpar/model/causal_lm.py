"""Restructured models on vLLM's own layers.

The model keeps the checkpoint's layers under the checkpoint's names, `layers.K`, so that whatever
addresses a layer finds it: weights, adapters, quantization schemes, KV caches. Blocks
(`vllm_depthpar.model.blocks`) only say in what order their parts run and with which sums. Layers
side by side may also be held as *one*, in the place of the first of them: m times as wide (see
`vllm_depthpar.model.fold`), or, where m divides the tensor-parallel size, one member per group of
ranks. Most families' layers are Llama's but for their attention, which is in
`vllm_depthpar.model.attention`; others are in `vllm_depthpar.model.family_layers`. The shell around
the layers is Llama's, with what Gemma's has more, a scaled embedding and soft-capped logits, or
with BLOOM's norms.

Unified Layer Skipping: arXiv 2404.06954. The other methods: `vllm_depthpar.model.blocks`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import is_global_first_rank
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.models.llama import LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.utils import PPMissingLayer, extract_layer_index
from vllm.sequence import IntermediateTensors

from vllm_depthpar.checkpoint.tensors import Expected, lacks, split_name
from vllm_depthpar.metrics.forward_timer import watch
from vllm_depthpar.model import last_words
from vllm_depthpar.model.agreement import check_agreement
from vllm_depthpar.model.blocks import Block
from vllm_depthpar.model.bloom import LayerNorm
from vllm_depthpar.model.decoder_layers import DealtDecoderLayer, DecoderLayer, Weights
from vllm_depthpar.model.family_layers import LAYERS, naming
from vllm_depthpar.model.frame_room import called_with_room
from vllm_depthpar.model.inductor import keep_mutations_in_order
from vllm_depthpar.model.wide_block import WideDecoderLayer
from vllm_depthpar.plan.attached import config_of, layouts_of, plan_of
from vllm_depthpar.plan.families import family_of
from vllm_depthpar.plan.plan import Half, Plan
from vllm_depthpar.plan.precedence import ARCHITECTURE
from vllm_depthpar.plan.spec import AS_ONE, DEALT, HALVES
from vllm_depthpar.vllm_compat import (
    compiles,
    let_draft_blocks_differ,
    logger,
    on_weights_loaded,
    tell_of_adapters,
)


def make_decoder_layer(
    plan: Plan, layouts: Sequence[str], *, vllm_config: VllmConfig, prefix: str
) -> nn.Module:
    """Build what the model has in the place of one layer of the checkpoint.

    Args:
        layouts: of the plan's blocks, see `vllm_depthpar.plan.attached.layouts_of`.
        prefix: "model.layers.K", K the layer.
    """
    layer = extract_layer_index(prefix)
    position = next((at for at, block in enumerate(plan.blocks) if layer in block), None)
    if position is None:
        return PPMissingLayer()
    attentions, mlps = plan.attention(position), plan.mlp(position)
    layout = layouts[position]
    if layout in AS_ONE:
        if layer != place_of(plan, position):
            return PPMissingLayer()
        if layout == DEALT:
            return DealtDecoderLayer(vllm_config, prefix, plan.blocks[position])
        return WideDecoderLayer(vllm_config, prefix, attentions, mlps)
    layer_type = LAYERS.get(vllm_config.model_config.hf_config.model_type, DecoderLayer)
    return layer_type(vllm_config, prefix, attends=layer in attentions, feeds=layer in mlps)


def place_of(plan: Plan, position: int) -> int:
    """Name the layer in whose place a block is that is held as one layer: the first to attend."""
    return (plan.attention(position) or plan.blocks[position])[0]


@called_with_room
class DepthParModel(LlamaModel):
    """A model that runs the blocks of a plan."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: object) -> None:
        if compiles(vllm_config):
            keep_mutations_in_order()
        plan, layouts = plan_of(vllm_config.model_config), layouts_of(vllm_config)
        make_layer = partial(make_decoder_layer, plan, layouts)
        config = vllm_config.model_config.hf_config
        family = family_of(config.to_dict())
        if family.layer_norms:  # `LlamaModel` makes an RMSNorm first
            config.rms_norm_eps = config.layer_norm_epsilon
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=make_layer)
        self.plan, self.layouts = plan, layouts
        self.hf_to_vllm_mapper = naming(config.model_type)["hf_to_vllm_mapper"]
        if family.layer_norms:
            self.norm = LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.normed = family.norms_embedding
        if self.normed:
            self.embed_tokens.norm = LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.scaled = family.gemma or family.multipliers
        if family.multipliers:
            self.normalizer: torch.Tensor | float = config.embedding_multiplier
        if family.gemma:
            self.norm = GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            # In the model's dtype: 55.5 for 55.4256 in bfloat16, as it was trained.
            scale = torch.tensor(config.hidden_size**0.5)
            self.register_buffer("normalizer", scale, persistent=False)
        self.read_after: tuple[int, ...] = ()
        self.blocks = [self._block(position) for position in range(self.plan.depth)]
        self.wide = [layer for layer in self.layers if isinstance(layer, WideDecoderLayer)]
        attending = next(block.attentions[0] for block in self.blocks if block.attentions)
        for layer in self.wide:
            on_weights_loaded(attending.module.attn, layer.let_go)
        self.expected = Expected(config_of(vllm_config.model_config))
        # Random ones need not be loaded before a part of them can be.
        self.has_weights = vllm_config.load_config.load_format == "dummy"
        reductions = self.blocks[0].reductions
        if self.plan.ladder and not reductions.overlap and is_global_first_rank():
            logger.warning(
                "plan %s: its ladder blocks gain no speed here: %s",
                self.plan.digest,
                reductions.hindrance,
            )

    def _block(self, position: int) -> Block:
        plan = self.plan
        attentions, mlps = plan.attention(position), plan.mlp(position)
        if self.layouts[position] in AS_ONE:
            place = (place_of(plan, position),)
            attentions, mlps = place * bool(attentions), place * bool(mlps)
        return Block(
            [self.layers[layer] for layer in attentions],
            [self.layers[layer] for layer in mlps],
            plan.mode(position),
            plan.is_ladder(position + 1),
            plan.unreduced(position),
            plan.is_apart(position),
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Look up tokens, (tokens,), as the first block reads them, but for BLOOM's norm."""
        embedding: torch.Tensor = self.embed_tokens(input_ids)
        return embedding * self.normalizer if self.scaled else embedding

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None = None,
        deepstack_input_embeds: IntermediateTensors | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
        """Run the model, as `LlamaModel.forward` does its layers.

        Args:
            deepstack_input_embeds: what a tower adds to the stream after each of so many of the
                first layers, (tokens, hidden) each: see `ModelShape.deepstack`.

        Returns:
            The hidden states; and the streams that a speculator reads, where one does.
        """
        term = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        if self.normed:
            term = self.embed_tokens.norm(term)
        # A copy: the first block takes the embedding for its stream, and adds to it in place.
        stream, read = None, [term.clone()] if -1 in self.read_after else []
        for position, block in enumerate(self.blocks):
            term, stream = block(positions, term, stream)
            if deepstack_input_embeds is not None and position < len(deepstack_input_embeds):
                # No plan has another layer there, or a stream that is not complete.
                term = term + deepstack_input_embeds[f"deepstack_input_embeds_{position}"]
            if times := self.read_after.count(position):
                read += [term + stream] * times
        hidden_states, _ = self.norm(term, stream)
        return (hidden_states, read) if read else hidden_states

    def _set_aux_hidden_state_layers(self, layers: tuple[int, ...]) -> None:
        """Let a speculator read the stream after so many of the checkpoint's layers; where that is
        inside a block, after the block."""
        super()._set_aux_hidden_state_layers(layers)
        counts = self.aux_hidden_state_layers
        self.read_after = tuple(self.plan.position_after(count) for count in counts)

    def load_weights(self, weights: Weights) -> set[str]:
        """Load a checkpoint with the original layers' names, or, once there are weights, any part
        of one: see `WideDecoderLayer`.

        Raises:
            UserError: a tensor has a wrong shape, or is of a layer that the model does not have, or
                is missing where there were no weights before.
        """
        with last_words.kept():
            places = places_of(self.plan, self.layouts)
            loaded = super().load_weights(addressed(weights, places, self.expected))
            for layer in self.wide:
                if missing := layer.missing():
                    if not self.has_weights:
                        raise lacks(*missing[0])
                    layer.keep()
        self.has_weights = True
        return loaded


# The same, but for the dimension of `positions` that is the tokens'.
_TOKENS = {0: "b"}


@called_with_room
@support_torch_compile(
    dynamic_arg_dims={
        "input_ids": _TOKENS,
        "positions": {-1: "b"},
        "intermediate_tensors": _TOKENS,
        "inputs_embeds": _TOKENS,
        "deepstack_input_embeds": _TOKENS,
    }
)
class ThreeAxesModel(DepthParModel):
    """One whose positions are of three axes, (3, tokens): those of time, height and width."""


class DepthParForCausalLM(LlamaForCausalLM):
    """Any family's causal model, run by the plan in its config's key `depthpar`."""

    def __new__(cls, *args: Any, vllm_config: VllmConfig, **kwargs: Any) -> DepthParForCausalLM:
        """Make it of a class with the family's `naming`, which vLLM asks classes for."""
        kind = vllm_config.model_config.hf_text_config.model_type
        made = type(cls.__name__, (cls,), naming(kind))
        return cast(
            "DepthParForCausalLM", super().__new__(made, *args, vllm_config=vllm_config, **kwargs)
        )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        whole = vllm_config.model_config.hf_config
        if (text := whole.get_text_config()) is not whole:
            # Qwen2.5-VL makes its language model from the whole config.
            vllm_config = vllm_config.with_hf_config(text, [ARCHITECTURE])
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        cap = getattr(self.config, "final_logit_softcapping", None)
        scale = 1 / getattr(self.config, "logits_scaling", 1)
        if cap is not None or scale != 1:
            self.logits_processor = LogitsProcessor(
                self.config.vocab_size, scale=scale, soft_cap=cap
            )

    def _init_model(
        self, vllm_config: VllmConfig, prefix: str = "", layer_type: object = None
    ) -> DepthParModel:
        check_agreement(vllm_config.model_config)
        watch(self, vllm_config)
        if vllm_config.model_config.runner_type == "draft":
            let_draft_blocks_differ()
        if vllm_config.lora_config is not None:
            tell_of_adapters(self, self._note_adapter)
        rope = getattr(vllm_config.model_config.hf_config, "rope_parameters", None) or {}
        model = ThreeAxesModel if "mrope_section" in rope else DepthParModel
        return model(vllm_config=vllm_config, prefix=prefix)

    def _note_adapter(self, modules: Collection[str]) -> None:
        """Log what of an adapter has no effect: its parts for layers that the plan leaves out."""
        ignored = [name for name in modules if self.is_unused_checkpoint_weight(name)]
        if ignored and is_global_first_rank():
            layers = sorted({place[1] for name in ignored if (place := split_name(name))})
            logger.warning(
                "plan %s: %d of the adapter's %d parts are of what does not run, in the layers %s, "
                "and are ignored",
                self.model.plan.digest,
                len(ignored),
                len(modules),
                ", ".join(map(str, layers)),
            )

    def load_weights(self, weights: Weights) -> set[str]:
        """Load a checkpoint, by the names of its files: see `DepthParModel.load_weights`."""
        name_of = self.model.expected.name_of
        return super().load_weights((name_of(name), tensor) for name, tensor in weights)

    def is_unused_checkpoint_weight(self, name: str) -> bool:
        """Say whether the plan does not run a weight: files that hold nothing else are not
        read."""
        place, plan = self.model.expected.place_of(name), self.model.plan
        if place is None:
            return False
        _, layer, rest = place
        return (layer, self.model.expected.half_of(rest)) not in plan.runs


def places_of(plan: Plan, layouts: tuple[str, ...]) -> dict[Half, str]:
    """Find where the model has the halves of layers that a plan runs: what stands for K in
    "layers.K.x".

    That of a layer as it is stays "K"; that of one that is member M of those with that half, in a
    block in the place of layer P, is "P.M".
    """
    places = {}
    for position, layout in enumerate(layouts):
        for half in HALVES:
            for member, layer in enumerate(getattr(plan, half)(position)):
                as_one = f"{place_of(plan, position)}.{member}"
                places[layer, half] = as_one if layout in AS_ONE else f"{layer}"
    return places


def addressed(
    weights: Weights, places: Mapping[Half, str], expected: Expected
) -> Iterator[tuple[str, torch.Tensor]]:
    """Rename the checkpoint's tensors to where the model has them; drop what it does not run.

    Args:
        places: see `places_of`.

    Raises:
        UserError: a tensor is not what it is expected to be.
    """
    for name, tensor in weights:
        expected.check(name, tensor.shape)
        if (split := split_name(name)) is None:
            yield name, tensor
            continue
        before, layer, rest = split
        if (place := places.get((layer, expected.half_of(rest)))) is not None:
            yield f"{before}layers.{place}.{rest}", tensor
