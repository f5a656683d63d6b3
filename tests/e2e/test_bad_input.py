"""Wrong input to `vllm serve`: one clear line and exit code 1 before weights load."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forked_serve import Call, Outcome, run
from models import write_llama
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.next


def plan(spec: Any) -> list[str]:
    return ["--hf-overrides", json.dumps({"depthpar": spec})]


def connector(name: str, **extra: Any) -> list[str]:
    config = {"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": extra}
    return ["--kv-transfer-config", json.dumps(config)]


def speculation(method: str) -> list[str]:
    config = {"method": method, "model": "MODEL", "num_speculative_tokens": 2}
    return ["--speculative-config", json.dumps(config)]


# Mistral's config of a model of `write_llama`.
PARAMS = {
    "dim": 64,
    "n_layers": 6,
    "head_dim": 32,
    "hidden_dim": 96,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "vocab_size": 512,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
}

# What is given, and what the line must say. MODEL: a checkpoint of 6 layers and 4 heads.
BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "index out of range": (
        {"args": plan({"blocks": [[0], [6]]})},
        ["'blocks'", "layer 6", "out of range", "0 to 5"],
    ),
    "layer twice": (
        {"args": plan({"blocks": [[0, 1], [1]]})},
        ["'blocks'", "layer 1", "twice", "once"],
    ),
    "odd span": ({"args": plan({"pair": [1, 4]})}, ["'pair'", "[1, 4]", "3 layers", "multiple"]),
    "empty plan": ({"args": plan({})}, ["empty", "'blocks', 'desync', 'drop_attention', "]),
    "unknown key": ({"args": plan({"pairs": [0, 2]})}, ["'pairs'", "did you mean 'pair'?"]),
    "speed-up below 1": (
        {"args": plan({"skip": {"speedup": 0.5}})},
        ["'skip.speedup'", "0.5", "from 1 to half the number of layers"],
    ),
    "speed-up above N/2": (
        {"args": plan({"skip": {"speedup": 4}})},
        ["'skip.speedup'", "4", "1 to 3"],
    ),
    "malformed JSON": (
        {"env": {"DEPTHPAR_PLAN": '{"pair": [0, 2'}},
        ["malformed JSON", "line 1 column 15"],
    ),
    "plan file missing": (
        {"env": {"DEPTHPAR_PLAN": "/nowhere/plan.json"}},
        ["'/nowhere/plan.json'", "No such file", "JSON"],
    ),
    "plan file that holds null": (
        {"env": {"DEPTHPAR_PLAN": "FOLDER/null.json"}},
        ["plan file '", "null.json': null is no plan", "allowed: a mapping"],
    ),
    "null": (
        {"args": plan(None)},
        ["--hf-overrides, key 'depthpar': null is no plan", "allowed: a mapping"],
    ),
    "nothing published of it": (
        {"args": plan("published")},
        ["plan 'published': no paper has one for a llama of 6 layers", "allowed: Llama 2 7B, "],
    ),
    "blank plan": (
        {"env": {"DEPTHPAR_PLAN": " "}},
        ["plan is empty text", "allowed: JSON text"],
    ),
    "plan for another number of layers": (
        {"args": plan({"layers": 32, "pair": [0, 2]})},
        ["'layers'", "32", "allowed: 6"],
    ),
    "heads not divisible by TP": (
        {"args": [*plan({"pair": [0, 2]}), "--tensor-parallel-size", "3"]},
        ["--tensor-parallel-size 3", "4 heads", "allowed: 1, 2, 4"],
    ),
    "model path missing": ({"model": "/nowhere/model"}, ["no such model", "folder"]),
    "only pickled weights": (
        {"model": "pickled"},
        ["no *.safetensors", "allowed: safetensors", "--load-format hf"],
    ),
    "port taken": ({"port": "taken"}, ["port is taken", "--port"]),
    "another architecture": (
        {"model": "gpt2"},
        ["GPT2LMHeadModel", "allowed: ", "LlamaForCausalLM"],
    ),
    "more experts a token than there are": (
        {"model": "greedy router"},
        ["'num_experts_per_tok' is 7", "allowed: 1 to 6, its num_local_experts"],
    ),
    "expert parallelism": (
        {"model": "mixtral", "args": ["--enable-expert-parallel"]},
        ["--enable-expert-parallel", "not checked", "allowed: without it"],
    ),
    "adapters beside experts": (
        {"model": "mixtral", "args": ["--enable-lora"]},
        ["--enable-lora", "no kernel on CPUs", "allowed: without it, the adapter merged"],
    ),
    "a family nobody has taught this package": (
        {"model": "cohere"},
        ["CohereForCausalLM", "allowed: ", "MistralForCausalLM", "GptOssForCausalLM"],
    ),
    "experts in MXFP4": (
        {"model": "gpt-oss in MXFP4"},
        ["'quantization_config' is not supported", "allowed: gpt_oss models without it"],
    ),
    "what vLLM takes for granted": (
        {"model": "gpt-oss of other limits"},
        ["'swiglu_limit' is 5.0", "allowed: 7.0, which vLLM takes for granted of a gpt_oss"],
    ),
    "experts that vLLM's kernel for CPUs can't cut": (
        {"model": "gpt-oss", "args": ["--tensor-parallel-size", "2"]},
        ["--tensor-parallel-size 2", "each rank would have 48", "multiples of 32", "allowed: 1"],
    ),
    "another RoPE than vLLM's": (
        {"model": "gpt-oss without YaRN"},
        ["key 'rope_", "linear", "allowed: 'yarn' with beta_fast, beta_slow, factor"],
    ),
    "a BLOOM that adds to what it has normalized": (
        {"model": "bloom after norms"},
        ["'apply_residual_connection_post_layernorm' is not", "allowed: bloom models without it"],
    ),
    "adapters of a BLOOM": (
        {"model": "bloom", "args": ["--enable-lora"]},
        ["--enable-lora: files of a bloom have q, k and v in one", "allowed: without it"],
    ),
    "quantization of a BLOOM": (
        {"model": "bloom", "args": ["--quantization", "fp8_per_channel"]},
        ["--quantization: files of a bloom have q, k and v in one", "allowed: without it"],
    ),
    "ranks apart, of a BLOOM": (
        {"model": "bloom", "args": plan({"desync": {"every": 2}})},
        ["key 'desync': this model's q, k and v are one projection", "allowed: 'drop_sync', "],
    ),
    "layers of two kinds": (
        {"model": "hybrid"},
        [
            "Qwen3NextForCausalLM: three of four of its layers have linear attention",
            "allowed: LlamaForCausalLM, ",
        ],
    ),
    "a family's variant": (
        {"model": "chunked"},
        ["'dual_chunk_attention_config' is not supported", "allowed: qwen2 models without it"],
    ),
    "Mistral's own format": (
        {"model": "consolidated"},
        ["Mistral's own format", "allowed: --config-format hf --load-format hf"],
    ),
    "Mistral's own weights": (
        {"model": "consolidated", "args": ["--config-format", "hf"]},
        ["Mistral's own format", "allowed: --config-format hf --load-format hf"],
    ),
    "an MLP of another size": (
        {"model": "small MLP", "args": plan({"pair": [0, 6]})},
        ["layer 3 of the checkpoint", "mlp.up_proj.weight'", "[80, 64]", "allowed: [96, 64]"],
    ),
    "too few KV heads": (
        {"model": "few heads", "args": plan({"pair": [0, 6]})},
        ["layer 3 of the checkpoint", "self_attn.k_proj.weight'", "[32, 64]", "allowed: [64, 64]"],
    ),
    "more layers than config.json says": (
        {"model": "four of six", "args": plan({"pair": [0, 2]})},
        ["has layer 4", "num_hidden_layers 4", "allowed: layers 0 to 3"],
    ),
    "fewer layers than config.json says": (
        {"model": "eight of six", "args": plan({"pair": [0, 2]})},
        ["has no layer 6", "allowed: layers 0, 1, 2, 3, 4, 5"],
    ),
    "windows that differ in what is to be folded": (
        {"model": "windows", "args": plan({"pair": [0, 6], "layout": "folded"})},
        ["key 'layout': the layers [2, 3], whose windows", "allowed: 'whole'"],
    ),
    "norms after modules of what is to be folded": (
        {"model": "gemma", "args": plan({"pair": [0, 2], "layout": "folded"})},
        ["key 'layout': the layers [0, 1], which have norms after", "allowed: 'whole'"],
    ),
    "norms after modules that get no sum": (
        {"model": "gemma", "args": plan({"desync": {"every": 2}})},
        ["key 'desync'", "norms after them", "allowed: 'drop_sync', 'parallel_residual' or"],
    ),
    "speculation with a Gemma's insides": (
        {"model": "gemma", "args": speculation("eagle")},
        ["'eagle' reads", "no such heads for gemma3_text", "allowed: "],
    ),
    "RoPE of a part of each head": (
        {"model": "rotary"},
        ["'partial_rotary_factor' is 0.5", "whole heads of a llama", "allowed: 1"],
    ),
    "sizes that are text": (
        {"model": "text sizes"},
        ["config.json's key 'hidden_size' is '64'", "allowed: an integer from 1 to "],
    ),
    "no heads": (
        {"model": "no heads"},
        ["config.json's key 'num_attention_heads' is 0", "allowed: an integer from 1 to "],
    ),
    "kinds of too few layers": (
        {"model": "short layer_types"},
        ["config.json's key 'layer_types' is for 2 layers", "allowed: 6"],
    ),
    "a null that counts layers": (
        {"model": "null"},
        ["config.json's key 'max_window_layers' is None", "allowed: an integer of 0 or more"],
    ),
    "another activation": (
        {"model": "gelu"},
        ["config.json's key 'hidden_act' is 'gelu'", "allowed: 'silu'"],
    ),
    "config.json that is cut off": (
        {"model": "cut off"},
        ["config.json can't be read (line 1 column ", "allowed: a config.json"],
    ),
    "index that leads out of the folder": (
        {"model": "outside", "args": plan({"pair": [0, 2]})},
        ["index.json names '../model.safetensors'", "allowed: files of its folder"],
    ),
    "a file of options, and no model": (
        {"model": "/nowhere/model", "command": ["--config", "FOLDER/options.yaml"]},
        ["no such model", "folder"],
    ),
    "a file of options that names no model": (
        {"model": "--skip-tokenizer-init", "command": ["--config", "FOLDER/nowhere.yaml"]},
        ["no such model", "folder"],
    ),
    "a file of options that is missing": (
        {"args": ["--config", "/nowhere.yaml"]},
        ["--config /nowhere.yaml can't be read", "No such file", "allowed: a YAML file"],
    ),
    "weights by the names of parameters": (
        {"args": [*plan({"pair": [0, 2]}), "--load-format", "sharded_state"]},
        ["--load-format sharded_state", "allowed: auto, safetensors, hf, pt, "],
    ),
    "tensorizer": (
        {"args": [*plan("identity"), "--load-format", "tensorizer"]},
        ["--load-format tensorizer", "allowed: auto, safetensors, hf, pt, "],
    ),
    "KV store without plans": (
        {"args": [*plan({"pair": [0, 2]}), *connector("NixlConnector")]},
        ["NixlConnector", "not by plan", "allowed: OffloadingConnector, ", "'identity'"],
    ),
    "KV store among others": (
        {
            "args": [
                *plan({"pair": [0, 2]}),
                *connector(
                    "MultiConnector",
                    connectors=[
                        {"kv_connector": "ExampleConnector", "kv_role": "kv_both"},
                        {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"},
                    ],
                ),
            ]
        },
        ["LMCacheConnectorV1", "not by plan", "allowed: OffloadingConnector, ", "'identity'"],
    ),
    "KV store by another flag": (
        {
            "args": [
                *plan({"pair": [0, 2]}),
                *["--kv-offloading-size", "1", "--kv-offloading-backend", "lmcache"],
            ]
        },
        ["LMCacheMPConnector", "not by plan", "allowed: OffloadingConnector, ", "'identity'"],
    ),
    "KV store behind a memory": (
        {
            "args": [
                *plan({"pair": [0, 2]}),
                *connector(
                    "OffloadingConnector",
                    spec_name="TieringOffloadingSpec",
                    cpu_bytes_to_use=1 << 20,
                    secondary_tiers=[{"type": "fs", "root_dir": "/kv"}, {"type": "p2p"}],
                ),
            ]
        },
        ["tier 'p2p'", "not by plan", "allowed: fs, obj, example"],
    ),
    "decode context parallelism": (
        {
            "args": [
                *plan({"blocks": [[0], [1, 2]]}),
                *["--tensor-parallel-size", "4", "--decode-context-parallel-size", "2"],
            ]
        },
        ["--decode-context-parallel-size 2", 'allowed: 1, or the plan\'s "layout": "whole"'],
    ),
    "adapters on what is to be folded": (
        {"args": [*plan({"pair": [0, 2], "layout": "folded"}), "--enable-lora"]},
        ["key 'layout': the layers [0, 1]", "served with adapters", "allowed: 'whole'"],
    ),
    "pipeline parallelism": (
        {"args": ["--pipeline-parallel-size", "2"]},
        ["--pipeline-parallel-size 2", "--tensor-parallel-size"],
    ),
    "quantization of what is to be folded": (
        {"args": [*plan({"pair": [0, 2], "layout": "folded"}), "--quantization", "fp8"]},
        ["key 'layout': the layers [0, 1]", "quantized", "allowed: 'whole'"],
    ),
    "speculation with the model's insides": (
        {"args": [*plan({"ladder": "all"}), *speculation("eagle3")]},
        ["'eagle3' reads complete streams", "allowed: plans without a ladder, or 'eagle'"],
    ),
    "speculation that nobody tried": (
        {"args": speculation("custom_class")},
        ["'custom_class' was not tried", "allowed: ngram"],
    ),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Outcome]]:
    folder = tmp_path_factory.mktemp("models")
    model = write_llama(folder / "llama")
    (folder / "gpt2").mkdir()
    gpt2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 2, "n_head": 2}
    (folder / "gpt2" / "config.json").write_text(json.dumps(gpt2))
    hybrid = write_llama(folder / "hybrid") / "config.json"
    named = {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next"}
    hybrid.write_text(json.dumps(json.loads(hybrid.read_text()) | named))
    cohere = write_llama(folder / "cohere") / "config.json"
    named = {"architectures": ["CohereForCausalLM"], "model_type": "cohere"}
    cohere.write_text(json.dumps(json.loads(cohere.read_text()) | named))
    mxfp4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    unfit: dict[str, dict[str, Any]] = {
        "in MXFP4": {"quantization_config": mxfp4},
        "of other limits": {"swiglu_limit": 5.0},
        "without YaRN": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    }
    for name, keys in unfit.items():
        write_llama(folder / f"gpt-oss {name}", model_type="gpt_oss", **keys)
    write_llama(folder / "gpt-oss", model_type="gpt_oss")
    write_llama(folder / "bloom", model_type="bloom")
    after: dict[str, Any] = {"apply_residual_connection_post_layernorm": True}
    write_llama(folder / "bloom after norms", model_type="bloom", **after)
    write_llama(folder / "mixtral", model_type="mixtral")
    write_llama(folder / "greedy router", model_type="mixtral", num_experts_per_tok=7)
    write_llama(
        folder / "chunked", model_type="qwen2", dual_chunk_attention_config={"chunk_size": 8}
    )
    write_llama(
        folder / "windows",
        model_type="qwen3",
        sliding_window=8,
        use_sliding_window=True,
        max_window_layers=3,
    )
    write_llama(folder / "gemma", model_type="gemma3_text")
    write_llama(folder / "rotary", partial_rotary_factor=0.5)
    (folder / "null.json").write_text("null")
    write_llama(folder / "text sizes", hidden_size="64")
    write_llama(folder / "no heads", num_attention_heads=0)
    write_llama(folder / "short layer_types", layer_types=["full_attention"] * 2)
    write_llama(folder / "null", model_type="qwen2", max_window_layers=None)
    write_llama(folder / "gelu", hidden_act="gelu")
    cut_off = write_llama(folder / "cut off") / "config.json"
    cut_off.write_text(json.dumps(json.loads(cut_off.read_text()))[:100])
    outside = write_llama(folder / "outside")
    (outside / "model.safetensors").rename(outside / "model-1.safetensors")
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (outside / "model.safetensors.index.json").write_text(json.dumps(index))
    options = "model-impl: depthpar\nskip-tokenizer-init: true\n"
    (folder / "options.yaml").write_text(options)
    (folder / "nowhere.yaml").write_text(f"{options}model: /nowhere/model\n")
    for name, tensor, rows in (
        ("small MLP", "mlp.up_proj", 80),
        ("few heads", "self_attn.k_proj", 32),
    ):
        file = write_llama(folder / name) / "model.safetensors"
        tensors, key = load_file(file), f"model.layers.3.{tensor}.weight"
        save_file({**tensors, key: tensors[key][:rows].clone()}, file, metadata={"format": "pt"})
    for name, layers in (("four of six", 4), ("eight of six", 8)):
        config = write_llama(folder / name) / "config.json"
        config.write_text(
            json.dumps({**json.loads(config.read_text()), "num_hidden_layers": layers})
        )
    pickled = write_llama(folder / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    consolidated = write_llama(folder / "consolidated", model_type="mistral")
    (consolidated / "consolidated.safetensors").hardlink_to(consolidated / "model.safetensors")
    (consolidated / "params.json").write_text(json.dumps(PARAMS))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        calls = {}
        for name, (given, _) in BAD.items():
            port = str(taken.getsockname()[1]) if given.get("port") == "taken" else "0"
            named = given.get("model", "llama")
            # An absolute path is itself.
            asks = given.get("command", ["--model-impl", "depthpar", "--skip-tokenizer-init"])
            args = [named if named.startswith("-") else str(folder / named), *asks]
            args += ["--host", "127.0.0.1", "--port", port, *given.get("args", [])]
            names = {"MODEL": str(model), "FOLDER": str(folder)}
            for name_in_it, path in names.items():
                args = [arg.replace(name_in_it, path) for arg in args]
            given_env = given.get("env", {}).items()
            env = {key: value.replace("FOLDER", str(folder)) for key, value in given_env}
            calls[name] = Call(args, {"VLLM_LOGGING_LEVEL": "INFO", **env})
        yield dict(zip(calls, run(list(calls.values())), strict=True))


@pytest.mark.parametrize("name", BAD)
def test_one_line_and_exit_code_1(name: str, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[name]
    assert outcome.code == 1, outcome.output[-2000:]
    last = outcome.output.strip().splitlines()[-1]
    assert last.startswith("depthpar: error: "), outcome.output[-2000:]
    for words in BAD[name][1]:
        assert words in last
    assert "Traceback" not in outcome.output
    assert "Loading safetensors" not in outcome.output
    assert "EngineCore" not in outcome.output


def test_installed_command(tmp_path: Path) -> None:
    """The same through the console script, as a user starts it."""
    model = write_llama(tmp_path)
    command = [Path(sys.executable).with_name("vllm"), "serve", model, "--model-impl", "depthpar"]
    done = subprocess.run(
        [*map(str, command), *plan({"pair": [0, 3]})], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "depthpar: error: plan key 'pair': [0, 3] holds 3 layers; allowed: a multiple of 2"
    )


def test_plain_vllm_is_left_alone(tmp_path: Path) -> None:
    """Without --model-impl depthpar, a checkpoint's plan and DEPTHPAR_PLAN mean nothing."""
    model = write_llama(tmp_path)
    call = Call(
        [str(model), "--skip-tokenizer-init", "--port", "0"],
        {"DEPTHPAR_PLAN": "{", "VLLM_LOGGING_LEVEL": "INFO"},
        until="Initializing a V1 LLM engine",
    )
    (outcome,) = run([call])
    assert "Resolved architecture: LlamaForCausalLM" in outcome.output
    assert " blocks" not in outcome.output
