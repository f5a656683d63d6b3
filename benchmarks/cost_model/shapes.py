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

from vllm_depthpar.plan.published_shapes import config_named
from vllm_depthpar.util import files

SHAPES = ("llama-2-7b", "llama-3.2-3b", "llama-3.2-1b", "smollm2-135m")
# Rope scaling is left out: it costs nothing and needs no weights.
_COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 8192,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config(name: str) -> dict[str, Any]:
    """The config.json of a shape."""
    return _COMMON | config_named(name)


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
            chosen = plans(config(name)["num_hidden_layers"])
            # The defaults come first: what follows wins.
            options = ["--parts", "latency,throughput", "--batches", "1,8,64", "--contexts", "128"]
            options += ["--load-format", "dummy", "--one-at-a-time", *args.rest]
            options += ["--plans", ",".join(chosen), "--out", str(args.out / f"{name}.json")]
            print(f"{name}: {json.dumps(chosen)}", file=sys.stderr)
            subprocess.run([*command, str(model), *options], check=True)


if __name__ == "__main__":
    main()
