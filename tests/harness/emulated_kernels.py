"""Kernels on a CPU for formats of floats of which vLLM has none there, or only for AMX.

Everything else of them is vLLM's: which layers are quantized, their parameters, and what is loaded
into them and cut. A kernel here dequantizes and multiplies; vLLM's own emulations round
activations, too, or need a package.
"""

from __future__ import annotations

import torch
import vllm.model_executor.kernels.linear as kernels
from torch import nn
from torch.nn import functional
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
    break_fp4_bytes,
    dequantize_to_dtype,
)
from vllm.platforms import PlatformEnum


def add() -> None:
    """Let vLLM find them, in this process."""
    kernels._POSSIBLE_NVFP4_KERNELS[PlatformEnum.CPU] = [NvFp4]
    kernels._POSSIBLE_MXFP4_KERNELS[PlatformEnum.CPU] = [MxFp4]
    kernels._POSSIBLE_MXFP8_KERNELS[PlatformEnum.CPU] = [kernels.EmulationMxfp8LinearKernel]
    kernels._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU] = [Fp8Blocks]


class NvFp4(kernels.EmulationNvFp4LinearKernel):
    def apply_weights(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        scales = layer.weight_scale, layer.weight_global_scale
        weight = dequantize_to_dtype(layer.weight, *scales, x.dtype, swizzle=False)
        return functional.linear(x, weight, bias)


class _Anywhere:
    """On any processor, with the weights as they were loaded."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, config: object) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        pass


class MxFp4(_Anywhere, kernels.MxFp4LinearKernel):
    def apply_weights(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        scale = torch.exp2(layer.weight_scale.float() - 127)[..., None]
        groups = break_fp4_bytes(layer.weight, torch.float32).unflatten(1, (-1, 32))
        return functional.linear(x, (groups * scale).flatten(1).to(x.dtype), bias)


class Fp8Blocks(_Anywhere, kernels.CPUFp8BlockScaledMMKernel):
    def apply_weights(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None, **_: object
    ) -> torch.Tensor:
        scale = layer.weight_scale_inv
        for dim, size in enumerate(self.weight_group_shape):
            scale = scale.repeat_interleave(size, dim)
        return functional.linear(x, (layer.weight.float() * scale).to(x.dtype), bias)
