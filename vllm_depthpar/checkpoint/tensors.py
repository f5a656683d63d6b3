"""Which tensors a checkpoint must hold, and of what shapes, before anything is made of them.

A wide block is put together from tensors of several layers, so that one of a wrong size would not
fail, as it does in a model of single layers, but fill another's place. Every way in comes by here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_depthpar.errors import UserError
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.plan.multimodal import language_names
from vllm_depthpar.plan.plan import Half
from vllm_depthpar.util import files

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PREFIX = "model."
_ADAPTER = "adapter_config.json"
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

    Attributes:
        half_of: says which half of a layer a tensor belongs to, by its name in the layer.
        name_of: says what a tensor is called here, by its name in the checkpoint's files.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        shape = ModelShape.from_config(config)
        self.layers, self.half_of = shape.layers, shape.family.half_of
        self.name_of = shape.family.name_of
        quantized = config.get("quantization_config") is not None
        self._is_sparse = shape.is_sparse
        # Of layers with one MLP, and of those with experts.
        one_of_each = {shape.is_sparse(layer): layer for layer in range(shape.layers)}
        self._of_layers: dict[bool, dict[str, Shape]] = {
            sparse: {} if quantized else shape.layer_tensors(layer)
            for sparse, layer in one_of_each.items()
        }
        self.of_model: dict[str, Shape] = {} if quantized else shape.other_tensors()

    def of_layer(self, layer: int) -> dict[str, Shape]:
        """Look up the shapes of a layer's tensors, by their names in it."""
        return self._of_layers[self._is_sparse(layer)]

    def place_of(self, name: str) -> tuple[str, int, str] | None:
        """`split_name` of a tensor, by its name in the checkpoint's files."""
        return split_name(self.name_of(name))

    def check(self, name: str, shape: Iterable[int]) -> None:
        """Refuse a tensor of a layer that is not in the model, or of a wrong shape.

        Raises:
            UserError: it is one.
        """
        place = self.place_of(name)
        if place is None:
            return
        _, layer, rest = place
        if layer >= self.layers:
            raise UserError(
                f"the checkpoint has layer {layer} ({name!r}), and its config.json says "
                f"num_hidden_layers {self.layers}; allowed: layers 0 to {self.layers - 1}"
            )
        right, found = self.of_layer(layer).get(rest), tuple(shape)
        if right is not None and found != right:
            raise UserError(
                f"layer {layer} of the checkpoint: {name!r} has the shape {list(found)}; allowed: "
                f"{list(right)}, as its config.json says"
            )

    def check_all(self, shapes: Mapping[str, Shape], runs: Iterable[Half]) -> None:
        """Refuse a checkpoint with a tensor that `check` refuses, or that lacks one.

        Args:
            shapes: of all its tensors, by their names.
            runs: what of its layers is to run.

        Raises:
            UserError: it is one.
        """
        there: dict[int, set[str]] = {}
        for name, shape in shapes.items():
            self.check(name, shape)
            if (place := self.place_of(name)) is not None:
                there.setdefault(place[1], set()).add(place[2])
        for layer, half in sorted(runs):
            if layer not in there:
                raise UserError(
                    f"the checkpoint has no layer {layer}, which the plan runs; allowed: layers "
                    f"{', '.join(map(str, sorted(there))) or 'none'}"
                )
            for rest in self.of_layer(layer):
                if self.half_of(rest) == half and rest not in there[layer]:
                    raise lacks(layer, rest)
        self._check_rest(shapes)

    def _check_rest(self, shapes: Mapping[str, Shape]) -> None:
        """Check embedding, last norm and head."""
        shapes = {self.name_of(name): shape for name, shape in shapes.items()}
        headless = "embed_tokens.weight" in shapes  # a model without its head has no prefix
        for rest, right in self.of_model.items():
            of_head = rest.startswith("lm_head.")
            if of_head and headless:
                continue
            name = rest if of_head or headless else _PREFIX + rest
            check_shape(name, shapes.get(name), right)


def check_shape(name: str, found: Iterable[int] | None, right: Iterable[int]) -> None:
    """Refuse a tensor, of a whole checkpoint, that is not of the right shape, or None for missing.

    Raises:
        UserError: it is one.
    """
    if found is None:
        raise UserError(f"the checkpoint lacks {name!r}; allowed: whole checkpoints")
    if list(found) != list(right):
        raise UserError(
            f"the checkpoint: {name!r} has the shape {list(found)}; allowed: {list(right)}, as its "
            f"config.json says"
        )


def lacks(layer: int, rest: str) -> UserError:
    """Make the error of a checkpoint without a tensor of a layer that runs."""
    return UserError(f"layer {layer} of the checkpoint lacks {rest!r}; allowed: whole layers")


def has_safetensors(folder: Path) -> bool:
    """Whether a folder has safetensors of transformers' kind."""
    return (folder / INDEX).exists() or (folder / WEIGHTS).exists()


def shards(index: Path) -> list[Path]:
    """List the files that an index of tensors names, each once.

    Raises:
        UserError: it is no index, or names what is not a file of its folder.
    """
    found = files.read_json(index, allowed="an index of tensors")
    where = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(where, dict):
        raise UserError(f"{index} is not an index of tensors; allowed: one, with a weight_map")
    paths = {files.inside(index.parent, name, str(index)) for name in where.values()}
    return sorted(paths)


def check_files(folder: Path) -> None:
    """Refuse a folder of which transformers would read other weights than its safetensors say.

    Raises:
        UserError: it is one, or an index in it, of whatever kind of file, is none.
    """
    for index in folder.glob("*.index*.json"):
        shards(index)
    if (folder / WEIGHTS).exists() and (folder / INDEX).exists():
        raise UserError(
            f"{folder} has {WEIGHTS} and {INDEX}: transformers takes the one, vLLM the other; "
            f"allowed: one of them"
        )
    if (folder / _ADAPTER).exists():
        raise UserError(
            f"{folder} has {_ADAPTER} beside its weights: transformers adds the adapter, vLLM does "
            f"not; allowed: to merge it, or to keep it elsewhere"
        )


@contextmanager
def opened(path: Path, framework: str = "pt", allowed: str = "safetensors") -> Iterator[Any]:
    """Open safetensors.

    Args:
        framework: whose tensors to give: "pt" or "np".
        allowed: what should be there, for the message.

    Raises:
        UserError: they can't be read.
    """
    from safetensors import safe_open

    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file; allowed: {allowed}")
    with files.reading(path, allowed), safe_open(path, framework=framework) as file:
        yield file


def stored(folder: Path) -> dict[str, tuple[str, Shape]]:
    """Look up the files and shapes of a folder's tensors, by the tensors' names; none are read.

    Raises:
        UserError: there are no safetensors, or a file can't be read.
    """
    if not has_safetensors(folder):
        raise UserError(f"{folder} has no {WEIGHTS}; allowed: safetensors checkpoints")
    index = folder / INDEX
    found = {}
    for path in shards(index) if index.exists() else [folder / WEIGHTS]:
        with opened(path, "np") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                found[key] = (path.name, tuple(file.get_slice(key).get_shape()))
    return found


def check_folder(folder: Path, config: Mapping[str, Any], runs: Iterable[Half]) -> None:
    """Refuse a checkpoint whose safetensors are not what its config.json says; see `Expected`. Of
    a multimodal one only the language model's are looked at.

    Raises:
        UserError: it is one. Folders without safetensors pass.
    """
    if has_safetensors(folder):
        found = stored(folder)
        shapes = {name: found[stored_as][1] for stored_as, name in language_names(found).items()}
        Expected(config).check_all(shapes, runs)
