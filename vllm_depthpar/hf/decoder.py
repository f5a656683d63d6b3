"""What is around the layers of a model: embedding, masks, positions, last norm and head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask


def body(model: PreTrainedModel) -> Any:
    """Find a model's decoder, of a multimodal one that of its language model: embedding, layers,
    last norm, rotary embedding."""
    return getattr(model.model, "language_model", model.model)


def embed(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Look up tokens as the first layer reads them."""
    inner = body(model)
    found: Tensor = inner.embed_tokens(tokens)  # a Gemma's multiplies, too
    return found * getattr(inner, "embedding_multiplier", 1)


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


def tell_kinds(
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
