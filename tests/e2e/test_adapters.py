"""LoRA adapters as users serve them: named at the start, loaded and unloaded over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from forked_serve import forked_servers
from models import prompts, write_adapter, write_llama

from vllm_depthpar import hf
from vllm_depthpar.launch.server import Server, serve

LAYERS, TOKENS = 6, 12
# Pairs, and a layer that does not run.
PLAN = {"blocks": [[0], [1, 2], [4, 5]]}
RANKS = {"first": 8, "second": 16}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """By name, the adapter (of "plain": none) and a checkpoint with it merged."""
    folder = tmp_path_factory.mktemp("adapters")
    plain = write_llama(folder / "plain", layers=LAYERS)
    found = {"plain": (plain, plain)}
    for seed, (name, rank) in enumerate(RANKS.items()):
        found[name] = write_adapter(plain, folder, rank=rank, seed=seed)
    return found


@pytest.fixture(scope="module")
def server(models: dict[str, tuple[Path, Path]]) -> Iterator[Server]:
    """The second adapter is not there at the start."""
    arguments = ["--model-impl", "depthpar", "--hf-overrides", json.dumps({"depthpar": PLAN})]
    arguments += ["--dtype", "float32", "--enforce-eager", "--skip-tokenizer-init"]
    arguments += ["--served-model-name", "plain", "--max-num-seqs", "16"]
    arguments += ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "16"]
    arguments += ["--lora-modules", f"first={models['first'][0]}"]
    env = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_LOGGING_LEVEL": "INFO",
        "TORCHDYNAMO_DISABLE": "1",
    }
    with forked_servers(), serve(models["plain"][0], *arguments, env=env) as running:
        yield running


def answer(server: Server, name: str, prompt: list[int]) -> list[int]:
    """The greedy continuation, as token ids."""
    body = {"model": name, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    more = {"ignore_eos": True, "return_token_ids": True, "detokenize": False}
    response = httpx.post(f"{server.url}/v1/completions", json=body | more, timeout=120)
    response.raise_for_status()
    tokens: list[int] = response.json()["choices"][0]["token_ids"]
    return tokens


def test_loaded_used_together_and_unloaded(
    server: Server, models: dict[str, tuple[Path, Path]]
) -> None:
    load = {"lora_name": "second", "lora_path": str(models["second"][0])}
    httpx.post(f"{server.url}/v1/load_lora_adapter", json=load, timeout=120).raise_for_status()
    listed = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert {model["id"] for model in listed} == {"plain", "first", "second"}
    texts = prompts(4, 24).tolist()
    asked = [(name, text) for text in texts for name in models]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda one: answer(server, *one), asked))
    different = set()
    for name, (_, merged) in models.items():
        reference = hf.load(merged, PLAN)
        for (of, text), tokens in zip(asked, answers, strict=True):
            if of == name:
                ids = torch.tensor([text + tokens])
                with torch.no_grad():
                    best = reference(ids).logits[0, len(text) - 1 : -1].argmax(-1)
                assert tokens == best.tolist()
                different.add((name, tuple(tokens)))
    assert len({tokens for _, tokens in different}) == len(asked)
    unload = {"lora_name": "second"}
    httpx.post(f"{server.url}/v1/unload_lora_adapter", json=unload).raise_for_status()
    gone = httpx.post(
        f"{server.url}/v1/completions", json={"model": "second", "prompt": texts[0]}, timeout=60
    )
    assert gone.status_code == 404


def test_what_does_not_run_is_said_once_an_adapter(server: Server) -> None:
    lines = [line for line in server.log_text().splitlines() if "of the adapter's" in line]
    assert len(lines) == len(RANKS)
    assert "7 of the adapter's 42 parts" in lines[0]
    assert "in the layers 3, and are ignored" in lines[0]
