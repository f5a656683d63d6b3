"""Small random models that see, around language models of `models.write_llama`, with processors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from models import write_llama, write_tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedTokenizerFast

# Pixels of a patch's side; every LLaVA sees four by four.
PATCH, PATCHES = 8, 4
# The token that stands for an image: the first after those of `write_tokenizer`.
IMAGE = 257

Config = dict[str, Any]


@dataclass(frozen=True)
class Seeing:
    """A family of models that see.

    Attributes:
        text: what `write_llama` is given for its language model.
        words: tokens that its processor knows, from `IMAGE` on.
        config: makes transformers' config of what it has of the language model.
        processor: makes transformers' processor of a tokenizer.
        named: attributes of the tokenizer's that its processor reads, of those.
        becomes: the tokens that an image becomes, of what the processor makes of it.
        names: how a published checkpoint begins the names of tensors, by how transformers does.
        flat: whether its config.json has the language model's keys at the top.
    """

    text: Config
    words: tuple[str, ...]
    config: Callable[[Config], Any]
    processor: Callable[[Any], Any]
    becomes: Callable[[Mapping[str, Tensor]], list[int]]
    named: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    flat: bool = False


def _llava(text: Config) -> Any:
    tower = transformers.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=PATCH * PATCHES,
        patch_size=PATCH,
    )
    return transformers.LlavaConfig(
        vision_config=tower,
        text_config=transformers.LlamaConfig(**text),
        image_token_index=IMAGE,
        image_seq_length=PATCHES**2,
    )


def _llava_processor(tokenizer: Any) -> Any:
    side = PATCH * PATCHES
    return transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"height": side, "width": side}, crop_size=side),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


QWEN_WORDS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
_QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": IMAGE + 1,
    "vision_start_token_id": IMAGE + 2,
    "vision_end_token_id": IMAGE + 3,
}
_QWEN_TOWER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 2,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def _qwen2_5(text: Config) -> Any:
    # Windows of two by two merged patches, and no window in the last layer.
    tower = transformers.models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig(
        **_QWEN_TOWER,
        depth=2,
        out_hidden_size=text["hidden_size"],
        window_size=4 * PATCH,
        fullatt_block_indexes=[1],
    )
    return transformers.Qwen2_5_VLConfig(
        vision_config=tower.to_dict(), text_config=text, **_QWEN_TOKENS
    )


def _qwen3(text: Config) -> Any:
    tower = transformers.models.qwen3_vl.configuration_qwen3_vl.Qwen3VLVisionConfig(
        **_QWEN_TOWER,
        depth=3,
        out_hidden_size=text["hidden_size"],
        num_position_embeddings=16,
        deepstack_visual_indexes=[0, 1],
    )
    return transformers.Qwen3VLConfig(
        vision_config=tower.to_dict(), text_config=text, **_QWEN_TOKENS
    )


def _qwen_processor(processor: Any, videos: Any) -> Callable[[Any], Any]:
    of_images: Config = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    size = {"shortest_edge": (2 * PATCH) ** 2, "longest_edge": 64 * PATCH**2}

    def make(tokenizer: Any) -> Any:
        images = transformers.Qwen2VLImageProcessor(size=size, **of_images)
        return processor(images, tokenizer, videos(size=size, **of_images))

    return make


def _qwen_image(made: Mapping[str, Tensor]) -> list[int]:
    return [IMAGE] * (int(made["image_grid_thw"].prod()) // 4)


def _mrope(sections: list[int], **more: Any) -> Config:
    return {"rope_type": "default", "mrope_section": sections, **more}


# Gemma's tokenizer has newlines in a row as one token, which vLLM's processor looks up.
GEMMA_WORDS = (
    "<start_of_image>",
    "<image_soft_token>",
    "<end_of_image>",
    *("\n" * count for count in range(1, 5)),
)


def _gemma3(text: Config) -> Any:
    tower = transformers.SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=PATCH * PATCHES,
        patch_size=PATCH,
        vision_use_head=False,
    )
    return transformers.Gemma3Config(
        vision_config=tower,
        text_config=transformers.Gemma3TextConfig(**text),
        mm_tokens_per_image=4,
        boi_token_index=IMAGE,
        image_token_index=IMAGE + 1,
        eoi_token_index=IMAGE + 2,
    )


def _gemma3_processor(tokenizer: Any) -> Any:
    side = PATCH * PATCHES
    images = transformers.Gemma3ImageProcessor(size={"height": side, "width": side})
    return transformers.Gemma3Processor(images, tokenizer, image_seq_length=4)


def _mistral3(text: Config) -> Any:
    tower = transformers.PixtralVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8 * PATCH,
        patch_size=PATCH,
    )
    return transformers.Mistral3Config(
        vision_config=tower,
        text_config=transformers.MistralConfig(**text),
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )


def _mistral3_processor(tokenizer: Any) -> Any:
    merged = {"height": 2 * PATCH, "width": 2 * PATCH}
    images = transformers.PixtralImageProcessor(size={"longest_edge": 8 * PATCH}, patch_size=merged)
    return transformers.PixtralProcessor(images, tokenizer, PATCH, spatial_merge_size=2)


def _mistral3_image(made: Mapping[str, Tensor]) -> list[int]:
    rows, columns = (int(pixels) // (2 * PATCH) for pixels in made["image_sizes"][0])
    tokens = [*[IMAGE] * columns, IMAGE + 1] * rows
    return [*tokens[:-1], IMAGE + 2]


FAMILIES = {
    "llava": Seeing(
        text={},
        words=("<image>",),
        config=_llava,
        processor=_llava_processor,
        becomes=lambda _: [IMAGE] * PATCHES**2,
        names={"vision_tower.": "vision_tower.vision_model."},
    ),
    "qwen2_5_vl": Seeing(
        text={
            "model_type": "qwen2",
            "hidden": 128,
            "rope_scaling": {**_mrope([4, 6, 6]), "type": "mrope"},
        },
        words=QWEN_WORDS,
        config=_qwen2_5,
        processor=_qwen_processor(
            transformers.Qwen2_5_VLProcessor, transformers.Qwen2VLVideoProcessor
        ),
        becomes=_qwen_image,
        names={"model.language_model.": "model.", "model.visual.": "visual."},
        flat=True,
    ),
    "qwen3_vl": Seeing(
        text={"model_type": "qwen3", "rope_scaling": _mrope([6, 5, 5], mrope_interleaved=True)},
        words=QWEN_WORDS,
        config=_qwen3,
        processor=_qwen_processor(
            transformers.Qwen3VLProcessor, transformers.Qwen3VLVideoProcessor
        ),
        becomes=_qwen_image,
    ),
    "gemma3": Seeing(
        text={"model_type": "gemma3_text"},
        words=GEMMA_WORDS,
        named=dict(zip(("boi_token", "image_token", "eoi_token"), GEMMA_WORDS, strict=False)),
        config=_gemma3,
        processor=_gemma3_processor,
        becomes=lambda _: [IMAGE + 4, IMAGE, *[IMAGE + 1] * 4, IMAGE + 2, IMAGE + 4],
        names={"vision_tower.": "vision_tower.vision_model."},
    ),
    "mistral3": Seeing(
        text={"model_type": "mistral"},
        words=("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        config=_mistral3,
        processor=_mistral3_processor,
        becomes=_mistral3_image,
    ),
}
# Keys of `write_llama`'s that the config inside another does not have.
_ALONE = ("architectures", "model_type", "torch_dtype")


@torch.no_grad()
def write_seeing(kind: str, folder: Path) -> Path:
    """Write a seeded model of one of `FAMILIES`, as its checkpoints are published."""
    family = FAMILIES[kind]
    text = write_llama(folder / "text", **family.text)
    language = json.loads((text / "config.json").read_text())
    language = {key: value for key, value in language.items() if key not in _ALONE}
    config = family.config(language)
    config.dtype, config.tie_word_embeddings = "float32", False
    model_type = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    torch.manual_seed(0)
    model = model_type(config)
    words = load_file(text / "model.safetensors")
    for name, tensor in model.state_dict().items():
        of_text = name.replace("model.language_model.", "model.")
        tensor.copy_(words[of_text] if of_text in words else torch.randn_like(tensor) * 0.2)
    folder = folder / kind
    model.save_pretrained(folder)
    _publish(folder, family)
    write_tokenizer(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, extra_special_tokens=family.named)
    tokenizer.add_tokens(list(family.words), special_tokens=True)
    assert tokenizer.convert_tokens_to_ids(family.words[0]) == IMAGE
    family.processor(tokenizer).save_pretrained(folder)
    return folder


def _publish(folder: Path, family: Seeing) -> None:
    """Give tensors and keys the names and the places that published checkpoints have."""
    file = folder / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        begin = next((begin for begin in family.names if name.startswith(begin)), "")
        tensors[family.names.get(begin, "") + name.removeprefix(begin)] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    if family.flat:
        config = json.loads((folder / "config.json").read_text())
        config = {**config.pop("text_config"), **config}
        (folder / "config.json").write_text(json.dumps(config))


def see(
    kind: str, folder: Path, texts: Sequence[list[int]], images: Sequence[Path]
) -> tuple[list[list[int]], dict[str, Tensor]]:
    """Compute what the reference is given for prompts with an image each.

    Returns:
        The prompts, with all of an image's tokens; and the images, by transformers' arguments.
    """
    processor = AutoImageProcessor.from_pretrained(folder)
    seen = []
    for text, path in zip(texts, images, strict=True):
        at = text.index(IMAGE)
        tokens = FAMILIES[kind].becomes(processor(Image.open(path), return_tensors="pt"))
        seen.append([*text[:at], *tokens, *text[at + 1 :]])
    made = processor([Image.open(path) for path in images], return_tensors="pt")
    return seen, dict(made)
