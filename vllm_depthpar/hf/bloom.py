"""BLOOM on transformers: its modules in Llama's layer and shell, under the names of those.

transformers' own add the stream inside, and are handed ALiBi.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers import BloomConfig
from transformers.models.bloom import modeling_bloom
from transformers.models.llama import modeling_llama


class BloomAttention(modeling_bloom.BloomAttention):
    """BLOOM's, which adds nothing and makes ALiBi itself."""

    o_proj = property(lambda self: self.dense)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor, past_key_values: Any = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """Compute its term, and its scores.

        Args:
            hidden_states: (batch, tokens, hidden).
            attention_mask: (batch, 1, tokens, keys); always there where attention is "eager".
        """
        keys = hidden_states.new_ones(len(hidden_states), attention_mask.shape[-1])
        alibi = modeling_bloom.build_alibi_tensor(keys, self.num_heads, hidden_states.dtype)
        nothing = hidden_states.new_zeros(())
        given = super().forward(hidden_states, nothing, alibi, attention_mask, past_key_values)
        return cast("tuple[Tensor, Tensor]", given)


class BloomMLP(modeling_bloom.BloomMLP):
    """BLOOM's, which adds nothing."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Compute its term; shapes as above."""
        return cast(Tensor, super().forward(hidden_states, hidden_states.new_zeros(())))


class BloomLayer(modeling_llama.LlamaDecoderLayer):
    """A layer of BLOOM, run as Llama's."""

    def __init__(self, config: BloomConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)
        self.self_attn, self.mlp = BloomAttention(config, layer_idx), BloomMLP(config)
        self.input_layernorm, self.post_attention_layernorm = _norm(config), _norm(config)


class _Embedding(nn.Embedding):
    """With a norm of what is looked up."""

    def __init__(self, config: BloomConfig) -> None:
        super().__init__(config.vocab_size, config.hidden_size)
        self.norm = _norm(config)

    def forward(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.norm(super().forward(tokens)))


class _NoRotary(nn.Identity):
    """In place of a rotary embedding."""

    def forward(self, *_: Tensor, **__: Tensor) -> None:
        pass


class BloomModel(modeling_llama.LlamaModel):
    """BLOOM's decoder."""

    def __init__(self, config: BloomConfig) -> None:
        modeling_llama.LlamaPreTrainedModel.__init__(self, config)
        self.embed_tokens, self.norm = _Embedding(config), _norm(config)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList([BloomLayer(config, layer) for layer in layers])
        self.rotary_emb, self.gradient_checkpointing = _NoRotary(config), False
        self.post_init()

    def forward(self, *args: Any, inputs_embeds: Tensor | None = None, **given: Any) -> Any:
        """Run it, as Llama's; `inputs_embeds` as transformers' BLOOM takes them, not normalized."""
        if inputs_embeds is not None:
            inputs_embeds = self.embed_tokens.norm(inputs_embeds)
        return super().forward(*args, inputs_embeds=inputs_embeds, **given)


class BloomForCausalLM(modeling_llama.LlamaForCausalLM):
    """BLOOM with its head."""

    def __init__(self, config: BloomConfig) -> None:
        modeling_llama.LlamaPreTrainedModel.__init__(self, config)
        self.model, self.vocab_size = BloomModel(config), config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def _norm(config: BloomConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon)
