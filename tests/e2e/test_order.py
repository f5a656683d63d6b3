"""`depthpar order` as a user runs it, on small random models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import prompts, quantize_int8, write_llama, write_tokenizer
from safetensors.torch import load_file, save_file

from vllm_depthpar import hf
from vllm_depthpar.cli.main import main

pytestmark = pytest.mark.usefixtures("own_cache")

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two files, as large models are."""
    folder = write_tokenizer(write_llama(tmp_path_factory.mktemp("llama"), kv_heads=4), bos=True)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for file in set(where.values()):
        inside = {name: tensor for name, tensor in tensors.items() if where[name] == file}
        save_file(inside, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def order(model: Path, text: Path, out: Path, *more: object) -> int:
    calibration = ["--text", text, "--own-text", 0, "--window", 64, "--tokens", 2048]
    return main([str(part) for part in ["order", model, *calibration, "--out", out, *more]])


def test_order(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ordered"
    assert order(model, text, out, "--tp", 2) == 0
    assert "on 2 ranks" in capsys.readouterr().out
    one, other = (json.loads((at / "config.json").read_text()) for at in (model, out))
    assert one == other
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    record = json.loads((out / "rewritten.json").read_text())
    assert record["tp"] == 2
    assert len(record["costs"]) == 6
    assert "base_model" in (out / "README.md").read_text()
    one, other = hf.load_unmodified(model), hf.load_unmodified(out)
    moved = {
        name
        for name, tensor in one.state_dict().items()
        if not torch.equal(tensor, other.state_dict()[name])
    }
    kinds = {name.rpartition("layers.")[2][2:] for name in moved}
    assert kinds == {f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    with torch.no_grad():
        wanted, found = one(prompts(2, 32)).logits, other(prompts(2, 32)).logits
    torch.testing.assert_close(wanted, found, rtol=1e-4, atol=1e-4)


def test_what_can_not_be_ordered(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    int8, _ = quantize_int8(write_llama(tmp_path / "fp32"), tmp_path)
    (tmp_path / "carries").mkdir()
    config = json.loads((model / "config.json").read_text()) | {"depthpar": {"ladder": 2}}
    (tmp_path / "carries" / "config.json").write_text(json.dumps(config))
    bloom = write_llama(tmp_path / "bloom", model_type="bloom")
    for source, tp, why in [
        (bloom, 2, "has MLPs without a gate, which this command was not taught; allowed: "),
        (model, 5, "96 neurons of an MLP can't be dealt out evenly"),
        (int8, 2, "is quantized"),
        (tmp_path / "carries", 2, "carries a plan already"),
    ]:
        assert order(source, text, tmp_path / "out", "--tp", tp) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert why in line
        assert "allowed: " in line
        assert not (tmp_path / "out").exists()
