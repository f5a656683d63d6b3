"""The equations that a plan stands for, on plain tensors: what the reference is compared with."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import embedding, gelu, linear, silu

from vllm_depthpar.plan import Plan


def plain_logits(path: Path, plan: Plan, ids: Tensor, ranks: int = 1) -> Tensor:
    """A model of any family in double precision, block by block as the equations say.

    Every layer sees as far as its kind in the config's `layer_types` says, or, without these, those
    from `max_window_layers` on see `sliding_window` tokens.
    Takes token ids (tokens,), returns logits (tokens, vocab). What depends on
    the tensor-parallel size is that of `ranks`.
    """
    config = json.loads((path / "config.json").read_text())
    weights = {k: v.double() for k, v in load_file(path / "model.safetensors").items()}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width = len(weights["model.layers.0.self_attn.k_proj.weight"]) // kv_heads
    tokens, window = len(ids), config.get("sliding_window") or len(ids)
    layers, begin = range(config["num_hidden_layers"]), config.get("max_window_layers", 0)
    kinds = config.get("layer_types") or [
        "sliding_attention" if layer >= begin else "full_attention" for layer in layers
    ]
    if gemma := config["model_type"].startswith("gemma"):
        every = 2 if config["model_type"] == "gemma2" else config["sliding_window_pattern"]
        kinds = ["full_attention" if layer % every == every - 1 else kinds[0] for layer in layers]

    def apply(name: str, x: Tensor, biased: bool = True) -> Tensor:
        return linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias") if biased else None)

    def norm(name: str, x: Tensor) -> Tensor:
        rms = (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()
        return x / rms * (weights[f"{name}.weight"] + gemma)

    def capped(x: Tensor, key: str) -> Tensor:
        return x if (cap := config.get(key)) is None else cap * (x / cap).tanh()

    def rotate(x: Tensor, kind: str) -> Tensor:
        base, scaling = config["rope_theta"], config["rope_scaling"]
        if kind == "sliding_attention" and "rope_local_base_freq" in config:
            base, scaling = config["rope_local_base_freq"], None
        frequency = base ** -(torch.arange(0, width, 2).double() / width)
        if scaling and scaling["rope_type"] == "linear":
            frequency = frequency / scaling["factor"]
        elif scaling:
            # Llama 3.1: slow waves by the factor, fast waves not at all, a ramp between.
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            turns = scaling["original_max_position_embeddings"] * frequency / (2 * torch.pi)
            ramp = ((turns - low) / (high - low)).clamp(0, 1)
            frequency = frequency * (ramp + (1 - ramp) / scaling["factor"])
        turn = torch.polar(torch.ones(()).double(), torch.arange(tokens)[:, None] * frequency)
        first, second = x.chunk(2, dim=-1)
        turned = torch.complex(first, second) * turn
        return torch.cat([turned.real, turned.imag], dim=-1)

    def mine(block: tuple[int, ...], layer: int, size: int, rank: int) -> Tensor:
        """1 where an element of a layer's dimension is on a rank, else 0."""
        if plan.layout == "whole" or gemma:
            block = (layer,)
        place = block.index(layer) * size + torch.arange(size)
        return (place * ranks // (len(block) * size) == rank).double()

    def attention(layer: int, x: Tensor, on: Tensor | float = 1.0, biased: bool = True) -> Tensor:
        name, kind = f"model.layers.{layer}", kinds[layer]
        x = norm(f"{name}.input_layernorm", x)
        q, k, v = (
            apply(f"{name}.self_attn.{part}_proj", x).view(tokens, -1, width).transpose(0, 1)
            for part in "qkv"
        )
        if f"{name}.self_attn.q_norm.weight" in weights:
            q, k = norm(f"{name}.self_attn.q_norm", q), norm(f"{name}.self_attn.k_norm", k)
        q = rotate(q, kind).view(kv_heads, heads // kv_heads, tokens, width)
        scores = q @ rotate(k, kind)[:, None].mT / config.get("query_pre_attn_scalar", width) ** 0.5
        if config["model_type"] == "gemma2":
            scores = capped(scores, "attn_logit_softcapping")
        seen = torch.ones(tokens, tokens).tril()
        if kind == "sliding_attention":
            seen = seen.triu(1 - window)
        mixed = scores.masked_fill(seen == 0, -torch.inf).softmax(-1) @ v[:, None]
        merged = mixed.reshape(heads, tokens, width).transpose(0, 1).reshape(tokens, -1)
        return apply(f"{name}.self_attn.o_proj", merged * on, biased)

    def mlp(layer: int, x: Tensor, on: Tensor | float = 1.0, biased: bool = True) -> Tensor:
        name = f"model.layers.{layer}"
        before = "pre_feedforward" if gemma else "post_attention"
        x = norm(f"{name}.{before}_layernorm", x)
        gate, up = apply(f"{name}.mlp.gate_proj", x), apply(f"{name}.mlp.up_proj", x)
        gate = gelu(gate, approximate="tanh") if gemma else silu(gate)
        return apply(f"{name}.mlp.down_proj", gate * up * on, biased)

    def after(layer: int, half: str, x: Tensor) -> Tensor:
        """What is added to the stream of what a module gives."""
        name = "post_attention" if half == "attention" else "post_feedforward"
        return norm(f"model.layers.{layer}.{name}_layernorm", x) if gemma else x

    def parts(block: tuple[int, ...], half: str, x: Tensor, rank: int) -> list[Tensor]:
        """What a rank computes of each layer's attention or MLP."""
        found = []
        for at, layer in enumerate(block):
            # Where a member is a group of ranks, the first of them adds its output bias.
            dealt = ranks % len(block) == 0 and plan.layout != "whole" and not gemma
            first = at * ranks // len(block) if dealt else 0
            size, of = (heads * width, attention) if half == "attention" else (inner, mlp)
            found.append(of(layer, x, mine(block, layer, size, rank), rank == first))
        return found

    def term(block: tuple[int, ...], half: str, x: Tensor, rank: int) -> Tensor:
        """What a rank computes of a sum."""
        return torch.stack(parts(block, half, x, rank)).sum(0)

    def without_sync(block: tuple[int, ...], x: Tensor) -> Tensor:
        named = [(layer, half) for half in ("attention", "mlp") for layer in block]
        of_ranks = []
        for rank in range(ranks):
            a = parts(block, "attention", x, rank)
            normalized = [after(*of, part) for of, part in zip(named, a, strict=False)]
            read = x + torch.stack(normalized).sum(0)
            of_ranks.append([*a, *parts(block, "mlp", read, rank)])
        sums = [torch.stack(of_rank).sum(0) for of_rank in zip(*of_ranks, strict=True)]
        terms = [after(*of, total) for of, total in zip(named, sums, strict=True)]
        return torch.stack(terms).sum(0)

    def attended(layer: int, x: Tensor) -> Tensor:
        return after(layer, "attention", attention(layer, x))

    def fed(layer: int, x: Tensor) -> Tensor:
        return after(layer, "mlp", mlp(layer, x))

    def desync(position: int, streams: list[Tensor]) -> list[Tensor]:
        for half in ("attention", "mlp"):
            if not (block := getattr(plan, half)(position)):
                continue
            terms = [term(block, half, x, rank) for rank, x in enumerate(streams)]
            if (block[0], half) in plan.desync:
                streams = [x + t for x, t in zip(streams, terms, strict=True)]
            else:
                whole = torch.stack([x / ranks + t for x, t in zip(streams, terms, strict=True)])
                streams = [whole.sum(0)] * ranks
        return streams

    inner = len(weights["model.layers.0.mlp.up_proj.weight"])
    streams: list[Tensor] = []
    x = after_attention = embedding(ids, weights["model.embed_tokens.weight"])
    if gemma:
        x = after_attention = x * config["hidden_size"] ** 0.5
    for position, block in enumerate(plan.blocks):
        if plan.desync and plan.mode(position) == "standard" and not plan.is_ladder(position + 1):
            streams = desync(position, streams if plan.is_apart(position) else [x] * ranks)
            x = after_attention = streams[0]
            continue
        if position in plan.drop_sync:
            x = after_attention = x + without_sync(block, x)
            continue
        if position in plan.parallel_residual:
            terms = [attended(layer, x) + fed(layer, x) for layer in block]
            x = after_attention = x + torch.stack(terms).sum(0)
            continue
        ladder = position in plan.ladder
        read = after_attention if ladder else x
        terms = [attended(layer, read) for layer in block if layer not in plan.drop_attention]
        after_attention = torch.stack([x, *terms]).sum(0)
        read = x if ladder else after_attention
        terms = [fed(layer, read) for layer in block if layer not in plan.drop_mlp]
        x = torch.stack([after_attention, *terms]).sum(0)
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    return capped(apply(head, norm("model.norm", x)), "final_logit_softcapping")
