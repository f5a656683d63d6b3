"""One rank of the published code of Layer Parallelism or Ladder Residual, on a CPU.

Their code is imported from a checkout and is not changed. Both want GPUs; what stands in for what a
CPU has not is all here: Gloo for NCCL, and for the ladder's three CUDA-only imports modules with
the little that a CPU run calls. `peers.py` starts the ranks, with the environment of torchrun.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout: this is a script

import torch
from torch import Tensor, distributed

from benchmarks.network.cluster import MODEL
from vllm_depthpar.bench.rounds import in_turn

LAYERS = MODEL["num_hidden_layers"]
# Takes a token and its position, gives the logits of the next; a prompt clears what was before.
Step = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    """Measure in turns; each round is a line of a file, {variant: seconds per token}."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("checkout")
    parser.add_argument("--first", type=int, default=0, help="round to begin with (0)")
    parser.add_argument("--rounds", type=int, required=True, help="in all")
    parser.add_argument("--prompt-tokens", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--found", type=Path, required=True, help="the file")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    use_gloo()
    with torch.no_grad():
        variants = PEERS[args.peer](args.checkout, args.prompt_tokens + args.tokens, args.compile)
        for number in range(args.first - 1, args.rounds):
            found = dict.fromkeys(variants, 0.0)
            for label in in_turn(list(variants), number):
                distributed.barrier()
                found[label] = decode(variants[label], args.prompt_tokens, args.tokens, number)
            if number >= args.first and distributed.get_rank() == 0:
                with args.found.open("a") as file:
                    file.write(json.dumps(found) + "\n")
    distributed.destroy_process_group()


def decode(step: Step, prompt_tokens: int, tokens: int, seed: int) -> float:
    """Greedy, batch 1: seconds per token after the first."""
    generator = torch.Generator().manual_seed(seed + 1)
    prompt = torch.randint(MODEL["vocab_size"], (1, prompt_tokens), generator=generator)
    token = step(prompt, torch.arange(prompt_tokens))[:, -1].argmax(-1, keepdim=True)
    begun = time.perf_counter()
    for at in range(prompt_tokens, prompt_tokens + tokens - 1):
        token = step(token, torch.tensor([at]))[:, -1].argmax(-1, keepdim=True)
    return (time.perf_counter() - begun) / (tokens - 1)


def use_gloo() -> None:
    """Initialize torch.distributed with Gloo; from then on theirs is not asked to."""
    torch.cuda.set_device = lambda device: None
    distributed.init_process_group("gloo")


def ladder(checkout: str, length: int, compiled: bool) -> dict[str, Step]:
    """Ladder Residual's gpt-fast models: standard, ladder, and (the authors' upper bound) standard
    without any all-reduce. Made and initialized as their benchmark.py does, in float32."""
    stand_ins: dict[str, dict[str, Any]] = {
        # Called with --use_flash_attention only.
        "flash_attn": {"flash_attn_varlen_func": None, "flash_attn_with_kvcache": None},
        "liger_kernel.ops.rms_norm": {"LigerRMSNormFunction": _RMSNorm},
        "triton": {"jit": lambda kernel: _AddKernel(), "cdiv": lambda a, b: -(-a // b)},
        "triton.language": {"constexpr": int},
    }
    for name in ("liger_kernel", "liger_kernel.ops", *stand_ins):
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(stand_ins.get(name, {}))
    vars(sys.modules["triton"])["language"] = sys.modules["triton.language"]
    sys.path.insert(0, checkout)
    from gpt_fast import GPTDense, GPTDesync, GPTLadder, gpt_dense_TP, gpt_desync_TP, gpt_ladder_TP

    for name in ("triton", "triton.language"):  # torch.compile must not take it for the real one
        del sys.modules[name]
    sizes = {
        "block_size": MODEL["max_position_embeddings"],
        "n_layer": LAYERS,
        "n_head": MODEL["num_attention_heads"],
        "n_local_heads": MODEL["num_key_value_heads"],
        "dim": MODEL["hidden_size"],
        "intermediate_size": MODEL["intermediate_size"],
        "vocab_size": MODEL["vocab_size"],
        "rope_base": MODEL["rope_theta"],
        "norm_eps": MODEL["rms_norm_eps"],
    }
    never = [{"attention": False, "mlp": False}] * LAYERS
    alone = {"reduce_pattern": never, "force_disable_last_all_reduce": True}
    variants: dict[str, Step] = {}
    for label, kind, module, more in (
        ("standard", GPTDense, gpt_dense_TP, {}),
        ("ladder", GPTLadder, gpt_ladder_TP, {}),
        ("no communication", GPTDesync, gpt_desync_TP, alone),
    ):
        module.transformer_configs[label] = sizes | more
        torch.manual_seed(0)
        model = kind.from_name(label).eval()
        for weight in model.parameters():
            torch.nn.init.normal_(weight, mean=0, std=0.02)
        model.setup_caches(1, length)
        variants[label] = model
        if compiled:  # as their benchmark.py: the decoding step alone
            fast = torch.compile(model, mode="reduce-overhead", fullgraph=True)
            variants[label] = _by_length(model, fast)
    return variants


def _by_length(prefill: Step, decoding: Step) -> Step:
    def step(tokens: Tensor, positions: Tensor) -> Tensor:
        return (prefill if tokens.shape[1] > 1 else decoding)(tokens, positions)

    return step


class _RMSNorm:
    """For Liger's Triton kernel."""

    @staticmethod
    def apply(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


class _AddKernel:
    """For the one Triton kernel of theirs, which adds two tensors."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self._run

    @staticmethod
    def _run(x: Tensor, y: Tensor, out: Tensor, numel: int, block: int) -> None:
        torch.add(x, y, out=out)


def layer_parallelism(checkout: str, length: int, compiled: bool) -> dict[str, Step]:
    """Layer Parallelism's script: Hugging Face's Llama, its layers replaced by `replace_layers`.

    The script means to replace all other layers by tensor-parallel ones, but assigns them to a loop
    variable: outside the pairs every rank computes whole layers. Its tensor-parallel layers are put
    into the model here, as the baseline that the paper describes.
    """
    sys.path.insert(0, os.path.join(checkout, "src", "effective-depth"))
    from layers import TPLlamaDecoderLayer
    from main import replace_layers
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{name: value for name, value in MODEL.items() if name != "torch_dtype"})

    def unmodified() -> Any:
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()

    def tensor_parallel(model: Any) -> Any:
        for at, layer in enumerate(model.model.layers):
            model.model.layers[at] = TPLlamaDecoderLayer(config, at)
            model.model.layers[at].init_from_llama_decoder_layer(layer)
        return model

    variants = {"unmodified, whole on every rank": unmodified()}
    variants["tensor parallel, put in by us"] = tensor_parallel(unmodified())
    if distributed.get_world_size() % 2 == 0:  # their assertion: a rank for each layer of a pair
        half = LAYERS // 4
        for start, end in ((0, LAYERS), (half, LAYERS - half)):
            model = replace_layers(unmodified(), config, "cpu", start, end)
            variants[f"pairs [{start}, {end})"] = model
    return {label: _cached(model) for label, model in variants.items()}


def _cached(model: Any) -> Step:
    from transformers import DynamicCache

    cache = DynamicCache()

    def step(tokens: Tensor, positions: Tensor) -> Tensor:
        nonlocal cache
        if positions[0] == 0:
            cache = DynamicCache()
        # The positions as `generate` gives them: a rank's cache lacks the layers that others have.
        logits: Tensor = model(
            tokens, past_key_values=cache, use_cache=True, cache_position=positions
        ).logits
        return logits

    return step


PEERS = {"ladder": ladder, "layer-parallelism": layer_parallelism}


if __name__ == "__main__":
    main()
