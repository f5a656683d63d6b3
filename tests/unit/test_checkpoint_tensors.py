"""Checkpoints whose tensors are not what config.json says: refused in one line by whoever reads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import write_llama
from safetensors.torch import load_file, save_file

from vllm_depthpar import hf
from vllm_depthpar.checkpoint.tensors import Expected, check_folder, split_name, stored
from vllm_depthpar.cli.main import main
from vllm_depthpar.errors import UserError
from vllm_depthpar.model.causal_lm import addressed, places_of
from vllm_depthpar.plan import resolve
from vllm_depthpar.plan.families import FAMILIES as FAMILIES_OF
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.plan.plan import halves_of
from vllm_depthpar.plan.spec import FOLDED

LAYERS = 4
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"model_type": "qwen2", "hidden": 128},
    "qwen3": {"model_type": "qwen3"},
    "gemma3": {"model_type": "gemma3_text"},
    "phi3": {"model_type": "phi3"},
    "glm4": {"model_type": "glm4", "attention_bias": True},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 3},
    "qwen2_moe": {"model_type": "qwen2_moe", "num_experts": 3},
    "gpt_oss": {"model_type": "gpt_oss", "num_local_experts": 3},
    "bloom": {"model_type": "bloom"},
}
PLAN = {"pair": [0, 4]}


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: write_llama(folder / name, layers=LAYERS, **shape) for name, shape in FAMILIES.items()
    }


def changed(source: Path, folder: Path, change: dict[str, torch.Tensor | None]) -> Path:
    """A copy with other tensors under some names, or none."""
    tensors = {**load_file(source / "model.safetensors"), **change}
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_names() -> None:
    assert split_name("model.layers.12.mlp.up_proj.weight") == ("model.", 12, "mlp.up_proj.weight")
    assert split_name("layers.0.x") == ("", 0, "x")
    assert split_name("model.norm.weight") is None
    assert split_name("model.players.3.x") is None


@pytest.mark.parametrize("before", ["", "transformer."])
def test_names_of_blooms_files(before: str) -> None:
    name_of = FAMILIES_OF["bloom"].name_of
    names = {
        "word_embeddings.weight": "model.embed_tokens.weight",
        "word_embeddings_layernorm.bias": "model.embed_tokens.norm.bias",
        "h.12.self_attention.dense.bias": "model.layers.12.self_attn.dense.bias",
        "h.0.mlp.dense_4h_to_h.weight": "model.layers.0.mlp.dense_4h_to_h.weight",
        "ln_f.bias": "model.norm.bias",
    }
    for theirs, name in names.items():
        assert name_of(before + theirs) == name_of(name) == name
    assert name_of("lm_head.weight") == "lm_head.weight"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_expected_is_what_is_there(family: str, models: dict[str, Path]) -> None:
    folder = models[family]
    expected = Expected(config_of(folder))
    found = {
        place[2]: shape
        for name, (_, shape) in stored(folder).items()
        if (place := expected.place_of(name)) and place[1] == 2
    }
    assert found == ModelShape.from_config(config_of(folder)).layer_tensors(2)
    check_folder(folder, config_of(folder), halves_of(range(LAYERS)))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_every_wrong_size(family: str, models: dict[str, Path]) -> None:
    """One row or column less, one more, half of them, transposed; and none."""
    config = config_of(models[family])
    expected = Expected(config)
    shapes = {name: shape for name, (_, shape) in stored(models[family]).items()}
    for rest, right in expected.of_layer(1).items():
        (name,) = (one for one in shapes if (expected.place_of(one) or ())[1:] == (1, rest))
        wrong = {right[::-1]} - {right}
        for dim in range(len(right)):
            for size in (right[dim] - 1, right[dim] + 1, right[dim] // 2):
                wrong.add((*right[:dim], size, *right[dim + 1 :]))
        for shape in wrong:
            line = (
                f"layer 1 of the checkpoint: {name!r} has the shape {list(shape)}; allowed: "
                f"{list(right)}, as its config.json says"
            )
            with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
                expected.check_all({**shapes, name: shape}, halves_of(range(LAYERS)))
        with pytest.raises(UserError, match=f"^layer 1 of the checkpoint lacks {rest!r}; "):
            expected.check_all(
                {k: v for k, v in shapes.items() if k != name}, halves_of(range(LAYERS))
            )
        expected.check_all({k: v for k, v in shapes.items() if k != name}, halves_of([0, 2, 3]))


def test_numbers_of_layers(models: dict[str, Path]) -> None:
    folder = models["llama"]
    fewer = {**config_of(folder), "num_hidden_layers": LAYERS - 1}
    with pytest.raises(
        UserError,
        match=r"^the checkpoint has layer 3 \('model\.layers\.3\..*'\), .* layers 0 to 2$",
    ):
        check_folder(folder, fewer, halves_of(range(LAYERS - 1)))
    more = {**config_of(folder), "num_hidden_layers": LAYERS + 1}
    with pytest.raises(
        UserError,
        match=r"^the checkpoint has no layer 4, which the plan runs; allowed: layers 0, 1, 2, 3$",
    ):
        check_folder(folder, more, halves_of(range(LAYERS + 1)))
    check_folder(folder, more, halves_of(range(LAYERS)))


def test_quantized_ones_have_other_shapes(models: dict[str, Path]) -> None:
    config = {**config_of(models["llama"]), "quantization_config": {"quant_method": "awq"}}
    expected = Expected(config)
    expected.check("model.layers.1.mlp.up_proj.weight", (1, 2))
    with pytest.raises(UserError, match=r"^the checkpoint has layer 4 "):
        expected.check("model.layers.4.mlp.up_proj.qweight", (1, 2))


def test_hf_and_export(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, name = models["llama"], "model.layers.2.mlp.up_proj.weight"
    folder = changed(source, tmp_path / "wrong", {name: torch.zeros(80, 64)})
    line = r"layer 2 of the checkpoint: .*up_proj\.weight' has the shape \[80, 64\]; .* \[96, 64\]"
    for load in (lambda: hf.load(folder, PLAN), lambda: hf.load_unmodified(folder)):
        with pytest.raises(UserError, match=line):
            load()
    out = tmp_path / "out"
    assert main(["export", str(folder), "--plan", json.dumps(PLAN), "--out", str(out)]) == 1
    assert re.match(f"depthpar: error: {line}", capsys.readouterr().err)
    assert not out.exists()

    config = {**config_of(source), "num_hidden_layers": LAYERS - 2}
    (folder / "config.json").write_text(json.dumps(config))
    plan = json.dumps({"pair": [0, 2]})
    with pytest.raises(UserError, match=r"the checkpoint has layer 2 .*num_hidden_layers 2"):
        hf.load(folder, {"pair": [0, 2]})
    assert main(["export", str(folder), "--plan", plan, "--out", str(out)]) == 1
    assert "num_hidden_layers 2; allowed: layers 0 to 1" in capsys.readouterr().err
    assert not out.exists()


def test_tensors_that_come_from_elsewhere(models: dict[str, Path]) -> None:
    """Those of no file that was looked at before: of a stream, of a trainer."""
    expected, plan = Expected(config_of(models["llama"])), resolve(PLAN, LAYERS)
    places = places_of(plan, (FOLDED,) * plan.depth)
    weights = [("model.layers.0.mlp.up_proj.weight", torch.zeros(96, 64))]
    names = [name for name, _ in addressed(weights, places, expected)]
    assert names == ["model.layers.0.0.mlp.up_proj.weight"]
    weights.append(("model.layers.3.mlp.up_proj.weight", torch.zeros(80, 64)))
    with pytest.raises(UserError, match=r"^layer 3 of the checkpoint: .* \[80, 64\]; "):
        list(addressed(weights, places, expected))


@pytest.mark.parametrize(
    ("index", "line"),
    [
        ("{", "can't be read (line 1 column 2: "),
        ("[" * 100_000, "can't be read (nested too deeply); allowed: an index of tensors"),
        ("[]", "is not an index of tensors; allowed: one, with a weight_map"),
        ('{"weight_map": null}', "is not an index of tensors; allowed: one, with a weight_map"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "can't be read (No such file"),
        ('{"weight_map": {"a": "junk.safetensors"}}', "can't be read (Error while deserializing"),
        ('{"weight_map": {"a": "folder"}}', "is not a file; allowed: safetensors"),
    ],
)
def test_bad_files(index: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    (tmp_path / "junk.safetensors").write_bytes(b"\xff" * 64)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=re.escape(line)) as raised:
        stored(tmp_path)
    assert "\n" not in str(raised.value)


def test_embedding_norm_and_head(models: dict[str, Path]) -> None:
    folder = models["llama"]
    shapes = {name: shape for name, (_, shape) in stored(folder).items()}
    config = config_of(folder)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        rest = {one: shape for one, shape in shapes.items() if one != name}
        with pytest.raises(UserError, match=f"^the checkpoint lacks '{name}'; allowed: whole ch"):
            Expected(config).check_all(rest, halves_of(range(LAYERS)))
        wrong = {**shapes, name: (7, *shapes[name][1:])}
        with pytest.raises(UserError, match=rf"^the checkpoint: '{name}' has the shape \[7.*\]; "):
            Expected(config).check_all(wrong, halves_of(range(LAYERS)))
    tied = {**config, "tie_word_embeddings": True}
    headless = {name: shape for name, shape in shapes.items() if name != "lm_head.weight"}
    Expected(tied).check_all(headless, halves_of(range(LAYERS)))
    # A model without its head, as transformers saves it.
    bare = {name.removeprefix("model."): shape for name, shape in headless.items()}
    Expected(config).check_all(bare, halves_of(range(LAYERS)))
    with pytest.raises(UserError, match=r"^the checkpoint lacks 'norm.weight'"):
        Expected(config).check_all(
            {name: shape for name, shape in bare.items() if name != "norm.weight"},
            halves_of(range(LAYERS)),
        )


@pytest.mark.parametrize("other", ["model.safetensors.index.json", "adapter_config.json"])
def test_weights_that_transformers_would_read_otherwise(
    models: dict[str, Path], tmp_path: Path, other: str
) -> None:
    folder = changed(models["llama"], tmp_path / "model", {})
    (folder / other).write_text('{"weight_map": {"a": "model.safetensors"}}')
    with pytest.raises(UserError, match=f"has .*{re.escape(other)}.*; allowed: "):
        hf.load(folder, PLAN)
