"""What the tensors of a quantized checkpoint stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from vllm_depthpar.checkpoint.config import read_config
from vllm_depthpar.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# Of tensors by full names.
Dequantize: TypeAlias = "Callable[[dict[str, Tensor]], dict[str, Tensor]]"

# What each method calls a module's scales.
_SCALES = {
    "compressed-tensors": ".weight_scale",
    "gptq": ".scales",
    "awq": ".scales",
    "fp8": ".weight_scale_inv",
}
# Of an attention's keys, values and queries: of no weight.
_CACHE_SCALES = (".k_scale", ".v_scale", ".q_scale")
# Where AWQ has the eight columns of one int32, the lowest bits first.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def is_quantized(folder: Path) -> bool:
    """Whether a checkpoint's config.json says that it is quantized."""
    return read_config(str(folder)).get("quantization_config") is not None


def dequantizer(folder: Path) -> Dequantize:
    """Find what makes of a layer's tensors, by full names, those of the unquantized layer.

    Raises:
        UserError: the checkpoint is quantized in a format of which we know no such thing.
    """
    quantization = read_config(str(folder)).get("quantization_config")
    if quantization is None:
        return lambda tensors: tensors
    method = quantization.get("quant_method")
    if method == "compressed-tensors":
        import torch
        from compressed_tensors.entrypoints.convert.converters import CompressedTensorsDequantizer

        of_modules: Dequantize = CompressedTensorsDequantizer(folder, dtype=torch.float32).process
    elif method == "gptq" and quantization.get("sym") is True and quantization["bits"] in (4, 8):
        of_modules = partial(_each_module, partial(_gptq, quantization))
    elif method == "awq" and 4 in (quantization.get("bits"), quantization.get("w_bit")):
        of_modules = partial(_each_module, _awq)
    elif method == "fp8" and quantization.get("weight_block_size"):
        of_modules = partial(_each_module, partial(_fp8, quantization))
    else:
        raise UserError(
            f"{folder} is quantized by {method!r}, of which there is no reference; allowed: "
            "compressed-tensors, GPTQ (symmetric), AWQ (4 bits), fp8 in blocks, or unquantized "
            "checkpoints"
        )
    scale = _SCALES[method]

    def dequantize(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        modules = {name.removesuffix(scale) for name in tensors if name.endswith(scale)}
        # The library takes a matrix that has no scales, as an embedding is, for quantized, too.
        coded = {name for name in tensors if name.rpartition(".")[0] in modules}
        # Products of codes and scales are exact enough in fp32 only, and the library has them in
        # the scales' dtype.
        parts = {
            name: tensor.float() if name.endswith(scale) and tensor.itemsize == 2 else tensor
            for name in coded
            for tensor in [tensors.pop(name)]
        }
        try:
            found = of_modules(parts)
        except KeyError as error:
            # compressed-tensors 0.17 asks MXFP4 for a scale that is NVFP4's.
            raise UserError(
                f"{folder} can't be dequantized without a tensor {error}; allowed: another format"
            ) from None
        left = {name: it for name, it in tensors.items() if not name.endswith(_CACHE_SCALES)}
        return left | found

    return dequantize


_Module: TypeAlias = "Mapping[str, Tensor]"


def _each_module(
    weight_of: Callable[[_Module], Tensor], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Put a weight in the place of each module's codes and scales; biases stay."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        modules.setdefault(module, {})[parameter] = tensor
    found = {f"{name}.weight": weight_of(module) for name, module in modules.items()}
    biases = {name: tensor for name, tensor in tensors.items() if name.endswith(".bias")}
    return found | biases


def _gptq(quantization: Mapping[str, Any], module: _Module) -> Tensor:
    """Compute the weight, (out, in). Symmetric: zeros are the middle, whatever is stored.

    Args:
        module: `qweight` (in * bits / 32, out), `scales` (groups, out), and the group of each of
            its inputs, `g_idx` (in,).
    """
    bits = quantization["bits"]
    codes = _unpacked(module["qweight"].T, bits) - 2 ** (bits - 1)
    return codes * module["scales"][module["g_idx"].long()].T


def _awq(module: _Module) -> Tensor:
    """Compute the weight, (out, in).

    Args:
        module: `qweight` (in, out / 8), `qzeros` (groups, out / 8), `scales` (groups, out).
    """
    codes, zeros = (
        _unpacked(module[name], 4).unflatten(1, (-1, 8))[..., _AWQ_ORDER].flatten(1)
        for name in ("qweight", "qzeros")
    )
    group = len(codes) // len(zeros)
    zeros, scales = (of.repeat_interleave(group, 0) for of in (zeros, module["scales"]))
    return ((codes - zeros) * scales).T.contiguous()


def _fp8(quantization: Mapping[str, Any], module: _Module) -> Tensor:
    """Compute the weight, (out, in).

    Args:
        module: `weight` (out, in) and `weight_scale_inv`, one for each block, the last ones of
            which may be cut off.
    """
    weight, scales = module["weight"].float(), module["weight_scale_inv"]
    for dim, size in enumerate(quantization["weight_block_size"]):
        scales = scales.repeat_interleave(size, dim).narrow(dim, 0, weight.shape[dim])
    return weight * scales


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """Unpack the numbers of each int32 of a matrix, the lowest bits first, along its rows."""
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(1).float()
