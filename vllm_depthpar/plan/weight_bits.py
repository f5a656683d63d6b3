"""How many bits a quantized checkpoint keeps for a weight, by its config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import AliasChoices, BaseModel, Field

_SCALE_BITS = {"int": 16, "float": 8}  # of int4's groups; of NVFP4's and MXFP4's


class _Weights(BaseModel):
    bits: int = Field(validation_alias=AliasChoices("num_bits", "bits", "w_bit"), ge=1, le=16)
    group: int | None = Field(
        None, validation_alias=AliasChoices("group_size", "q_group_size"), ge=-1
    )
    type: str = "int"
    # compressed-tensors says so of weights; GPTQ and AWQ store zeros in any case.
    symmetric: bool = False

    @property
    def with_scales(self) -> float:
        """Bits of a weight, and its share of what its group has (of a whole row that is little)."""
        if self.group is None or self.group < 1:
            return self.bits
        zero = 0 if self.symmetric else self.bits
        return self.bits + (_SCALE_BITS.get(self.type, 16) + zero) / self.group


def weight_bits(config: Mapping[str, Any]) -> float | None:
    """Read the bits of one weight of a quantized projection, with its share of scales and zeros.

    Args:
        config: a parsed config.json. Where it quantizes some projections otherwise than others, the
            most bits count; layers that it leaves as they are aren't looked for.

    Returns:
        None if nothing is quantized, or in a way whose config.json does not say.
    """
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    if method in ("fp8", "fbgemm_fp8"):
        return 8
    found: list[Any] = [quantization] if method in ("gptq", "awq") else []
    groups = quantization.get("config_groups") if method == "compressed-tensors" else None
    if isinstance(groups, Mapping):
        found = [group.get("weights") for group in groups.values() if isinstance(group, Mapping)]
    try:
        return max(_Weights.model_validate(one).with_scales for one in found if one is not None)
    except ValueError:  # there are none, or they are of no such form
        return None
