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
from vllm_depthpar.evaluate.span_study import drop_sync, ladder, pairs, prune, rows_with, spans
from vllm_depthpar.plan import resolve
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.plan.multimodal import language_config, language_names
from vllm_depthpar.plan.plan import halves_of
from vllm_depthpar.util import files

TEXT: dict[str, Any] = {"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": True}
CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 512,
}
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


def test_keys_of_the_language_model_at_the_top() -> None:
    """The first checkpoints of Qwen2.5-VL have them there, with the whole model's `model_type`."""
    rope = {"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}
    flat = {**CONFIG, **rope, "model_type": "qwen2_5_vl", "vision_config": {"hidden_size": 32}}
    found = language_config(flat)
    assert found == {**CONFIG, **rope, "model_type": "qwen2_5_vl_text"}
    nested = {
        "model_type": "qwen2_5_vl",
        "text_config": found,
        "vision_config": {"hidden_size": 32},
    }
    assert language_config(nested) == found
    shape = ModelShape.from_config(found)
    assert (shape.qkv_bias, shape.output_bias, shape.hidden) == (True, False, 64)
    with pytest.raises(UserError, match=r"'use_sliding_window' is not supported"):
        ModelShape.from_config({**found, "use_sliding_window": True})


def qwen3_vl(**tower: Any) -> ModelShape:
    """The shape of a Qwen3-VL's language model."""
    text = {**CONFIG, "model_type": "qwen3_vl_text", "num_hidden_layers": 6}
    whole = {"model_type": "qwen3_vl", "text_config": text, "vision_config": tower}
    return ModelShape.from_config(language_config(whole))


def test_layers_after_which_a_tower_adds() -> None:
    assert qwen3_vl(deepstack_visual_indexes=[5, 11]).deepstack == 2
    assert qwen3_vl(deepstack_visual_indexes=[]).deepstack == 0
    assert qwen3_vl().deepstack == 3  # as transformers reads it
    assert ModelShape.from_config(CONFIG).deepstack == 0


@pytest.mark.parametrize(
    "spec",
    [
        {"pair": [2, 6]},
        {"blocks": [[0], [1], [5], [3, 4]]},
        {"ladder": [0, 3, 4, 5]},
        {"drop_sync": "all"},
        {"parallel_residual": "all"},
        {"drop_attention": [0], "drop_mlp": [1]},
        {"desync": {"attention": [1, 3], "mlp": [3]}},
    ],
)
def test_plans_that_leave_a_place_for_what_a_tower_adds(spec: Any) -> None:
    qwen3_vl(deepstack_visual_indexes=[0, 1]).check_plan(resolve(spec, 6))


@pytest.mark.parametrize(
    "spec",
    [
        {"pair": [0, 2]},
        {"pair": [1, 3]},
        {"blocks": [[0], [2], [1], [3]]},
        {"blocks": [[0], [2], [3]]},
        {"ladder": [1]},
        {"ladder": [2]},
        {"desync": {"attention": [], "mlp": [0]}},
        {"desync": {"attention": [], "mlp": [1]}},
    ],
)
def test_plans_that_leave_none(spec: Any) -> None:
    plan = resolve(spec, 6)
    qwen3_vl(deepstack_visual_indexes=[]).check_plan(plan)
    with pytest.raises(
        UserError, match=r"where the layers 0 to 1 end, .* allowed: .* up to layer 2"
    ):
        qwen3_vl(deepstack_visual_indexes=[0, 1]).check_plan(plan)


def test_spans_of_a_study_leave_a_place_for_what_a_tower_adds() -> None:
    shape, every = qwen3_vl(deepstack_visual_indexes=[0, 1]), list(spans(6))
    assert list(rows_with(qwen3_vl(deepstack_visual_indexes=[]), every, pairs)) == every
    assert list(rows_with(shape, every, pairs)) == [span for span in every if span[0] >= 2]
    assert list(rows_with(shape, every, prune)) == [span for span in every if span[0] >= 2]
    assert list(rows_with(shape, every, ladder)) == [span for span in every if span[0] > 2]
    assert list(rows_with(shape, every, drop_sync)) == every


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
