"""The same plans on transformers: the reference that serving is compared with, and trainable.

Written from the equations, with every layer's own norms, attention and MLP; nothing here is folded
or concatenated. With x the residual stream, and A_i and F_i the attention and the MLP of layer i,
each with its own RMSNorm inside, a block of layers i runs

    x <- x + sum_i A_i(x)
    x <- x + sum_i F_i(x)

A block of one layer is a standard Llama layer; a block of two is Layer Parallelism's pair
(arXiv 2502.02790, section 4). A layer in no block is absent, with its cache (Unified Layer
Skipping, arXiv 2404.06954).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import reduce
from os import PathLike
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from .plan import Plan, PlanError, resolve


class ParallelBlock(LlamaDecoderLayer):
    """Layers that run side by side.

    To transformers it is one decoder layer: subclassing makes gradient checkpointing, the recording
    of hidden states and device maps treat it as such. `attend` and `feed` are the two sums of the
    equations, so that a block that reads the stream elsewhere changes `forward` alone.

    Attributes:
        members: the original decoder layers, by their index in the checkpoint.
    """

    def __init__(self, members: dict[int, LlamaDecoderLayer]) -> None:
        # Not LlamaDecoderLayer's own constructor: it would make one more layer's weights.
        nn.Module.__init__(self)
        self.members = nn.ModuleDict({str(index): layer for index, layer in members.items()})

    def forward(self, hidden_states: Tensor, *_: Any, **context: Any) -> Tensor:
        """Run the block.

        Args:
            hidden_states: the residual stream, (batch, tokens, hidden).
            context: what transformers hands every attention (rotary embedding, mask, cache).

        Returns:
            The residual stream after the block, same shape.
        """
        hidden_states = hidden_states + self.attend(hidden_states, **context)
        return hidden_states + self.feed(hidden_states)

    def attend(self, stream: Tensor, **context: Any) -> Tensor:
        """The sum of A_i(stream) over the block's layers; shapes as in `forward`."""
        return _total(
            layer.self_attn(layer.input_layernorm(stream), **context)[0] for layer in self._layers()
        )

    def feed(self, stream: Tensor) -> Tensor:
        """The sum of F_i(stream) over the block's layers; shapes as in `forward`."""
        return _total(layer.mlp(layer.post_attention_layernorm(stream)) for layer in self._layers())

    def _layers(self) -> list[LlamaDecoderLayer]:
        return [cast(LlamaDecoderLayer, layer) for layer in self.members.values()]


def load(
    path: str | PathLike[str], spec: object, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> LlamaForCausalLM:
    """Load a Llama checkpoint and restructure it.

    Args:
        path: folder of the checkpoint.
        spec: a `Plan`, or a spec that `vllm_depthpar.plan.resolve` takes.
        dtype: what the weights are converted to.
        kwargs: more arguments of `from_pretrained`.

    Returns:
        The model, in evaluation mode.

    Raises:
        PlanError: the plan is wrong, or the checkpoint is not a Llama; before weights load.
        OSError: there is no checkpoint at `path`.
    """
    config = AutoConfig.from_pretrained(path)
    if not isinstance(config, LlamaConfig):
        raise PlanError(f"model_type {config.model_type!r} is not supported; allowed: 'llama'")
    plan = spec if isinstance(spec, Plan) else resolve(spec, config.num_hidden_layers)
    _check_layers(plan, config.num_hidden_layers)
    model = LlamaForCausalLM.from_pretrained(path, config=config, dtype=dtype, **kwargs)
    return restructure(model, plan)


def restructure(model: LlamaForCausalLM, plan: Plan) -> LlamaForCausalLM:
    """Apply a plan to a model, in place.

    The kept layers stay the modules they were. They are renumbered in the order they run, and the
    config counts them, so that caches have one slot for each kept layer.

    Args:
        model: a model as loaded, not restructured before.
        plan: a plan for its number of layers.

    Returns:
        The same model.

    Raises:
        PlanError: the plan is for another number of layers, or the model was restructured before.
    """
    layers = model.model.layers
    if any(isinstance(layer, ParallelBlock) for layer in layers):
        raise PlanError("the model is already restructured; allowed: a model as loaded")
    _check_layers(plan, len(layers))
    for slot, index in enumerate(index for block in plan.blocks for index in block):
        layers[index].self_attn.layer_idx = slot
    model.model.layers = nn.ModuleList(
        ParallelBlock({index: layers[index] for index in block}) for block in plan.blocks
    )
    model.config.num_hidden_layers = len(plan.kept)
    return model


def checkpoint_state_dict(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """A restructured model's tensors under the names they had in the checkpoint."""
    return {
        re.sub(r"^model\.layers\.\d+\.members\.", "model.layers.", name): tensor
        for name, tensor in model.state_dict().items()
    }


def _check_layers(plan: Plan, layers: int) -> None:
    if plan.layers != layers:
        raise PlanError(f"the plan is for {plan.layers} layers; allowed: {layers}, as in the model")


def _total(terms: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, terms)
