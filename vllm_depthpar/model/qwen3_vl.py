"""Qwen3-VL: vLLM's model that sees, around a language model that runs by a plan."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.model_executor.models import qwen3_vl

from vllm_depthpar.model.causal_lm import DepthParForCausalLM
from vllm_depthpar.vllm_compat import language_model_of_qwen3_vl


class Qwen3VLForConditionalGeneration(qwen3_vl.Qwen3VLForConditionalGeneration):
    """vLLM's, which after each of the first layers adds what layers inside its tower see."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with language_model_of_qwen3_vl(DepthParForCausalLM):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
