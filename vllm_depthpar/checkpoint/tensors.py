"""Which tensors a checkpoint must hold, and of what shapes, before anything is made of them.

A wide block is put together from tensors of several layers, so that one of a wrong size would not
fail, as it does in a model of single layers, but fill another's place. Every way in comes by here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vllm_depthpar.errors import UserError
from vllm_depthpar.plan.model_shape import ModelShape

INDEX = "model.safetensors.index.json"
# What comes before "layers.", the layer, and the tensor's name in it.
_LAYER = re.compile(r"(^|.*\.)layers\.(\d+)\.(.*)")

Shape = tuple[int, ...]


def split_name(name: str) -> tuple[str, int, str] | None:
    """("model.", 3, "mlp.up_proj.weight") of "model.layers.3.mlp.up_proj.weight"; None for a tensor
    of no layer."""
    match = _LAYER.match(name)
    return None if match is None else (match[1], int(match[2]), match[3])


class Expected:
    """What a config.json says of its checkpoint's tensors.

    Of quantized checkpoints, whose tensors have other names and shapes, only the number of layers.

    Args:
        config: parsed; of a model that carries a plan with the layers of its checkpoint.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        shape = ModelShape.from_config(config)
        self.layers = shape.layers
        quantized = config.get("quantization_config") is not None
        self.of_layer: dict[str, Shape] = {} if quantized else shape.layer_tensors()

    def check(self, name: str, shape: Iterable[int]) -> None:
        """Refuse a tensor of a layer that is not in the model, or of a wrong shape.

        Raises:
            UserError: it is one.
        """
        place = split_name(name)
        if place is None:
            return
        _, layer, rest = place
        if layer >= self.layers:
            raise UserError(
                f"the checkpoint has layer {layer} ({name!r}), and its config.json says "
                f"num_hidden_layers {self.layers}; allowed: layers 0 to {self.layers - 1}"
            )
        right, found = self.of_layer.get(rest), tuple(shape)
        if right is not None and found != right:
            raise UserError(
                f"layer {layer} of the checkpoint: {name!r} has the shape {list(found)}; allowed: "
                f"{list(right)}, as its config.json says"
            )

    def check_all(self, shapes: Mapping[str, Shape], kept: Iterable[int]) -> None:
        """Refuse a checkpoint with a tensor that `check` refuses, or that lacks one.

        Args:
            shapes: of all its tensors, by their names.
            kept: the layers that are to run.

        Raises:
            UserError: it is one.
        """
        there: dict[int, set[str]] = {}
        for name, shape in shapes.items():
            self.check(name, shape)
            if (place := split_name(name)) is not None:
                there.setdefault(place[1], set()).add(place[2])
        for layer in sorted(kept):
            if layer not in there:
                raise UserError(
                    f"the checkpoint has no layer {layer}, which the plan runs; allowed: layers "
                    f"{', '.join(map(str, sorted(there))) or 'none'}"
                )
            for rest in self.of_layer:
                if rest not in there[layer]:
                    raise lacks(layer, rest)


def lacks(layer: int, rest: str) -> UserError:
    """The error of a checkpoint without a tensor of a layer that runs."""
    return UserError(f"layer {layer} of the checkpoint lacks {rest!r}; allowed: whole layers")


def has_safetensors(folder: Path) -> bool:
    """Whether a folder has safetensors of transformers' kind."""
    return (folder / INDEX).exists() or (folder / "model.safetensors").exists()


def stored(folder: Path) -> dict[str, tuple[str, Shape]]:
    """The files and shapes of a folder's tensors, by the tensors' names; none are read.

    Raises:
        UserError: there are no safetensors, or a file can't be read.
    """
    from safetensors import SafetensorError, safe_open

    index, names = folder / INDEX, ["model.safetensors"]
    if not has_safetensors(folder):
        raise UserError(f"{folder} has no model.safetensors; allowed: safetensors checkpoints")
    if index.exists():
        try:
            where = json.loads(index.read_text())["weight_map"]
            names = sorted({str(Path(name)) for name in where.values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{index} is not an index of safetensors; allowed: one") from None
    found = {}
    for name in names:
        path = folder / name
        if path.parent != folder:
            raise UserError(f"{index} names {name!r}; allowed: files of its folder")
        try:
            with safe_open(path, framework="np") as file:
                for key in file.keys():  # noqa: SIM118 (not a mapping)
                    found[key] = (name, tuple(file.get_slice(key).get_shape()))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} can't be read ({error}); allowed: safetensors") from None
    return found


def check_folder(folder: Path, config: Mapping[str, Any], kept: Iterable[int]) -> None:
    """Refuse a checkpoint whose safetensors are not what its config.json says; see `Expected`.

    Raises:
        UserError: it is one. Folders without safetensors pass.
    """
    if has_safetensors(folder):
        shapes = {name: shape for name, (_, shape) in stored(folder).items()}
        Expected(config).check_all(shapes, kept)
