"""The config class of the Ladder Residual authors' checkpoints, for transformers and vLLM."""

from __future__ import annotations

from transformers import AutoConfig, LlamaConfig

from vllm_depthpar.plan.ladder_checkpoint import MODEL_TYPE


class LlamaLadderConfig(LlamaConfig):
    """A Llama config with `ladder_layers`, which `ladder_checkpoint` explains."""

    model_type = MODEL_TYPE
    ladder_layers: int | list[int] | None = None


def register() -> None:
    """Teach transformers the model type, so that no remote code is needed. Idempotent."""
    AutoConfig.register(MODEL_TYPE, LlamaLadderConfig, exist_ok=True)
