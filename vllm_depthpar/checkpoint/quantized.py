"""What the tensors of a quantized checkpoint stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from vllm_depthpar.checkpoint.config import read_config
from vllm_depthpar.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# Of tensors by full names.
Dequantize: TypeAlias = "Callable[[dict[str, Tensor]], dict[str, Tensor]]"


def is_quantized(folder: Path) -> bool:
    """Whether a checkpoint's config.json says that it is quantized."""
    return read_config(str(folder)).get("quantization_config") is not None


def dequantizer(folder: Path) -> Dequantize:
    """Find what makes of a layer's tensors, by full names, those of the unquantized layer.

    Raises:
        UserError: the checkpoint is quantized in another format than compressed-tensors'.
    """
    quantization = read_config(str(folder)).get("quantization_config")
    if quantization is None:
        return lambda tensors: tensors
    method = quantization.get("quant_method")
    if method != "compressed-tensors":
        raise UserError(
            f"{folder} is quantized by {method!r}, of which there is no reference; allowed: "
            "compressed-tensors, or unquantized checkpoints"
        )
    import torch
    from compressed_tensors.entrypoints.convert.converters import CompressedTensorsDequantizer

    # Products of codes and scales are exact enough in fp32 only.
    library = CompressedTensorsDequantizer(folder, dtype=torch.float32)

    def dequantize(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        scale = ".weight_scale"
        modules = {name.removesuffix(scale) for name in tensors if name.endswith(scale)}
        # The library takes a matrix that has no scales, as an embedding is, for quantized, too.
        coded = {name for name in tensors if name.rpartition(".")[0] in modules}
        found: dict[str, Tensor] = library.process({name: tensors.pop(name) for name in coded})
        return tensors | found

    return dequantize
