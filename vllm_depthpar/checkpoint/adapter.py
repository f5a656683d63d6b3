"""A LoRA adapter that `--enable-lora` and peft take, with the plan that it was trained for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_depthpar.checkpoint.export import made_whole
from vllm_depthpar.checkpoint.tensors import split_name
from vllm_depthpar.plan import Plan
from vllm_depthpar.util import files

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
# peft's name for the model that it has adapted.
_PREFIX = "base_model.model."


def write(
    model: str,
    plan: Plan,
    out: Path,
    matrices: Mapping[str, Tensor],
    rank: int,
    scaling: int,
    recovery: Mapping[str, Any],
) -> None:
    """Write the folder, which is `export.claimed`. It has its name only when it is complete.

    Args:
        model: what the adapter is for: folder or hub name of the checkpoint.
        plan: that the checkpoint is served with.
        matrices: by projection, as "model.layers.3.mlp.up_proj.lora_A" and ".lora_B".
        rank, scaling: of the adapter.
        recovery: what it comes from, JSON-ready, for recovery.json.
    """
    from safetensors.torch import save

    places = [place for name in matrices if (place := split_name(name)) is not None]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "r": rank,
        "lora_alpha": scaling * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({rest.split(".")[-2] for _, _, rest in places}),
        "layers_to_transform": sorted({layer for _, layer, _ in places}),
        "layers_pattern": "layers",
        "inference_mode": True,
    }
    tensors = {
        f"{_PREFIX}{name}.weight": matrix.float().cpu().contiguous()
        for name, matrix in matrices.items()
    }
    with made_whole(out) as partial:
        files.write_bytes(partial / WEIGHTS, save(tensors, metadata={"format": "pt"}))
        files.write_json(partial / CONFIG, config)
        files.write_json(partial / "plan.json", plan.to_spec())
        files.write_json(partial / "recovery.json", recovery)


def serving_command(model: str, out: Path, rank: int) -> str:
    """Say how to serve a checkpoint with an adapter that `write` has written for it."""
    return (
        f"DEPTHPAR_PLAN={out / 'plan.json'} vllm serve {model} --model-impl depthpar "
        f"--enable-lora --max-lora-rank {max(8, rank)} --lora-modules recovered={out}"
    )
