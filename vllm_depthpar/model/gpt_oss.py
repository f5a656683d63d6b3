"""The modules of gpt-oss's layers: vLLM's, named, called and loaded as other families' are.

vLLM loads them by its whole model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.models.gpt_oss import MLPBlock, OAIAttention
from vllm.model_executor.models.utils import AutoWeightsLoader, extract_layer_index

from vllm_depthpar.model.decoder_layers import Weights
from vllm_depthpar.plan.families import windows
from vllm_depthpar.vllm_compat import load_stacked_experts


class GptOssAttention(OAIAttention):
    """gpt-oss's, named and called as other families' are, with the windows that config.json says.

    Relies on: `layer_idx` is for the window alone, which a layer has where it is even.
    """

    def __init__(self, config: Any, prefix: str, **given: Any) -> None:
        """Build it in the place of "layers.K.attn"."""
        super().__init__(config, prefix=f"{prefix.removesuffix('attn')}self_attn", **given)
        self.sinks.weight_loader = sharded_weight_loader(0)

    def _build_attention(self, config: Any, prefix: str, **given: Any) -> Any:
        window = windows(config.to_dict())[extract_layer_index(prefix)]
        self.layer_idx = int(window is None)
        return super()._build_attention(config, prefix=prefix, **given)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Run it; arguments in the order of other families'."""
        output: torch.Tensor = super().forward(hidden_states, positions)
        return output


class GptOssMLP(MLPBlock):
    """gpt-oss's, which loads its experts: vLLM's is loaded by its whole model."""

    def load_weights(self, weights: Weights) -> set[str]:
        """Load ("experts.down_proj", (experts, intermediate, hidden)) and so on, and the router."""
        stacked: set[str] = set()

        def others() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                module, _, rest = name.partition(".")
                if module == "experts":
                    stacked.add(f"experts.{load_stacked_experts(self.experts, rest, tensor)}")
                else:
                    yield name, tensor

        return AutoWeightsLoader(self).load_weights(others()) | stacked
