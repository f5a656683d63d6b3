"""A restructured model as an ordinary checkpoint folder that `vllm serve` takes without flags.

Tensors keep the names and dtypes they have in the original checkpoint; those of skipped layers are
left out. The plan is in config.json.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_depthpar.checkpoint.config import folder, read_config
from vllm_depthpar.checkpoint.quantized import Dequantize, dequantizer
from vllm_depthpar.checkpoint.tensors import (
    INDEX,
    WEIGHTS,
    Expected,
    opened,
    stored,
)
from vllm_depthpar.errors import UserError
from vllm_depthpar.plan import Plan, drawing, ladder_checkpoint, resolve
from vllm_depthpar.plan.families import family_of
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.plan.multimodal import language_names
from vllm_depthpar.plan.precedence import ARCHITECTURE, KEY
from vllm_depthpar.util import files
from vllm_depthpar.util.markdown import table

if TYPE_CHECKING:
    from torch import Tensor

# What belongs to a checkpoint beside weights and config: tokenizer, generation config, licence.
_KEPT = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "USE_POLICY*", "NOTICE*")


def check_out(out: Path) -> None:
    """Refuse a folder that holds something, or that can't be made.

    Raises:
        UserError: it is one.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is there already; allowed: a folder that is new or empty")
    if out.is_mount():  # what is made elsewhere can't take its place
        raise UserError(f"--out {out} is where a disk is mounted; allowed: a folder on it")
    files.check_place(out)


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Keep a folder that is to be made from other commands that would make it.

    Raises:
        UserError: see `check_out`; or another command is making it.
    """
    check_out(out)
    busy = f"--out {out} is being made by another command; allowed: another folder"
    place = out.resolve()
    with files.only_one(place.with_name(f".{place.name}.lock"), busy):
        check_out(out)  # the other may have ended since
        yield


def check_source(model: str, plan: Plan) -> None:
    """Refuse a checkpoint that can't be exported with a plan, before anything long begins.

    Raises:
        UserError: it is multimodal or not in safetensors, lacks layers that the plan runs, or its
            tensors are not what its config.json says.
    """
    _shards(folder(model), read_config(model), plan)


def export(
    model: str,
    plan: Plan,
    out: Path,
    changes: Mapping[str, Tensor] | None = None,
    recovery: Mapping[str, Any] | None = None,
) -> None:
    """Write the folder. It has its name only when it is complete.

    Of several commands that make one folder at the same time one writes all of it.

    Args:
        model: folder or hub name of the original checkpoint.
        plan: that it is served with.
        out: the folder to make.
        changes: tensors that replace the checkpoint's, by their names there.
        recovery: what the changes come from, JSON-ready, for the model card and recovery.json.

    Raises:
        UserError: see `check_out` and `check_source`; or a change has no place.
    """
    with claimed(out):
        write(model, plan, out, changes, recovery)


def write(
    model: str,
    plan: Plan,
    out: Path,
    changes: Mapping[str, Tensor] | None = None,
    recovery: Mapping[str, Any] | None = None,
) -> None:
    """`export` into a folder that is `claimed`."""
    source, config = folder(model), read_config(model)
    shards, text = _shards(source, config, plan), card(model, source, config, plan, recovery)
    # In the files they may have other names than here.
    name_of = family_of(config).name_of
    in_files = {name_of(name): name for names in shards.values() for name in names}
    changes = {in_files.get(name, name): tensor for name, tensor in (changes or {}).items()}
    dequantize: Dequantize = dict
    if changes:  # which are no longer what was quantized
        dequantize = dequantizer(source)
        config = {key: value for key, value in config.items() if key != "quantization_config"}
    with made_whole(out) as partial:
        _write_weights(source, partial, shards, changes, dequantize)
        _copy_others(source, partial)
        files.write_json(partial / "config.json", exported_config(config, plan))
        if recovery:
            files.write_json(partial / "recovery.json", recovery)
        files.write_bytes(partial / "README.md", text.encode())


def rewrite(
    model: str,
    out: Path,
    transform: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    described: str,
    record: Mapping[str, Any],
) -> None:
    """Write a checkpoint with other tensors under the same names, into a folder that is `claimed`.

    Args:
        model: folder or hub name of the original checkpoint.
        out: the folder to make.
        transform: makes the new tensors of some of the old ones: of those that are in one file.
        described: for the model card, what was done.
        record: JSON-ready, what it was done with; it becomes rewritten.json.

    Raises:
        UserError: see `check_source`.
    """
    source, config = folder(model), read_config(model)
    shards = _shards(source, config, resolve("identity", ModelShape.from_config(config).layers))
    text = "\n".join([*_card_head(model, source), described])
    with made_whole(out) as partial:
        _write_weights(source, partial, shards, {}, transform)
        _copy_others(source, partial)
        files.write_json(partial / "config.json", config)
        files.write_json(partial / "rewritten.json", record)
        files.write_bytes(partial / "README.md", f"{text}\n".encode())


def _copy_others(source: Path, out: Path) -> None:
    """Copy what belongs to a checkpoint beside weights and config.json."""
    for pattern in _KEPT:
        for path in source.glob(pattern):
            if path.name not in ("config.json", INDEX) and not path.is_dir():
                copy = files.inside(out, path.name, str(source))
                copy.write_bytes(files.read_bytes(path, allowed="a file"))


@contextmanager
def made_whole(out: Path) -> Iterator[Path]:
    """Fill a folder that is `claimed`: what is written into another gets its name in the end."""
    place = out.resolve()
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        with files.writing(out):
            partial.mkdir(parents=True)
            yield partial
            # Of an empty folder this takes the place; one that was filled since stays.
            partial.rename(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def exported_config(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Make a checkpoint's config.json, restructured: the plan says all, a ladder's too."""
    ladder = config["model_type"] == ladder_checkpoint.MODEL_TYPE
    rest = {key: value for key, value in config.items() if key != ladder_checkpoint.KEY}
    return {
        **rest,
        "architectures": [ARCHITECTURE],
        "model_type": "llama" if ladder else config["model_type"],
        KEY: plan.to_spec(),
    }


def _shards(source: Path, config: Mapping[str, Any], plan: Plan) -> dict[str, list[str]]:
    """List the names of the tensors to keep, by the file that they are in."""
    tensors = stored(source)
    if any(stands != name for stands, name in language_names(tensors).items()):
        raise UserError(
            f"{source} is multimodal, and can't be written anew; allowed: to serve it as it is, "
            f"with its plan in --hf-overrides or DEPTHPAR_PLAN"
        )
    shapes = {name: shape for name, (_, shape) in tensors.items()}
    expected = Expected(config)
    expected.check_all(shapes, plan.runs)
    shards: dict[str, list[str]] = {}
    for name, (shard, _) in tensors.items():
        place = expected.place_of(name)
        if place is None or (place[1], expected.half_of(place[2])) in plan.runs:
            shards.setdefault(shard, []).append(name)
    return shards


def _write_weights(
    source: Path,
    out: Path,
    shards: Mapping[str, list[str]],
    changes: Mapping[str, Tensor],
    transform: Dequantize,
) -> None:
    """Shard by shard, so that a large checkpoint is never in memory as a whole."""
    from safetensors.torch import save_file

    total, kept = 0, dict[str, str]()
    for shard, names in shards.items():
        with opened(files.inside(source, shard, str(source / INDEX))) as file:
            found = {name: file.get_tensor(name) for name in names}
        tensors = transform(found)
        for name in changes.keys() & tensors.keys():
            tensors[name] = changes[name].detach().to("cpu", tensors[name].dtype).contiguous()
        save_file(tensors, files.inside(out, shard, str(source / INDEX)), metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
        kept |= dict.fromkeys(tensors, shard)
    if lost := sorted(changes.keys() - kept.keys()):
        raise UserError(f"the checkpoint has no tensor {lost[0]!r} to replace")
    if set(shards) != {WEIGHTS}:
        files.write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": kept})


def card(
    model: str,
    source: Path,
    config: Mapping[str, Any],
    plan: Plan,
    recovery: Mapping[str, Any] | None,
) -> str:
    """Write the model card: what this is, how to serve it, its plan, where its weights are from."""
    name = _name(model, source)
    lines = [
        *_card_head(model, source),
        f"# {name.rpartition('/')[2]}, {plan.name}",
        "",
        f"{name} with its depth restructured, for vLLM with the plugin vllm-depthpar:",
        "",
        "    pip install vllm vllm-depthpar",
        "    vllm serve <this folder>",
        "",
        "or, on transformers, `vllm_depthpar.hf.load(folder)`. Without vllm-depthpar, transformers "
        "would run the layers one after the other, which is not this model.",
        "",
        "## Plan",
        "",
        "```",
        drawing.draw(plan, ModelShape.from_config(config)),
        "```",
        "",
        "## Weights",
        "",
        _recovered(recovery) if recovery else "The original checkpoint's, unchanged.",
    ]
    return "\n".join(lines) + "\n"


def _name(model: str, source: Path) -> str:
    return source.name if files.expanded(model).exists() else model


def _card_head(model: str, source: Path) -> list[str]:
    """Write the lines of a model card that the hub reads."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=_name(model, source),
        license=_licence(source / "README.md"),
        library_name="vllm",
        pipeline_tag="text-generation",
        tags=["vllm-depthpar"],
    )
    return ["---", data.to_yaml(), "---", ""]


def _licence(readme: Path) -> Any:
    """Read what the original's model card says; None without one."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    if not readme.exists():
        return None
    with files.reading(readme, "a model card"):
        try:
            data = ModelCard.load(readme, ignore_metadata_errors=True).data
        except YAMLError as error:
            raise ValueError(error) from None
    return getattr(data, "license", None)


def _recovered(recovery: Mapping[str, Any]) -> str:
    """Say what was done to the weights and what it did, from `recovery.json`."""
    header = ["text", "unmodified", "plan", "refitted", "recovered", "KL: plan", "KL: recovered"]
    stages = recovery["quality"]
    rows = [
        [
            name,
            f"{figures['perplexity']:.2f}",
            *(f"{stages[stage][name]['perplexity']:.2f}" for stage in ("plan", "refit", "end")),
            *(f"{stages[stage][name]['kl']:.3f}" for stage in ("plan", "end")),
        ]
        for name, figures in stages["unmodified"].items()
    ]
    settings, training = recovery["settings"], recovery["training"]
    texts = ", ".join(f"{name} ({tokens} tokens)" for name, tokens in recovery["texts"].items())
    done = []
    if settings["refit"]:
        done.append("the down projections of the changed blocks refitted in closed form")
    if training["steps"]:
        how = "distilled" if settings["objective"] == "distil" else "fine-tuned on the next token"
        worse = ", which made it worse and was undone" if "distilled" in stages else ""
        tokens = training["tokens"]
        done.append(f"{how} in {training['steps']} steps of {tokens} tokens in all{worse}")
    return "\n".join(
        [
            f"Recovered from what the plan cost: {', then '.join(done)}.",
            "",
            f'Learned from: {texts}. "own" texts were written by the original model itself.',
            "",
            f"Settings: `{json.dumps(settings)}`",
            "",
            "Perplexity, and mean KL divergence from the original model (nats per token), on text "
            "that was not learned from:",
            "",
            table(header, rows),
            "",
            "Every measurement on the way is in `recovery.json`.",
        ]
    )
