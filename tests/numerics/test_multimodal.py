"""Models that see: the language model runs by the plan, the tower is vLLM's, image in."""

from __future__ import annotations

import dataclasses
import importlib
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from assertions import check
from engine_runs import Case, run
from models import prompts, write_adapter
from PIL import Image
from seeing_models import FAMILIES, IMAGE, see, write_seeing
from transformers import AutoModelForImageTextToText

from vllm_depthpar import hf
from vllm_depthpar.plan import resolve

try:
    importlib.import_module("torchvision")
except (ImportError, RuntimeError) as why:
    # The one of PyPI is for PyTorch with CUDA and does not import beside another.
    pytest.skip(
        f"vLLM's models that see need a torchvision for this PyTorch, from PyTorch's index: {why}",
        allow_module_level=True,
    )

# Of Qwen3-VL the first two layers stay: its tower adds to the stream after each.
PLANS: dict[str, list[Any]] = {
    "llava": [
        {"pair": [1, 5]},
        {"skip": {"speedup": 1.5}, "ladder": [0, 2]},
        {
            "blocks": [[0, 3, 1], [4], [2, 5]],
            "drop_sync": [0, 1, 3, 4],
            "parallel_residual": [2, 5],
        },
    ],
    "qwen2_5_vl": [
        {"pair": [1, 5]},
        {"skip": {"speedup": 1.5}, "ladder": "all"},
        {"blocks": [[0, 3, 1], [4], [2, 5]], "drop_sync": [0, 1, 3, 4], "layout": "whole"},
    ],
    "qwen3_vl": [
        {"pair": [2, 6]},
        {"blocks": [[0], [1], [3], [4], [5]], "ladder": [4, 5]},
        {"blocks": [[0], [1], [4, 2], [3, 5]], "drop_sync": [0], "parallel_residual": [1, 2, 4]},
    ],
    "gemma3": [{"pair": [1, 5]}, {"skip": {"speedup": 1.5}, "ladder": [0, 2]}],
    "mistral3": [{"pair": [1, 5]}, {"skip": {"speedup": 1.5}, "ladder": [0, 2]}],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("multimodal")
    return {kind: write_seeing(kind, folder / kind) for kind in FAMILIES}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two of noise, of different sizes."""
    folder, paths = tmp_path_factory.mktemp("images"), []
    for seed, size in enumerate([(40, 40), (64, 48)]):
        noise = torch.randint(256, (*size, 3), generator=torch.Generator().manual_seed(seed))
        paths.append(folder / f"{seed}.png")
        Image.fromarray(noise.to(torch.uint8).numpy()).save(paths[-1])
    return paths


@pytest.mark.parametrize(
    ("kind", "ranks", "compiled"),
    [
        *((kind, ranks, False) for kind in PLANS for ranks in (1, 2)),
        *((kind, 1, True) for kind in ("llava", "qwen2_5_vl")),
    ],
)
def test_images_in_prompts(
    models: dict[str, Path], images: list[Path], kind: str, ranks: int, compiled: bool
) -> None:
    model, plans = models[kind], PLANS[kind][-1:] if compiled else PLANS[kind]
    texts = [[*text[:7], IMAGE, *text[7:]] for text in prompts(2, 30, vocab=256).tolist()]
    engine = {"skip_tokenizer_init": False}
    cases = [Case(model, plan, texts, max_tokens=8, images=images, engine=engine) for plan in plans]
    seen, pixels = see(kind, model, texts, images)
    for case, result in zip(cases, run(cases, ranks, compiled=compiled), strict=True):
        reference = hf.load(model, case.plan, ranks=ranks)
        check(result, dataclasses.replace(case, prompts=seen), partial(_see, reference, pixels))
        black = pixels | {"pixel_values": torch.zeros_like(pixels["pixel_values"])}
        blind = partial(_see, reference, black)
        with pytest.raises(AssertionError, match="Tensor-likes are not close"):
            check(result, dataclasses.replace(case, prompts=seen), blind)


@pytest.mark.parametrize("kind", PLANS)
def test_adapters_of_the_language_model(
    models: dict[str, Path], images: list[Path], kind: str, tmp_path: Path
) -> None:
    """They act where their layers run, and what has no effect is said."""
    model, plan, log = models[kind], PLANS[kind][1], tmp_path / "log"
    adapter, merged = write_adapter(
        model,
        tmp_path,
        # With which no model answers an image's token: no reference could go on from there.
        seed=1,
        projections=r".*language_model.*layers.*_proj",
        kind=AutoModelForImageTextToText,
    )
    texts = [[*text[:7], IMAGE, *text[7:]] for text in prompts(2, 30, vocab=256).tolist()]
    targets = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    case = Case(
        model,
        plan,
        texts,
        max_tokens=8,
        images=images,
        adapters=[None, adapter],
        engine={
            "skip_tokenizer_init": False,
            "enable_lora": True,
            "lora_target_modules": targets,
        },
        prepare=partial(_write_log, log),
    )
    (result,) = run([case])
    for at, (right, wrong) in enumerate([(model, merged), (merged, model)]):
        seen, pixels = see(kind, model, texts[at : at + 1], images[at : at + 1])
        one = dataclasses.replace(case, prompts=seen)
        answer = dataclasses.replace(
            result,
            prompt_logprobs=result.prompt_logprobs[at : at + 1],
            tokens=result.tokens[at : at + 1],
        )
        check(answer, one, partial(_see, hf.load(right, plan), pixels))
        with pytest.raises(AssertionError, match="Tensor-likes are not close"):
            check(answer, one, partial(_see, hf.load(wrong, plan), pixels))
    resolved = resolve(plan, 6)
    left_out = sorted({*range(6)} - {layer for layer, _ in resolved.runs})
    assert f"in the layers {', '.join(map(str, left_out))}, and are ignored" in log.read_text()


def _write_log(path: Path) -> None:
    def write(record: logging.LogRecord) -> bool:
        with path.open("a") as log:
            log.write(record.getMessage())
        return True

    # A filter: handlers are taken away when vLLM sets up its logging.
    logging.getLogger("vllm.depthpar").addFilter(write)


def _see(model: Any, pixels: dict[str, torch.Tensor], texts: torch.Tensor) -> Any:
    # Gemma 3's is not told which tokens are an image's, and so these see those before them alone:
    # that is what vLLM's attention on CPUs does, plan or not.
    if "image_grid_thw" in pixels:
        # Positions of three axes are made of which tokens are an image's.
        pixels = pixels | {"mm_token_type_ids": (texts == IMAGE).int()}
    return model(texts, **pixels)
