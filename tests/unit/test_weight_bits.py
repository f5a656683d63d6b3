"""Bytes of quantized weights, beside the files that hold them."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
from models import write_llama
from quantized_models import KINDS, write_quantized
from safetensors.torch import load_file

from vllm_depthpar.plan import resolve
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.plan.published_shapes import CONFIGS
from vllm_depthpar.plan.weight_bits import weight_bits
from vllm_depthpar.predict.cost_model import plain_time
from vllm_depthpar.predict.devices import DEVICES
from vllm_depthpar.predict.machines import Deployment


@pytest.mark.parametrize("kind", [kind for kind, of_kind in KINDS.items() if of_kind.config])
def test_bytes_are_those_of_the_files(kind: str, tmp_path: Path) -> None:
    source = write_llama(tmp_path / "fp32", layers=1, hidden=256, intermediate=1024, vocab=64)
    folder, _ = write_quantized(source, tmp_path, kind)
    shape = ModelShape.from_config(json.loads((folder / "config.json").read_text()))
    stored = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    assert shape.weight_bytes(resolve("identity", 1)) == pytest.approx(stored, rel=0.03)


def compressed(**weights: object) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": weights}},
    }


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        (None, None),
        (compressed(num_bits=4, type="int", symmetric=True, group_size=128), 4 + 16 / 128),
        (compressed(num_bits=4, type="int", symmetric=False, group_size=32), 4 + 20 / 32),
        (compressed(num_bits=4, type="float", symmetric=True, group_size=16), 4.5),  # NVFP4
        (compressed(num_bits=8, type="float", symmetric=True, strategy="channel"), 8),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": True}, 8),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, 4 + 20 / 64),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, None),
        # What is not understood counts as if it were not there.
        ({"quant_method": "gptq", "bits": "four"}, None),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": 1}}, None),
        ({"quant_method": "compressed-tensors"}, None),
    ],
)
def test_bits(quantization: dict[str, Any] | None, bits: float | None) -> None:
    assert weight_bits({"quantization_config": quantization}) == bits


def test_layers_and_not_the_head_are_read_sooner() -> None:
    """Decoding that memory bounds: by the bytes that are no longer read."""
    shape = ModelShape.from_config(CONFIGS["llama-3.1-8b"])
    alone = Deployment(DEVICES["h100"], None, 1)
    whole, int4 = (plain_time(one, alone) for one in (shape, replace(shape, weight_bits=4)))
    projections = sum(prod(of) for of in shape.layer_tensors(0).values() if len(of) == 2)
    saved = shape.layers * projections * 1.5 / DEVICES["h100"].memory_bandwidth
    assert whole.memory - int4.memory == pytest.approx(saved)
    assert whole.fixed == int4.fixed
