"""Who asks is told of adapters by the names of its own modules, and of no other model's."""

from __future__ import annotations

from collections.abc import Collection

import pytest
import torch
from torch import nn
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu

from vllm_depthpar.vllm_compat import tell_of_adapters

OWN = ["model.layers.3.mlp.down_proj", "lm_head"]
TOWER = ["vision_tower.encoder.layers.3.mlp.fc1", "language_model_2.layers.0.mlp.down_proj"]


@pytest.mark.parametrize("place", ["", "language_model."])
def test_a_model_is_told_of_its_own_modules(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that has adapters, and a language model inside one that sees."""
    for owner, name in [
        (LoRAModelManager, "_add_adapter"),
        (lora_ops, "bgmv_shrink"),
        (punica_cpu, "bgmv_shrink"),
    ]:
        monkeypatch.setattr(owner, name, vars(owner)[name])  # as it was, when the test ends
    whole, told = nn.Module(), list[Collection[str]]()
    whole.language_model = nn.Module()
    tell_of_adapters(whole.get_submodule(place.rstrip(".")), told.append)
    names = [f"{place}{name}" for name in OWN] + (TOWER if place else [])
    # vLLM's manager of adapters, of a model without a module that could have one.
    manager = object.__new__(LoRAModelManager)
    manager.model, manager.modules, manager.packed_modules = whole, {}, {}
    manager._enable_mixed_moe_lora_format, manager._registered_adapters = False, {}
    factor = torch.ones(8, 8)
    weights = {name: LoRALayerWeights(name, 8, 8, factor, factor) for name in names}
    adapter = LoRAModel(1, 8, weights)
    manager._add_adapter(adapter)
    assert told == [OWN]
    assert manager._registered_adapters == {1: adapter}
