"""The same plans on transformers: the reference that serving is compared with, and trainable.

`block` has the equations.
"""

from vllm_depthpar.hf.block import Apart, ParallelBlock, Stream, neurons
from vllm_depthpar.hf.decoder import (
    body,
    cap_of,
    capped,
    context,
    embed,
    last_hidden,
    logits,
    of_kind,
)
from vllm_depthpar.hf.loading import config_of, load, load_unmodified, outline
from vllm_depthpar.hf.restructuring import checkpoint_names, is_of_experts, restructure

__all__ = [
    "Apart",
    "ParallelBlock",
    "Stream",
    "body",
    "cap_of",
    "capped",
    "checkpoint_names",
    "config_of",
    "context",
    "embed",
    "is_of_experts",
    "last_hidden",
    "load",
    "load_unmodified",
    "logits",
    "neurons",
    "of_kind",
    "outline",
    "restructure",
]
