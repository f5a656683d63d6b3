"""Sizes of a checkpoint, and what a plan makes of them on each tensor-parallel rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from vllm_depthpar.errors import UserError
from vllm_depthpar.plan.families import family_of
from vllm_depthpar.plan.plan import Plan

# Of one number, by the name that config.json and vLLM have for its type.
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a config.json that decide bytes, shards and reductions."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dtype_bytes: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Read the sizes from a parsed config.json.

        Raises:
            UserError: a needed key is missing, or see `families.family_of`.
        """
        family = family_of({"model_type": "llama", **config})
        attention_bias = bool(config.get("attention_bias", False))
        try:
            heads, hidden = config["num_attention_heads"], config["hidden_size"]
            return cls(
                layers=config["num_hidden_layers"],
                hidden=hidden,
                heads=heads,
                kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or hidden // heads,
                intermediate=config["intermediate_size"],
                vocab=config["vocab_size"],
                tied=bool(config.get("tie_word_embeddings", False)),
                qkv_bias=attention_bias or family.qkv_bias,
                output_bias=attention_bias and not family.qkv_bias,
                mlp_bias=bool(config.get("mlp_bias", False)),
                qk_norm=family.qk_norm,
                dtype_bytes=DTYPE_BYTES.get(
                    str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch."), 2
                ),
            )
        except KeyError as error:
            raise UserError(
                f"config.json lacks the key {error}; allowed: a checkpoint's config.json"
            ) from None

    def fits(self, width: int, tp: int) -> bool:
        """Whether a block of `width` layers can be cut into `tp` shards.

        Query heads are dealt out evenly; KV heads too, or each is held by several ranks.
        """
        heads, kv_heads = width * self.heads, width * self.kv_heads
        return (
            heads % tp == 0
            and (kv_heads % tp == 0 or tp % kv_heads == 0)
            and width * self.intermediate % tp == 0
        )

    def fitting_tps(self, plan: Plan, limit: int = 64) -> list[int]:
        """Tensor-parallel sizes up to `limit` that every block of the plan can be cut into."""
        widths = {len(block) for block in plan.blocks}
        return [tp for tp in range(1, limit + 1) if all(self.fits(w, tp) for w in widths)]

    def layer_tensors(self) -> dict[str, tuple[int, ...]]:
        """The shapes of one decoder layer's tensors, by their names in it."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        projections = {
            "self_attn.q_proj": (q, self.hidden, self.qkv_bias),
            "self_attn.k_proj": (kv, self.hidden, self.qkv_bias),
            "self_attn.v_proj": (kv, self.hidden, self.qkv_bias),
            "self_attn.o_proj": (self.hidden, q, self.output_bias),
            "mlp.gate_proj": (self.intermediate, self.hidden, self.mlp_bias),
            "mlp.up_proj": (self.intermediate, self.hidden, self.mlp_bias),
            "mlp.down_proj": (self.hidden, self.intermediate, self.mlp_bias),
        }
        tensors: dict[str, tuple[int, ...]] = {}
        for name, (out, into, bias) in projections.items():
            tensors[f"{name}.weight"] = (out, into)
            if bias:
                tensors[f"{name}.bias"] = (out,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{norm}.weight"] = (self.hidden,)
        if self.qk_norm:
            for norm in ("q_norm", "k_norm"):
                tensors[f"self_attn.{norm}.weight"] = (self.head_dim,)
        return tensors

    def layer_parameters(self) -> int:
        """Parameters of one decoder layer, its norms included."""
        return sum(prod(shape) for shape in self.layer_tensors().values())

    def weight_bytes(self, plan: Plan, tp: int = 1) -> int:
        """Bytes of weights on one rank (norms and biases counted as if they were cut, too)."""
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        layers = len(plan.kept) * self.layer_parameters()
        return (embeddings + layers) * self.dtype_bytes // tp + self.hidden * self.dtype_bytes

    def kv_bytes_per_token(self, plan: Plan, tp: int = 1) -> int:
        """Bytes of KV cache one token takes on one rank."""
        heads = sum(max(1, len(block) * self.kv_heads // tp) for block in plan.blocks)
        return 2 * heads * self.head_dim * self.dtype_bytes


def all_reduces(plan: Plan) -> int:
    """All-reduces of one forward pass at TP > 1.

    Two a block and one for the embedding; but where the sync point between them is dropped, where
    both read the same stream, and in a ladder block that no other follows, attention and MLP are
    summed on each rank first and reduced once.
    """
    once = sum(
        plan.reduces_once(at) or (plan.is_ladder(at) and not plan.is_ladder(at + 1))
        for at in range(plan.depth)
    )
    return 2 * plan.depth + 1 - once


def hidden_all_reduces(plan: Plan) -> int:
    """Those of `all_reduces` that run while the next module computes (arXiv 2501.06589).

    The MLP's of any block with two that a ladder block follows; the attention's of such a ladder
    block.
    """
    followed = [at for at in range(plan.depth) if plan.is_ladder(at + 1)]
    return sum((not plan.reduces_once(at)) + plan.is_ladder(at) for at in followed)
