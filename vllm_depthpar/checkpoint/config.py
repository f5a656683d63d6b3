"""A checkpoint's config.json and tensors, wherever the checkpoint is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_depthpar.checkpoint.tensors import opened, stored
from vllm_depthpar.errors import UserError, shortened
from vllm_depthpar.plan.families import family_of
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.plan.multimodal import language_config
from vllm_depthpar.plan.precedence import KEY
from vllm_depthpar.util import files

if TYPE_CHECKING:
    from torch import Tensor


def read_config(model: str) -> dict[str, Any]:
    """Read the config.json of a checkpoint; of a multimodal one what it says of its language model.

    Args:
        model: its folder, or its name on the Hugging Face hub (cached or downloaded).

    Raises:
        UserError: there is none, or it is not of a family that can be restructured, or says what
            no model is.
    """
    path = _local(model) / "config.json"
    if not path.exists():
        path = _download_config(model)
    config = files.read_json(path, allowed="a config.json")
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object; allowed: a config.json")
    config = language_config(config)
    family_of(config)
    ModelShape.from_config(config)
    return config


def read_original_config(model: str) -> dict[str, Any]:
    """`read_config` of a checkpoint that carries no plan: one to plan for.

    Raises:
        UserError: see `read_config`; or it carries one.
    """
    config = read_config(model)
    if config.get(KEY) is not None:
        raise UserError(f"{model} carries a plan already; allowed: the checkpoint it was made from")
    return config


def folder(model: str) -> Path:
    """Find a checkpoint's folder; of a model of the hub, where its files are cached.

    Args:
        model: see `read_config`, which has accepted it.

    Raises:
        UserError: its files can't be downloaded.
    """
    path = _local(model)
    if (path / "config.json").exists():
        return path
    from huggingface_hub import snapshot_download

    skipped = ["*.bin", "*.pth", "original/*"]
    return _downloaded(model, lambda: snapshot_download(model, ignore_patterns=skipped))


def read_tensors(model: str, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors by their names here, one after the other, exactly as they are in the checkpoint.

    Args:
        model: see `read_config`, which has accepted it.

    Raises:
        UserError: see `folder` and `tensors.stored`; or the checkpoint lacks one.
    """
    source = folder(model)
    name_of = family_of(read_config(model)).name_of
    where = {name_of(name): (file, name) for name, (file, _) in stored(source).items()}
    by_file: dict[str, list[str]] = {}
    for name in names:
        if name not in where:
            raise UserError(f"the checkpoint has no tensor {name!r}; allowed: {source} with it")
        by_file.setdefault(where[name][0], []).append(name)
    for path, inside in by_file.items():
        with opened(source / path) as file:
            for name in inside:
                yield name, file.get_tensor(where[name][1])


def fingerprint(model: str) -> str:
    """Text that changes when a checkpoint does.

    Args:
        model: see `read_config`, which has accepted it.

    Returns:
        Of a folder the files' names, sizes and times; of a model of the hub its commit.
    """
    folder = _local(model)
    if not (folder / "config.json").exists():
        return f"{model}@{_download_config(model).parent.name}"
    found = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    return json.dumps([[name, stat.st_size, stat.st_mtime_ns] for name, stat in found])


def _local(model: str) -> Path:
    """Find the folder that a model's name is, if it is one."""
    path = files.expanded(model)
    with files.reading(
        f"model {shortened(model)}", "a folder with config.json, or a model of the hub"
    ):
        path.exists()
    return path


def _download_config(model: str) -> Path:
    from huggingface_hub import hf_hub_download

    return _downloaded(model, lambda: hf_hub_download(model, "config.json"))


def _downloaded(model: str, download: Callable[[], str]) -> Path:
    try:
        return Path(download())
    except Exception as error:
        raise UserError(
            f"no checkpoint at {model!r} ({type(error).__name__}); "
            f"allowed: a folder with config.json, or a model of the hub"
        ) from None
