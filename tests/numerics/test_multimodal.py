"""Models that see: the language model runs by the plan, the tower is vLLM's, image in."""

from __future__ import annotations

import dataclasses
import importlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from assertions import check
from engine_runs import Case, run
from models import IMAGE_TOKEN, IMAGE_TOKENS, prompts, write_llama, write_llava
from PIL import Image
from transformers import AutoImageProcessor

from vllm_depthpar import hf

try:
    importlib.import_module("torchvision")
except (ImportError, RuntimeError) as why:
    # The one of PyPI is for PyTorch with CUDA and does not import beside another.
    pytest.skip(
        f"vLLM's models that see need a torchvision for this PyTorch, from PyTorch's index: {why}",
        allow_module_level=True,
    )

PLANS: list[Any] = [
    {"pair": [1, 5]},
    {"skip": {"speedup": 1.5}, "ladder": [0, 2]},
    {"blocks": [[0, 3, 1], [4], [2, 5]], "drop_sync": [0, 1, 3, 4], "parallel_residual": [2, 5]},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("multimodal")
    return write_llava(folder / "llava", write_llama(folder / "llama"))


@pytest.fixture(scope="module")
def images(model: Path) -> list[Path]:
    """Two of noise, of different sizes."""
    paths = []
    for seed, size in enumerate([(40, 40), (64, 48)]):
        noise = torch.randint(256, (*size, 3), generator=torch.Generator().manual_seed(seed))
        paths.append(model.parent / f"{seed}.png")
        Image.fromarray(noise.to(torch.uint8).numpy()).save(paths[-1])
    return paths


@pytest.mark.parametrize("ranks", [1, 2])
def test_images_in_prompts(model: Path, images: list[Path], ranks: int) -> None:
    texts = [[*text[:7], IMAGE_TOKEN, *text[7:]] for text in prompts(2, 30, vocab=256).tolist()]
    engine = {"skip_tokenizer_init": False}
    cases = [Case(model, plan, texts, max_tokens=8, images=images, engine=engine) for plan in PLANS]
    processor = AutoImageProcessor.from_pretrained(model)
    pixels = processor([Image.open(path) for path in images], return_tensors="pt")["pixel_values"]
    seen = [[*text[:7], *[IMAGE_TOKEN] * IMAGE_TOKENS, *text[8:]] for text in texts]
    for case, result in zip(cases, run(cases, ranks), strict=True):
        reference = hf.load(model, case.plan, ranks=ranks)
        check(result, dataclasses.replace(case, prompts=seen), partial(_see, reference, pixels))
        blind = partial(_see, reference, torch.zeros_like(pixels))
        with pytest.raises(AssertionError, match="Tensor-likes are not close"):
            check(result, dataclasses.replace(case, prompts=seen), blind)


def _see(model: Any, pixels: torch.Tensor, texts: torch.Tensor) -> Any:
    return model(texts, pixel_values=pixels)
