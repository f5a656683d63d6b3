"""What the keys of a config.json may hold: checked once, before anybody computes with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_depthpar.errors import UserError, shortened

# Far above any model, and far below what takes the memory or the day of whoever loops over it.
MOST_LAYERS = 10_000
_MOST = 2**31 - 1

Size = Annotated[int, Field(ge=1, le=_MOST)]
_SIZE = f"an integer from 1 to {_MOST}"
Cap = Annotated[float | None, Field(gt=0, allow_inf_nan=False)]
_CAP = "a number above 0, or null"
_SWITCH = "true or false"
_MAPPING = "a mapping, or null"


class ConfigKeys(BaseModel):
    """The keys of a config.json that this package, or a model of its families, reads.

    None must be there: who needs one says so.
    """

    model_config = ConfigDict(strict=True, frozen=True)
    num_hidden_layers: int = Field(
        1, ge=1, le=MOST_LAYERS, description=f"an integer from 1 to {MOST_LAYERS}"
    )
    hidden_size: Size = Field(1, description=_SIZE)
    intermediate_size: Size = Field(1, description=_SIZE)
    vocab_size: Size = Field(1, description=_SIZE)
    num_attention_heads: Size = Field(1, description=_SIZE)
    num_key_value_heads: Size | None = Field(None, description=f"{_SIZE}, or null")
    head_dim: Size | None = Field(None, description=f"{_SIZE}, or null")
    max_position_embeddings: Size = Field(1, description=_SIZE)
    # 0 is how transformers writes that there is none.
    sliding_window: int | None = Field(
        None, ge=0, le=_MOST, description=f"an integer from 0 to {_MOST}, or null"
    )
    use_sliding_window: bool | None = Field(None, description=_SWITCH)
    sliding_window_pattern: Size | None = Field(None, description=f"{_SIZE}, or null")
    max_window_layers: int = Field(0, ge=0, description="an integer of 0 or more")
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = Field(
        None, description="a list of 'full_attention' and 'sliding_attention', or null"
    )
    tie_word_embeddings: bool | None = Field(None, description=_SWITCH)
    attention_bias: bool | None = Field(None, description=_SWITCH)
    mlp_bias: bool | None = Field(None, description=_SWITCH)
    query_pre_attn_scalar: float = Field(
        1, gt=0, allow_inf_nan=False, description="a number above 0"
    )
    attn_logit_softcapping: Cap = Field(None, description=_CAP)
    final_logit_softcapping: Cap = Field(None, description=_CAP)
    rms_norm_eps: float = Field(1e-6, gt=0, allow_inf_nan=False, description="a number above 0")
    layer_norm_epsilon: float = Field(
        1e-5, gt=0, allow_inf_nan=False, description="a number above 0"
    )
    rope_theta: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="a number above 0, or null"
    )
    rope_scaling: dict[str, Any] | None = Field(None, description=_MAPPING)
    rope_parameters: dict[str, Any] | None = Field(None, description=_MAPPING)
    num_experts: Size = Field(1, description=_SIZE)
    num_local_experts: Size = Field(1, description=_SIZE)
    num_experts_per_tok: Size = Field(1, description=_SIZE)
    moe_intermediate_size: Size = Field(1, description=_SIZE)
    shared_expert_intermediate_size: Size = Field(1, description=_SIZE)
    norm_topk_prob: bool = Field(False, description=_SWITCH)
    decoder_sparse_step: Size = Field(1, description=_SIZE)
    mlp_only_layers: list[int] | None = Field(None, description="a list of layers, or null")
    quantization_config: dict[str, Any] | None = Field(None, description=_MAPPING)
    dtype: str | None = Field(None, description="the name of a dtype, or null")
    torch_dtype: str | None = Field(None, description="the name of a dtype, or null")
    # A file that transformers reads in place of the one that vLLM does.
    transformers_weights: None = Field(None, description="config.json without it")


def check_keys(config: Mapping[str, Any], activation: str = "silu") -> None:
    """Refuse a config.json that says what no model is.

    Args:
        config: parsed, of the checkpoint itself: with the layers that it has.
        activation: of its family's MLP.

    Raises:
        UserError: one line that names the key, the value and what is allowed.
    """
    try:
        keys = ConfigKeys.model_validate(dict(config))
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        allowed = ConfigKeys.model_fields[key].description
        raise _wrong(config, key, str(allowed)) from None
    for key in ("hidden_act", "hidden_activation"):
        if config.get(key, activation) != activation:
            raise _wrong(config, key, repr(activation))
    heads, sizes = keys.num_attention_heads, {"hidden_size", "num_attention_heads"}
    if keys.num_key_value_heads and heads % keys.num_key_value_heads:
        raise _wrong(config, "num_key_value_heads", f"divisors of num_attention_heads, {heads}")
    if not keys.head_dim and keys.model_fields_set >= sizes and keys.hidden_size % heads:
        raise _wrong(config, "hidden_size", f"multiples of num_attention_heads, {heads}")
    if keys.layer_types is not None and len(keys.layer_types) != keys.num_hidden_layers:
        raise UserError(
            f"config.json's key 'layer_types' is for {len(keys.layer_types)} layers; allowed: "
            f"{keys.num_hidden_layers}, its num_hidden_layers"
        )


def _wrong(config: Mapping[str, Any], key: str, allowed: str) -> UserError:
    return UserError(f"config.json's key {key!r} is {shortened(config[key])}; allowed: {allowed}")
