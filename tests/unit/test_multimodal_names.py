"""What of a multimodal checkpoint is the language model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import write_llama
from safetensors.torch import load_file, save_file

from vllm_depthpar.checkpoint import export
from vllm_depthpar.checkpoint.config import read_config
from vllm_depthpar.checkpoint.tensors import check_folder
from vllm_depthpar.errors import UserError
from vllm_depthpar.plan import resolve
from vllm_depthpar.plan.multimodal import language_config, language_names
from vllm_depthpar.plan.plan import halves_of
from vllm_depthpar.util import files

TEXT: dict[str, Any] = {"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": True}
TOWER = "vision_tower.vision_model.encoder.layers.9.mlp.fc1.weight"


def test_config_of_the_language_model() -> None:
    """Its own keys, and over them those that the whole model's say of it."""
    outside = {"tie_word_embeddings": False, "dtype": "bfloat16", "depthpar": "auto"}
    whole = {"model_type": "llava", "text_config": TEXT, "vision_config": {}, **outside}
    assert language_config(whole) == {**TEXT, **outside}
    assert language_config({**whole, "depthpar": None, "dtype": None}) == {
        **TEXT,
        "tie_word_embeddings": False,
    }
    for other in (TEXT, {**whole, "model_type": "blip"}, {**whole, "text_config": None}):
        assert language_config(other) == other


@pytest.mark.parametrize(
    ("prefix", "head"),
    [("language_model.model.", "language_model.lm_head."), ("model.language_model.", "lm_head.")],
)
def test_old_and_new_names(prefix: str, head: str) -> None:
    rest = ["layers.0.mlp.up_proj.weight", "embed_tokens.weight", "norm.weight"]
    names = [f"{prefix}{name}" for name in rest] + [f"{head}weight", TOWER]
    found = language_names(names)
    assert list(found.values()) == [*(f"model.{name}" for name in rest), "lm_head.weight"]
    assert TOWER not in found
    alone = list(found.values())
    assert language_names(alone) == dict(zip(alone, alone, strict=True))


def test_a_checkpoint_is_checked_as_its_language_model_and_not_written(tmp_path: Path) -> None:
    text = write_llama(tmp_path / "text", layers=2)
    folder = tmp_path / "sees"
    folder.mkdir()
    config = files.read_json(text / "config.json", "a config")
    files.write_json(folder / "config.json", {"model_type": "llava", "text_config": config})
    tensors = load_file(text / "model.safetensors")
    inside = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    inside[TOWER] = torch.zeros(3, 3)  # a layer of a tower is none of the language model's
    save_file(inside, folder / "model.safetensors", metadata={"format": "pt"})
    assert read_config(str(folder)) == config
    check_folder(folder, read_config(str(folder)), halves_of(range(2)))
    with pytest.raises(UserError, match=r"is multimodal, and can't be written anew; allowed: to "):
        export.check_source(str(folder), resolve({"pair": [0, 2]}, 2))
    del inside["language_model.model.layers.1.mlp.up_proj.weight"]
    save_file(inside, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layer 1 of the checkpoint lacks 'mlp.up_proj.weight'"):
        check_folder(folder, read_config(str(folder)), halves_of(range(2)))
