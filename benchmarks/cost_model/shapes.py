"""`depthpar bench` on models of published shapes, with random weights: speed needs no checkpoint.

For each shape: plain vLLM, `auto`, half of the layers in pairs, and all of them. Meant for one GPU
(CUDA graphs, vLLM's default compilation); on a CPU the small shapes run too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vllm_depthpar.util import files

# From the models' config.json. Rope scaling is left out: it costs nothing and needs no weights.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
    },
    "llama-3.2-3b": {
        "num_hidden_layers": 28,
        "hidden_size": 3072,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
        "max_position_embeddings": 131072,
    },
    "llama-3.2-1b": {
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
        "max_position_embeddings": 131072,
    },
    "smollm2-135m": {
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    },
}
_COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config(name: str) -> dict[str, Any]:
    """The config.json of a shape."""
    return _COMMON | SHAPES[name]


def plans(layers: int) -> list[str]:
    """Plain vLLM, `auto`, half of the layers in pairs (the last two stay alone), all of them."""
    end = layers - 2
    half = layers // 4 * 2
    return ["plain", "auto", f'{{"pair": [{end - half}, {end}]}}', f'{{"pair": [0, {layers}]}}']


def main() -> None:
    """Run the command for each shape, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="SHAPE", help="(all)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the results")
    parser.add_argument(
        "rest", nargs="*", metavar="-- OPTIONS", help="of `depthpar bench`, after --"
    )
    args = parser.parse_args()
    command = [str(Path(sys.executable).with_name("depthpar")), "bench"]
    for name in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder, name)
            model.mkdir()
            files.write_json(model / "config.json", config(name))
            chosen = plans(SHAPES[name]["num_hidden_layers"])
            # The defaults come first: what follows wins.
            options = ["--parts", "latency,throughput", "--batches", "1,8,64", "--contexts", "128"]
            options += ["--load-format", "dummy", "--one-at-a-time", *args.rest]
            options += ["--plans", ",".join(chosen), "--out", str(args.out / f"{name}.json")]
            print(f"{name}: {json.dumps(chosen)}", file=sys.stderr)
            subprocess.run([*command, str(model), *options], check=True)


if __name__ == "__main__":
    main()
