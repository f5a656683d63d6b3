"""By which names adapters and lists of a quantized checkpoint find the modules of each family."""

from __future__ import annotations

import pytest
from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer

from vllm_depthpar.model.family_layers import naming
from vllm_depthpar.plan.families import FAMILIES


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("module", ["qkv_proj", "gate_up_proj"])
def test_projections_have_the_names_that_they_have_in_files(kind: str, module: str) -> None:
    """Where a checkpoint has them as one, a list of what is not quantized does, too."""
    family = FAMILIES[kind]
    fused = family.fused_qkv if module == "qkv_proj" else family.fused_mlp
    parts = ["q_proj", "k_proj", "v_proj"] if module == "qkv_proj" else ["gate_proj", "up_proj"]
    before = "model.layers.1.block."
    listed = [before + name for name in ([module] if fused else parts)]
    packed = naming(kind)["packed_modules_mapping"]
    assert should_ignore_layer(before + module, listed, packed)
    assert not should_ignore_layer(before + module, [name + "s" for name in listed], packed)
