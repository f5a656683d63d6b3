"""What quantized tensors stand for, of every kind that a checkpoint can be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import write_llama
from quantized_models import KINDS, write_quantized
from safetensors.torch import load_file

from vllm_depthpar.checkpoint.quantized import dequantizer
from vllm_depthpar.errors import UserError

STORED = {kind for kind, of_kind in KINDS.items() if of_kind.config is not None}


@pytest.mark.parametrize("kind", sorted(STORED - {"mxfp4"}))
def test_equals_the_dequantized_checkpoint(kind: str, tmp_path: Path) -> None:
    source = write_llama(tmp_path / "fp32", layers=2, attention_bias=True)
    quantized, dequantized = write_quantized(source, tmp_path, kind, ignore=[1])
    found = dequantizer(quantized)(load_file(quantized / "model.safetensors"))
    wanted = load_file(dequantized / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name].float(), tensor), name


def test_mxfp4_is_not_known(tmp_path: Path) -> None:
    quantized, _ = write_quantized(write_llama(tmp_path / "fp32", layers=1), tmp_path, "mxfp4")
    with pytest.raises(UserError, match=r"without a tensor 'model.*weight_global_scale'"):
        dequantizer(quantized)(load_file(quantized / "model.safetensors"))
