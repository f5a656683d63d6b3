"""A model of transformers made into a plan's, and what its tensors are called in the checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel

from vllm_depthpar.errors import UserError
from vllm_depthpar.hf.block import ParallelBlock
from vllm_depthpar.hf.decoder import body, tell_kinds
from vllm_depthpar.plan import Plan
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.plan.multimodal import language_config
from vllm_depthpar.plan.spec import WHOLE


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
    check_layers(plan, len(layers))
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
            inner.register_forward_pre_hook(tell_kinds, with_kwargs=True)
    return model


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


def check_layers(plan: Plan, layers: int) -> None:
    """Refuse, by a UserError, a plan that is for another number of layers."""
    if plan.layers != layers:
        raise UserError(f"the plan is for {plan.layers} layers; allowed: {layers}, as in the model")
