"""The equations that a plan stands for, on plain tensors: what the reference is compared with."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import embedding, gelu, linear, silu

from vllm_depthpar.plan import Plan

# 1 where an element of a dimension of a size is on a rank, else 0.
Part = Callable[[int], Tensor | float]


def unfused(weights: dict[str, Tensor], q: int, kv: int) -> dict[str, Tensor]:
    """With q, k and v, and gate and up, each by itself."""
    found = {}
    for name, tensor in weights.items():
        if "qkv_proj" in name:
            for part, split in zip("qkv", tensor.split([q, kv, kv]), strict=True):
                found[name.replace("qkv_proj", f"{part}_proj")] = split
        elif "gate_up_proj" in name:
            for part, split in zip(("gate", "up"), tensor.chunk(2), strict=True):
                found[name.replace("gate_up_proj", f"{part}_proj")] = split
        else:
            found[name] = tensor
    return found


def named_as_llamas(weights: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    """A BLOOM's, with q, k and v each by itself; files have them head by head."""
    found = {}
    for name, tensor in weights.items():
        name = re.sub(r"^h\.", "layers.", name.removeprefix("transformer."))
        name = name.replace("word_embeddings.", "embed_tokens.").replace("ln_f.", "norm.")
        name = name.replace("self_attention.dense.", "self_attn.o_proj.")
        name = name.replace("dense_h_to_4h", "up_proj").replace("dense_4h_to_h", "down_proj")
        prefixed = name if name.startswith("lm_head") else f"model.{name}"
        if "query_key_value" not in name:
            found[prefixed] = tensor
            continue
        of_heads = tensor.unflatten(0, (heads, 3, -1))
        for at, part in enumerate("qkv"):
            one = prefixed.replace("self_attention.query_key_value", f"self_attn.{part}_proj")
            found[one] = of_heads[:, at].flatten(0, 1)
    return found


def alibi(heads: int, tokens: int) -> Tensor:
    """What is added to scores, (heads, tokens, tokens): the distance, less for later heads.

    Slopes as in Press et al. (arXiv 2108.12409) and its authors' code: of 8 heads 1/2, 1/4 and so
    on; where they are no power of two, those of the next one below, and every other one of twice
    as many.
    """
    even = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * (at + 1) / even) for at in range(even)]
    slopes += [2 ** (-8 * (2 * at + 1) / (2 * even)) for at in range(heads - even)]
    places = torch.arange(tokens)
    return torch.tensor(slopes).double()[:, None, None] * (places - places[:, None])


def unstacked(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """With every expert by itself, and the router named as other families name it."""
    found = {}
    for name, tensor in weights.items():
        before, _, rest = name.partition(".experts.")
        if not rest:
            found[name.replace(".mlp.router.", ".mlp.gate.")] = tensor
            continue
        projection, kind = rest.removesuffix("_bias"), "bias" if "_bias" in rest else "weight"
        for expert, of_one in enumerate(tensor):
            parts = {"down_proj": of_one}
            if projection == "gate_up_proj":
                parts = {"gate_proj": of_one[..., ::2], "up_proj": of_one[..., 1::2]}
            for part, split in parts.items():
                turned = split.mT if kind == "weight" else split
                found[f"{before}.experts.{expert}.{part}.{kind}"] = turned
    return found


def plain_logits(path: Path, plan: Plan, ids: Tensor, ranks: int = 1) -> Tensor:
    """A model of any family in double precision, block by block as the equations say.

    Every layer sees as far as its kind in the config's `layer_types` says, or, without these, those
    from `max_window_layers` on see `sliding_window` tokens.
    Takes token ids (tokens,), returns logits (tokens, vocab). What depends on
    the tensor-parallel size is that of `ranks`.
    """
    config = json.loads((path / "config.json").read_text())
    weights = {k: v.double() for k, v in load_file(path / "model.safetensors").items()}
    if bloom := config["model_type"] == "bloom":
        heads = config["n_head"]
        config |= {"num_attention_heads": heads, "num_key_value_heads": heads}
        config["num_hidden_layers"] = config["n_layer"]
        weights = named_as_llamas(weights, heads)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    if gpt_oss := config["model_type"] == "gpt_oss":
        weights = unstacked(weights)
    else:
        weights = unfused(weights, heads * width, kv_heads * width)
    tokens, window = len(ids), config.get("sliding_window") or len(ids)
    layers, begin = range(config["num_hidden_layers"]), config.get("max_window_layers", 0)
    kinds = config.get("layer_types") or [
        "sliding_attention" if layer >= begin else "full_attention" for layer in layers
    ]
    gemma = config["model_type"].startswith("gemma")
    if gemma or (gpt_oss and "layer_types" not in config):
        every = config.get("sliding_window_pattern", 2)
        kinds = ["full_attention" if layer % every == every - 1 else kinds[0] for layer in layers]

    glm = config["model_type"] == "glm4"
    mixtral = config["model_type"] == "mixtral"
    sparse = mixtral or gpt_oss or "num_experts" in config
    always_whole = plan.layout == "whole" or gemma or glm or sparse
    always_whole |= config["model_type"] in ("granite", "phi3", "bloom")

    def apply(name: str, x: Tensor, biased: bool = True) -> Tensor:
        return linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias") if biased else None)

    def norm(name: str, x: Tensor) -> Tensor:
        if bloom:
            x = x - x.mean(-1, keepdim=True)
            deviation = (x.pow(2).mean(-1, keepdim=True) + config["layer_norm_epsilon"]).sqrt()
            return x / deviation * weights[f"{name}.weight"] + weights[f"{name}.bias"]
        rms = (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()
        return x / rms * (weights[f"{name}.weight"] + gemma)

    def capped(x: Tensor, key: str) -> Tensor:
        return x if (cap := config.get(key)) is None else cap * (x / cap).tanh()

    def rotate(x: Tensor, kind: str) -> Tensor:
        if bloom:
            return x
        base, scaling = config["rope_theta"], config["rope_scaling"]
        if kind == "sliding_attention" and "rope_local_base_freq" in config:
            base, scaling = config["rope_local_base_freq"], None
        longer = 1.0
        turning = int(width * (config.get("rope_parameters") or {}).get("partial_rotary_factor", 1))
        frequency = base ** -(torch.arange(0, turning, 2).double() / turning)
        if scaling and scaling["rope_type"] == "linear":
            frequency = frequency / scaling["factor"]
        elif scaling and scaling["rope_type"] == "yarn":
            # YaRN, 3.2: fast waves as they are, slow waves by the factor, a ramp between those that
            # turn so often in the original context; and scores are larger.
            turns = [
                scaling["original_max_position_embeddings"] / (2 * torch.pi * scaling[beta])
                for beta in ("beta_fast", "beta_slow")
            ]
            low, high = (turning * math.log(turn) / (2 * math.log(base)) for turn in turns)
            low, high = max(low, 0), min(high, turning - 1)
            ramp = ((torch.arange(turning // 2).double() - low) / (high - low)).clamp(0, 1)
            frequency = frequency * (1 - ramp + ramp / scaling["factor"])
            longer = 0.1 * math.log(scaling["factor"]) + 1
        elif scaling:
            # Llama 3.1: slow waves by the factor, fast waves not at all, a ramp between.
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            turns = scaling["original_max_position_embeddings"] * frequency / (2 * torch.pi)
            ramp = ((turns - low) / (high - low)).clamp(0, 1)
            frequency = frequency * (ramp + (1 - ramp) / scaling["factor"])
        turn = torch.polar(torch.tensor(longer).double(), torch.arange(tokens)[:, None] * frequency)
        x, rest = x[..., :turning], x[..., turning:]
        if glm:  # neighbours turn together
            turned = torch.complex(x[..., ::2].contiguous(), x[..., 1::2].contiguous()) * turn
            return torch.cat([torch.view_as_real(turned).flatten(-2), rest], dim=-1)
        first, second = x.chunk(2, dim=-1)
        turned = torch.complex(first, second) * turn
        return torch.cat([turned.real, turned.imag, rest], dim=-1)

    def whole(_: int) -> float:
        return 1.0

    def mine(block: tuple[int, ...], layer: int, rank: int, size: int) -> Tensor:
        """1 where an element of a layer's dimension of a size is on a rank, else 0."""
        if always_whole:
            block = (layer,)
        place = block.index(layer) * size + torch.arange(size)
        return (place * ranks // (len(block) * size) == rank).double()

    def attention(layer: int, x: Tensor, on: Part = whole, biased: bool = True) -> Tensor:
        name, kind = f"model.layers.{layer}", kinds[layer]
        x = norm(f"{name}.input_layernorm", x)
        q, k, v = (
            apply(f"{name}.self_attn.{part}_proj", x).view(tokens, -1, width).transpose(0, 1)
            for part in "qkv"
        )
        if f"{name}.self_attn.q_norm.weight" in weights:
            q, k = norm(f"{name}.self_attn.q_norm", q), norm(f"{name}.self_attn.k_norm", k)
        q = rotate(q, kind).view(kv_heads, heads // kv_heads, tokens, width)
        scale = config.get("query_pre_attn_scalar", width) ** -0.5
        scores = q @ rotate(k, kind)[:, None].mT * config.get("attention_multiplier", scale)
        if bloom:
            scores = scores + alibi(heads, tokens)[:, None]
        if config["model_type"] == "gemma2":
            scores = capped(scores, "attn_logit_softcapping")
        seen = torch.ones(tokens, tokens).tril()
        if kind == "sliding_attention":
            seen = seen.triu(1 - window)
        scores = scores.masked_fill(seen == 0, -torch.inf)
        if gpt_oss:  # a score of no token
            sinks = weights[f"{name}.self_attn.sinks"].view(kv_heads, -1, 1, 1)
            scores = torch.cat([scores, sinks.expand(-1, -1, tokens, -1)], -1)
        mixed = scores.softmax(-1)[..., :tokens] @ v[:, None]
        merged = mixed.reshape(heads, tokens, width).transpose(0, 1).reshape(tokens, -1)
        return apply(f"{name}.self_attn.o_proj", merged * on(heads * width), biased)

    def gated(name: str, x: Tensor, on: Part, biased: bool = True) -> Tensor:
        names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
        gate, up, down = (f"{name}.{part}" for part in names)
        if bloom:
            inner = gelu(apply(up, x), approximate="tanh")
            return apply(down, inner * on(inner.shape[-1]), biased)
        inner, other = apply(gate, x), apply(up, x)
        if gpt_oss:
            inner, other = inner.clamp(max=7), other.clamp(-7, 7) + 1
            inner = inner * (1.702 * inner).sigmoid() * other
        else:
            inner = (gelu(inner, approximate="tanh") if gemma else silu(inner)) * other
        return apply(down, inner * on(inner.shape[-1]), biased)

    def experts(name: str, x: Tensor, on: Part, biased: bool = True) -> Tensor:
        likely = apply(f"{name}.gate", x).softmax(-1)
        best = likely.topk(config["num_experts_per_tok"])
        shares = torch.zeros_like(likely).scatter(-1, best.indices, best.values)
        if mixtral or gpt_oss or config["norm_topk_prob"]:
            shares = shares / shares.sum(-1, keepdim=True)
        given = [gated(f"{name}.experts.{e}", x, on, biased) for e in range(likely.shape[-1])]
        total = (torch.stack(given, -1) * shares[:, None]).sum(-1)
        if f"{name}.shared_expert_gate.weight" in weights:
            share = apply(f"{name}.shared_expert_gate", x).sigmoid()
            total = total + share * gated(f"{name}.shared_expert", x, on)
        return total

    def mlp(layer: int, x: Tensor, on: Part = whole, biased: bool = True) -> Tensor:
        name = f"model.layers.{layer}"
        before = "pre_feedforward" if gemma else "post_attention"
        x = norm(f"{name}.{before}_layernorm", x)
        name = f"{name}.block_sparse_moe" if mixtral else f"{name}.mlp"
        if f"{name}.gate.weight" in weights:
            return experts(name, x, on, biased)
        return gated(name, x, on, biased)

    def after(layer: int, half: str, x: Tensor) -> Tensor:
        """What is added to the stream of what a module gives."""
        names = ("post_self_attn", "post_mlp") if glm else ("post_attention", "post_feedforward")
        name = names[half == "mlp"]
        x = norm(f"model.layers.{layer}.{name}_layernorm", x) if gemma or glm else x
        return x * config.get("residual_multiplier", 1)

    def parts(block: tuple[int, ...], half: str, x: Tensor, rank: int) -> list[Tensor]:
        """What a rank computes of each layer's attention or MLP."""
        found = []
        for at, layer in enumerate(block):
            # Where a member is a group of ranks, the first of them adds its output bias.
            dealt = ranks % len(block) == 0 and not always_whole
            first = at * ranks // len(block) if dealt else 0
            of = attention if half == "attention" else mlp
            on = partial(mine, block, layer, rank)
            found.append(of(layer, x, on, rank == first))
        return found

    def term(block: tuple[int, ...], half: str, x: Tensor, rank: int) -> Tensor:
        """What a rank computes of a sum."""
        scale = config.get("residual_multiplier", 1)
        return torch.stack(parts(block, half, x, rank)).sum(0) * scale

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

    streams: list[Tensor] = []
    x = after_attention = embedding(ids, weights["model.embed_tokens.weight"])
    if bloom:
        x = norm("model.word_embeddings_layernorm", x)
    x = x * (config["hidden_size"] ** 0.5 if gemma else config.get("embedding_multiplier", 1))
    after_attention = x
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
    logits = apply(head, norm("model.norm", x)) / config.get("logits_scaling", 1)
    return capped(logits, "final_logit_softcapping")
