"""What a config.json may say: one line for what no model is, from whatever reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from models import write_llama

from vllm_depthpar import hf
from vllm_depthpar.checkpoint.config import read_config
from vllm_depthpar.cli.main import main
from vllm_depthpar.errors import UserError
from vllm_depthpar.plan.config_keys import MOST_LAYERS, ConfigKeys, check_keys
from vllm_depthpar.plan.families import windows
from vllm_depthpar.plan.model_shape import ModelShape

SIZE = "an integer from 1 to 2147483647"
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": "6"}, "'num_hidden_layers' is '6'; allowed: an integer from 1 to 10000"),
    ({"num_hidden_layers": 0}, "'num_hidden_layers' is 0; allowed: an integer from 1 to 10000"),
    ({"num_hidden_layers": 6.0}, "'num_hidden_layers' is 6.0; allowed: an integer from 1 to 10000"),
    ({"num_hidden_layers": None}, "'num_hidden_layers' is None; allowed: "),
    ({"num_hidden_layers": True}, "'num_hidden_layers' is True; allowed: "),
    ({"num_hidden_layers": MOST_LAYERS + 1}, "'num_hidden_layers' is 10001; allowed: "),
    ({"hidden_size": "64"}, f"'hidden_size' is '64'; allowed: {SIZE}"),
    ({"num_attention_heads": 0}, f"'num_attention_heads' is 0; allowed: {SIZE}"),
    ({"num_attention_heads": -4}, f"'num_attention_heads' is -4; allowed: {SIZE}"),
    ({"num_key_value_heads": 0}, f"'num_key_value_heads' is 0; allowed: {SIZE}, or null"),
    (
        {"num_key_value_heads": 3},
        "'num_key_value_heads' is 3; allowed: divisors of num_attention_heads, 4",
    ),
    (
        {"hidden_size": 65, "head_dim": None},
        "'hidden_size' is 65; allowed: multiples of num_attention_heads, 4",
    ),
    ({"vocab_size": [1]}, f"'vocab_size' is [1]; allowed: {SIZE}"),
    ({"vocab_size": 10**30}, f"'vocab_size' is {10**30}; allowed: {SIZE}"),
    ({"max_window_layers": None}, "'max_window_layers' is None; allowed: an integer of 0 or more"),
    ({"max_window_layers": "3"}, "'max_window_layers' is '3'; allowed: an integer of 0 or more"),
    ({"sliding_window": "8"}, "'sliding_window' is '8'; allowed: an integer from 0 to 2147483647"),
    (
        {"layer_types": ["full_attention"] * 3},
        "'layer_types' is for 3 layers; allowed: 6, its num_hidden_layers",
    ),
    ({"layer_types": 7}, "'layer_types' is 7; allowed: a list of 'full_attention' and 'slid"),
    (
        {"layer_types": ["x"] * 6},
        "'layer_types' is ['x', 'x', 'x', 'x', 'x', 'x']; allowed: a list",
    ),
    ({"tie_word_embeddings": "no"}, "'tie_word_embeddings' is 'no'; allowed: true or false"),
    ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu'; allowed: 'silu'"),
    ({"rms_norm_eps": 0}, "'rms_norm_eps' is 0; allowed: a number above 0"),
    ({"rms_norm_eps": float("nan")}, "'rms_norm_eps' is nan; allowed: a number above 0"),
    ({"rope_theta": "x"}, "'rope_theta' is 'x'; allowed: a number above 0, or null"),
    ({"rope_scaling": "x"}, "'rope_scaling' is 'x'; allowed: a mapping, or null"),
    ({"torch_dtype": 7}, "'torch_dtype' is 7; allowed: the name of a dtype, or null"),
    ({"quantization_config": []}, "'quantization_config' is []; allowed: a mapping, or null"),
    ({"transformers_weights": "other.safetensors"}, "allowed: config.json without it"),
    ({"partial_rotary_factor": "a\nb"}, "'partial_rotary_factor' is 'a\\nb': "),
]


@pytest.mark.parametrize(("change", "words"), WRONG, ids=lambda value: str(value)[:40])
def test_what_no_model_is(
    change: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_llama(tmp_path)
    config = {**json.loads((tmp_path / "config.json").read_text()), **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", "show", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("depthpar: error: config.json's key ")
    assert words in line
    with pytest.raises(UserError) as raised:
        hf.load(tmp_path, "identity")
    assert f"depthpar: error: {raised.value}" == line


@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "bloom"]
)
def test_what_transformers_makes_of_a_config_is_right_too(tmp_path: Path, kind: str) -> None:
    """It is what vLLM hands on; and after a plan it still is the checkpoint's."""
    folder = write_llama(tmp_path, model_type=kind, hidden=128)
    read, known = read_config(str(folder)), hf.config_of(folder).to_dict()
    assert ModelShape.from_config(known) == ModelShape.from_config(read)
    assert windows(known) == windows(read)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
def test_what_gemmas_leave_out(tmp_path: Path, kind: str) -> None:
    """Their defaults, which are not Llama's, and what is of another family."""
    config = json.loads((write_llama(tmp_path, model_type=kind) / "config.json").read_text())
    left_out = ("head_dim", "num_key_value_heads", "tie_word_embeddings", "sliding_window")
    rest = {key: value for key, value in config.items() if key not in left_out}
    rest = {key: value for key, value in rest.items() if key != "sliding_window_pattern"}
    (tmp_path / "config.json").write_text(json.dumps(rest))
    known = hf.config_of(tmp_path).to_dict()
    shape = ModelShape.from_config(rest)
    assert shape == ModelShape.from_config(known)
    assert (shape.head_dim, shape.kv_heads, shape.tied) == (256, 4, True)
    full = 1 if kind == "gemma2" else 5
    assert shape.windows[: full + 1] == (4096,) * full + (None,)
    for key, value in {"hidden_activation": "silu", "use_bidirectional_attention": True}.items():
        with pytest.raises(UserError, match=f"config.json's key '{key}' is .*; allowed: "):
            ModelShape.from_config({**config, key: value})


def test_nulls_and_what_is_not_said() -> None:
    check_keys({})
    nullable = (
        *("num_key_value_heads", "head_dim", "sliding_window", "use_sliding_window", "layer_types"),
        *("attention_bias", "mlp_bias", "tie_word_embeddings", "rope_scaling", "dtype"),
    )
    check_keys(dict.fromkeys(nullable))
    check_keys({"hidden_size": 65, "unknown": object(), "rope_theta": 10000})


def test_every_key_says_what_is_allowed() -> None:
    assert all(field.description for field in ConfigKeys.model_fields.values())


def test_an_object_is_asked_for(tmp_path: Path) -> None:
    for content in ("[]", "3", "null", '"x"'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"is not a JSON object; allowed: a config\.json"):
            read_config(str(tmp_path))
