"""Small quantized checkpoints of many kinds, each beside one of the same weights dequantized."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# Of a projection's weight: the tensors that stand for it, by the ends of their names (none where
# vLLM quantizes itself); and exactly what they stand for.
Quantize = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
GROUP = 32  # of int4's scales
E4M3_MAX = 448.0
PROJECTIONS = (
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
)


@dataclass(frozen=True)
class Kind:
    """A way to quantize a checkpoint.

    Attributes:
        config: of the layers that are left as they are, config.json's `quantization_config`.
        engine: of these layers, arguments of the engine.
        needs_avx512: whether vLLM's kernels for it do.
        kv_scales: whether each layer has scales for its keys and values, too.
        prepare: see `engine_runs.Case`.
    """

    quantize: Quantize
    config: Callable[[Sequence[int]], dict[str, Any]] | None = None
    engine: Callable[[Sequence[int]], dict[str, Any]] = lambda _: {}
    needs_avx512: bool = False
    kv_scales: bool = False
    prepare: Callable[[], None] | None = None


def write_quantized(
    source: Path, folder: Path, kind: str, ignore: Sequence[int] = ()
) -> tuple[Path, Path]:
    """Write a checkpoint's projections in one of `KINDS`.

    Args:
        ignore: layers that stay as they are.

    Returns:
        The folder of the quantized checkpoint, and of one with the same weights dequantized.
    """
    of_kind = KINDS[kind]
    quantized, dequantized = {}, {}
    for name, whole in load_file(source / "model.safetensors").items():
        tensor = _unlike_other_layers(name, whole).bfloat16().float()
        quantized[name] = dequantized[name] = tensor
        if not name.endswith("proj.weight") or int(name.split(".")[2]) in ignore:
            continue
        parts, dequantized[name] = of_kind.quantize(tensor)
        module = name.removesuffix(".weight")
        if parts:
            del quantized[name]
            quantized |= {f"{module}.{end}": part.contiguous() for end, part in parts.items()}
        if of_kind.kv_scales and module.endswith(("k_proj", "v_proj")):
            quantized |= _kv_scale(module)
    config = json.loads((source / "config.json").read_text())
    of_quantized = dict(config)
    if of_kind.config is not None:
        of_quantized["quantization_config"] = of_kind.config(ignore)
    folders = folder / kind, folder / f"{kind}-dequantized"
    for path, tensors, described in zip(
        folders, (quantized, dequantized), (of_quantized, config), strict=True
    ):
        path.mkdir(parents=True)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(described))
    return folders


def _factor(layer: int) -> float:
    return 16.0 ** (layer % 3 - 1)


def _unlike_other_layers(name: str, tensor: Tensor) -> Tensor:
    """Multiply a projection, and divide the one that undoes it: the same model, but the scales of
    one layer are far from its neighbours'."""
    match name.split("."):
        case ["model", "layers", layer, _, "q_proj" | "v_proj" | "up_proj", "weight"]:
            return tensor * _factor(int(layer))
        case ["model", "layers", layer, _, "k_proj" | "o_proj" | "down_proj", "weight"]:
            return tensor / _factor(int(layer))
    return tensor


def _kv_scale(module: str) -> dict[str, Tensor]:
    """What e4m3's largest number stands for: keys and values of `write_llama`'s are below 8."""
    *before, layer, attention, projection = module.split(".")
    factor = _factor(int(layer))
    size = factor if projection == "v_proj" else 1 / factor
    name = ".".join([*before, layer, attention, f"{projection[0]}_scale"])
    return {name: torch.tensor(8 * size / E4M3_MAX)}


def _codes(
    weight: Tensor, group: int | None, most: int, zeros: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Round a weight to integers from 0 to 15, or symmetric ones up to `most`.

    Returns:
        Codes (out, in), scales and zeros (out, groups), and what they stand for.
    """
    groups = weight.view(len(weight), -1, group or weight.shape[1])
    if zeros:
        low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        scale = ((high - low) / 15).bfloat16().float()
        zero = (-low / scale).round().clamp(0, 15)
        codes = ((groups / scale).round() + zero).clamp(0, 15)
    else:
        scale = (groups.abs().amax(2, keepdim=True) / most).bfloat16().float()
        zero = torch.zeros_like(scale)
        codes = (groups / scale).round().clamp(-most - 1, most)
    meant = ((codes - zero) * scale).view_as(weight)
    return codes.view_as(weight), scale[..., 0], zero[..., 0], meant


def _packed(codes: Tensor, dim: int, order: Sequence[int] = range(8)) -> Tensor:
    """Pack eight numbers from 0 to 15 along a dimension into one int32, the first lowest."""
    eights = codes.to(torch.int32).unflatten(dim, (-1, 8)).movedim(dim + 1, -1)[..., list(order)]
    return (eights << (4 * torch.arange(8, dtype=torch.int32))).sum(-1, dtype=torch.int32)


def _w4a16(group: int | None, zeros: bool = False) -> Quantize:
    def quantize(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes, scale, zero, meant = _codes(weight, group, 7, zeros)
        parts = {
            "weight_packed": _packed(codes + 8 * (not zeros), 1),
            "weight_scale": scale.bfloat16(),
            "weight_shape": torch.tensor(weight.shape),
        }
        if zeros:
            parts["weight_zero_point"] = _packed(zero, 0)
        return parts, meant

    return quantize


def _awq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    codes, scale, zero, meant = _codes(weight, GROUP, 7, zeros=True)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    parts = {
        "qweight": _packed(codes.T, 1, order),
        "qzeros": _packed(zero.T, 1, order),
        "scales": scale.T.bfloat16(),
    }
    return parts, meant


def _gptq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    codes, scale, _, meant = _codes(weight, GROUP, 7)
    parts = {
        "qweight": _packed(codes.T + 8, 0),
        "qzeros": _packed(torch.full_like(scale.T, 7), 1),  # one less than what they mean
        "scales": scale.T.bfloat16(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }
    return parts, meant


def _fp8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / E4M3_MAX
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
NVFP4_GLOBAL_SCALE = 256.0  # of all: vLLM's kernels have one for q, k and v


def _in_fp4(blocks: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Round to E2M1, times a scale; two codes a byte, the first in the lower half."""
    nearest = ((blocks.abs() / scale)[..., None] - E2M1).abs().argmin(-1)
    codes = (nearest + 8 * (blocks < 0)).flatten(1).unflatten(1, (-1, 2)).to(torch.uint8)
    meant = E2M1[nearest] * blocks.sign() * scale
    return codes[..., 0] | codes[..., 1] << 4, meant.flatten(1)


def _nvfp4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    blocks = weight.unflatten(1, (-1, 16))
    scale = blocks.abs().amax(2) / E2M1[-1] * NVFP4_GLOBAL_SCALE
    scale = scale.to(torch.float8_e4m3fn)
    packed, meant = _in_fp4(blocks, scale.float()[..., None] / NVFP4_GLOBAL_SCALE)
    parts = {
        "weight_packed": packed,
        "weight_scale": scale,
        "weight_global_scale": torch.tensor([NVFP4_GLOBAL_SCALE]),
        "input_global_scale": torch.tensor([1.0]),
    }
    return parts, meant


def _exponents(groups: Tensor, most: float) -> Tensor:
    """Of the smallest powers of two that, times `most`, reach all of a group."""
    return (groups.abs().amax(2) / most).log2().ceil()


def _mxfp4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    groups = weight.unflatten(1, (-1, GROUP))
    exponent = _exponents(groups, float(E2M1[-1]))
    packed, meant = _in_fp4(groups, exponent.exp2()[..., None])
    return {"weight_packed": packed, "weight_scale": (exponent + 127).to(torch.uint8)}, meant


def _mxfp8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    groups = weight.unflatten(1, (-1, GROUP))
    exponent = _exponents(groups, E4M3_MAX)
    scale = exponent.exp2()[..., None]
    codes = (groups / scale).to(torch.float8_e4m3fn)
    parts = {"weight": codes.flatten(1), "weight_scale": (exponent + 127).to(torch.uint8)}
    return parts, (codes.float() * scale).flatten(1)


def _fp8_blocks(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    blocks = weight.unflatten(1, (-1, GROUP)).unflatten(0, (-1, GROUP))
    scale = blocks.abs().amax((1, 3)) / E4M3_MAX
    each = scale[:, None, :, None]
    codes = (blocks / each).to(torch.float8_e4m3fn)
    parts = {"weight": codes.view_as(weight), "weight_scale_inv": scale}
    return parts, (codes.float() * each).view_as(weight)


def add_emulated_kernels() -> None:
    import emulated_kernels  # and with it vLLM

    emulated_kernels.add()


def _compressed(
    form: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None, **more: Any
) -> Callable[[Sequence[int]], dict[str, Any]]:
    def config(ignore: Sequence[int]) -> dict[str, Any]:
        return {
            "quant_method": "compressed-tensors",
            "format": form,
            "quantization_status": "compressed",
            "ignore": ["lm_head", *(rf"re:.*\.layers\.{layer}\..*" for layer in ignore)],
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
            },
            **more,
        }

    return config


def _names(ignore: Sequence[int]) -> list[str]:
    return [f"model.layers.{layer}." for layer in ignore]


_INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False}
_FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
_FP4 = {**_FP8, "num_bits": 4}
_MX = {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8", "dynamic": False}
_IN_GROUPS = {"strategy": "group", "group_size": GROUP}
_TOKEN = {**_FP8, "strategy": "token", "dynamic": True}

KINDS = {
    "w4a16-group": Kind(
        _w4a16(GROUP), _compressed("pack-quantized", {**_INT4, **_IN_GROUPS}), needs_avx512=True
    ),
    "w4a16-channel": Kind(
        _w4a16(None),
        _compressed("pack-quantized", {**_INT4, "strategy": "channel"}),
        needs_avx512=True,
    ),
    "w4a16-zeros": Kind(
        _w4a16(GROUP, zeros=True),
        _compressed("pack-quantized", {**_INT4, **_IN_GROUPS, "symmetric": False}),
        needs_avx512=True,
    ),
    "awq": Kind(
        _awq,
        lambda ignore: {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": _names(ignore) or None,
        },
        needs_avx512=True,
    ),
    "gptq": Kind(
        _gptq,
        lambda ignore: {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GROUP,
            "desc_act": False,
            "sym": True,
            "dynamic": {rf"-:.*\.layers\.{layer}\..*": {} for layer in ignore},
        },
        needs_avx512=True,
    ),
    "fp8-channel": Kind(
        _fp8,
        _compressed("float-quantized", {**_FP8, "strategy": "channel", "dynamic": False}, _TOKEN),
    ),
    "w4a16-kv": Kind(
        _w4a16(GROUP),
        _compressed(
            "pack-quantized",
            {**_INT4, **_IN_GROUPS},
            kv_cache_scheme={**_FP8, "strategy": "tensor", "dynamic": False},
        ),
        needs_avx512=True,
        kv_scales=True,
    ),
    "fp8-blocks": Kind(
        _fp8_blocks,
        lambda ignore: {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [GROUP, GROUP],
            "modules_to_not_convert": [
                f"model.layers.{layer}.{module}" for layer in ignore for module in PROJECTIONS
            ],
        },
        prepare=add_emulated_kernels,
    ),
    "nvfp4": Kind(
        _nvfp4,
        _compressed(
            "nvfp4-pack-quantized",
            {**_FP4, "strategy": "tensor_group", "group_size": 16, "dynamic": False},
            {**_FP4, "strategy": "tensor_group", "group_size": 16, "dynamic": "local"},
        ),
        prepare=add_emulated_kernels,
    ),
    "mxfp4": Kind(
        _mxfp4,
        _compressed("mxfp4-pack-quantized", {**_FP4, **_IN_GROUPS, **_MX}),
        prepare=add_emulated_kernels,
    ),
    "mxfp8": Kind(
        _mxfp8,
        _compressed("mxfp8-quantized", {**_FP8, **_IN_GROUPS, **_MX}),
        prepare=add_emulated_kernels,
    ),
    "fp8-online": Kind(
        lambda weight: ({}, _fp8(weight)[1]),
        engine=lambda ignore: {
            "quantization": "fp8_per_channel",
            "quantization_config": {"ignore": [rf"re:.*\.layers\.{k}\..*" for k in ignore]},
        },
    ),
    "fp8-kv": Kind(
        lambda weight: ({}, weight),
        engine=lambda _: {"kv_cache_dtype": "fp8"},
        needs_avx512=True,
    ),
}
