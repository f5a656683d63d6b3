"""Checkpoints in the format of Ladder Residual's authors (arXiv 2501.06589).

Their config.json has ``"model_type": "llamaLadder"`` and the key `ladder_layers`: a number (that
many layers, the last), a list of layer indices, or null. Weights and all other keys are a Llama's.
Read from github.com/mayank31398/ladder-residual-inference, hf_modeling_utils/.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MODEL_TYPE = "llamaLadder"
ARCHITECTURE = "LlamaLadderForCausalLM"
KEY = "ladder_layers"


def ladder_of(config: Mapping[str, Any]) -> int | list[int] | None:
    """Find what the plan key `ladder` has to say for a checkpoint to run as it was trained.

    Args:
        config: a parsed config.json, of any model.

    Returns:
        None if the checkpoint has no ladder layers.
    """
    if config.get("model_type") != MODEL_TYPE:
        return None
    return config.get(KEY) or None
